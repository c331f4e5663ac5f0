"""Which rows a preflight measures, and in which order."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ebft import EBFTTrainer
from hf_ebft.preflight import preflight, run
from hf_ebft.preflight.documents import Batch, in_random_order
from tests.support.tiny import config, texts, tiny_llama


class Seen(Exception):
    """Ends a preflight once it is known what it measures on."""


def test_rows_before_a_deadline_are_any_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once they were the first of the data set: with little time, its first files alone."""
    lengths = list(range(18, 34))  # tells rows apart
    trainer = EBFTTrainer(
        model=tiny_llama(),
        args=config(tmp_path, max_steps=1, use_whitening=False),
        train_dataset=texts(*lengths),
    )
    found: list[int] = []

    def look(own: EBFTTrainer, batches: Sequence[Batch], *rest: Any) -> None:
        found.extend(batch["input_ids"].shape[1] for batch in batches)
        raise Seen

    monkeypatch.setattr(run, "check_rewards", look)
    with pytest.raises(Seen):
        preflight(trainer, documents=16)
    assert sorted(found) == lengths
    # Half of the rows in the order of the data have a mean rank of 3.5, any half 7.5 +- 1.2.
    assert 5 < sum(found[:8]) / 8 - 18 < 10
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(found))
    assert neighbours < 6  # of 15


def test_the_order_depends_on_the_seed_alone() -> None:
    batches: list[Batch] = [{"row": row} for row in range(20)]
    torch.manual_seed(0)
    first = in_random_order(batches, 3)
    torch.manual_seed(1)
    assert in_random_order(batches, 3) == first
    assert in_random_order(batches, 4) != first
    assert sorted(batch["row"] for batch in first) == list(range(20))
