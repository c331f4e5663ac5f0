"""Several data sets as one: every row counted, shares as asked for."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

pytest.importorskip("datasets")

from datasets import Dataset, Features, Value

from hf_ebft.data import RawDataset, mix
from hf_ebft.data.mixing import check_weights


def part(name: str, count: int, column: str = "text", table: bool = False) -> RawDataset:
    records: Any = [{column: f"{name} {number}"} for number in range(count)]
    return RawDataset(Dataset.from_list(records) if table else records, (column,), name)


def test_one_data_set_stays_itself() -> None:
    alone = part("a", 3)
    assert mix([alone], None, 0) is alone


@pytest.mark.parametrize("table", [False, True])
def test_without_weights_every_row_is_there_once(table: bool) -> None:
    """Under the first one's column, whatever the others call theirs."""
    mixed = mix([part("a", 3, table=table), part("b", 2, "content"), part("c", 1)], None, 0)
    assert list(mixed.texts()) == ["a 0", "a 1", "a 2", "b 0", "b 1", "c 0"]
    assert (mixed.name, mixed.columns) == ("a + b + c", ("text",))


@pytest.mark.parametrize("weights", [[0.75, 0.25], [3, 1], [30.0, 10.0]])
def test_rows_are_drawn_by_their_shares(
    weights: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Each row once and in order, and what was left out is counted."""
    with caplog.at_level(logging.INFO):
        texts = list(mix([part("a", 3000), part("b", 3000)], weights, 0).texts())
    of_a = [text for text in texts if text.startswith("a")]
    of_b = [text for text in texts if text.startswith("b")]
    assert of_a == [f"a {number}" for number in range(len(of_a))]
    assert of_b == [f"b {number}" for number in range(len(of_b))]
    # `a` runs out after about 4000 draws; the standard deviation of their share is 0.7 %.
    assert len(of_a) == 3000
    assert len(of_a) / len(texts) == pytest.approx(0.75, abs=0.025)
    assert f"3000 of 3000 of a, {len(of_b)} of 3000 of b" in caplog.text


def test_the_drawing_depends_on_its_seed_alone() -> None:
    def drawn(seed: int) -> list[str]:
        return list(mix([part("a", 50), part("b", 50)], [1, 1], seed).texts())

    assert drawn(0) == drawn(0) != drawn(1)


def test_pairs_are_mixed_with_pairs_only() -> None:
    pairs = RawDataset([{"prompt": "p", "completion": "c"}], ("prompt", "completion"), "pairs")
    other = RawDataset([{"q": "2", "a": "d"}], ("q", "a"), "other")
    assert list(mix([pairs, other], None, 0).pairs()) == [("p", "c"), ("2", "d")]
    with pytest.raises(ValueError, match="the columns prompt and completion, but a has text"):
        mix([part("a", 2), pairs], None, 0)


def test_types_of_text_are_made_alike() -> None:
    large = Dataset.from_list([{"text": "x"}], features=Features({"text": Value("large_string")}))
    mixed = mix([part("a", 1), RawDataset(large, ("text",), "large")], None, 0)
    assert list(mixed.texts()) == ["a 0", "x"]
    chats = RawDataset([{"text": [{"role": "user", "content": "x"}]}], ("text",), "chats")
    with pytest.raises(ValueError, match="chats and a have values of different types"):
        mix([part("a", 1), chats], None, 0)


@pytest.mark.parametrize(
    ("weights", "count", "message"),
    [
        ([0.5], 2, ": 1 for 2 data set(s)"),
        ([0.5, 0.5], 1, ": 2 for 1 data set(s)"),
        ([1.0], 1, "Give one weight for each of several"),
        ([1.0, 0.0], 2, "contains 0.0, but weights must be above 0"),
        ([1.0, -1.0], 2, "contains -1.0"),
        ([float("nan"), 1.0], 2, "contains nan"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    weights: list[float], count: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_weights(weights, count)
