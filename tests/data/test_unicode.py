"""Characters and marks that are no text: they are named by row or file, or read past."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_ebft.data import (
    BadRowError,
    RawDataset,
    chat,
    load_text_dataset,
    prompt_completion,
    question_answer,
    raw_text,
    tokenize_and_cut,
    tokenize_prompt_completion,
    transform_rows,
)
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(eos_token="<eos>")
HALF = "a\ud83db"
LENGTHS: dict[str, Any] = {"sequence_len": 8, "min_length": 1}
REPLY = {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda: tokenize_and_cut(["good", HALF], TOKENIZER, **LENGTHS), "Document 1 contains"),
        (
            lambda: tokenize_prompt_completion(
                [("good", "x"), ("good", HALF)], TOKENIZER, min_completion=1, **LENGTHS
            ),
            "The completion of pair 1 contains",
        ),
        (
            lambda: raw_text({"text": ["good", HALF]}, tokenizer=TOKENIZER),
            "Column 'text', row 1 of the batch, contains",
        ),
        (
            lambda: list(RawDataset([{"text": HALF}], ("text",), "data").texts()),
            "Column 'text' of data, row 0, contains",
        ),
    ],
)
def test_half_a_character_is_named_by_its_row(call: Callable[[], Any], where: str) -> None:
    """Tokenizers say `TextEncodeInput must be Union[...]` of it."""
    with pytest.raises(ValueError, match=rf"^{where} a lone surrogate \('\\ud83d' at character 1"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: prompt_completion({"prompt": HALF, "completion": "b"}, 3, tokenizer=TOKENIZER),
        lambda: prompt_completion({"prompt": "a", "completion": HALF}, 3, tokenizer=TOKENIZER),
        lambda: question_answer({"input": "a", "output": HALF}, 3),
        lambda: chat({"messages": [{"role": "user", "content": HALF}, REPLY]}, 3),
    ],
)
def test_rows_with_half_a_character_can_be_skipped(call: Callable[[], Any]) -> None:
    with pytest.raises(BadRowError, match=r"^Row 3: .*contains a lone surrogate"):
        call()
    rows = [{"input": "a", "output": "b"}, {"input": HALF, "output": "b"}]
    kept = transform_rows(rows, question_answer, bad_rows="skip")
    assert kept == [{"prompt": "a", "ground_truth": "b"}]


def test_the_repair_that_is_advised_works() -> None:
    pair = "\ud83d\ude00"  # two halves that belong together
    for text, whole in ((HALF, "a\ufffdb"), (pair, "\U0001f600")):
        assert text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") == whole


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "notepad.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert list(load_text_dataset(str(path)).texts()) == ["hello"]


def test_empty_text_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    for path in (empty, tmp_path):
        with pytest.raises(ValueError, match=r"empty\.txt is empty: there is no text in it"):
            load_text_dataset(str(path))
    (tmp_path / "full.txt").write_text("hello")
    with caplog.at_level(logging.WARNING, "hf_ebft"):
        assert list(load_text_dataset(str(tmp_path)).texts()) == ["hello"]
    assert (
        f"1 of 2 files of {tmp_path} are empty and were left out. The first: {empty}" in caplog.text
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"text": "a"}) + "\n" + json.dumps({"text": HALF}), r"line 2 contains a lone"),
        ('{"text": "a"}\n{"text": \n', r"line 2 is not valid JSON"),
        ("\n\n", r"data\.jsonl is empty"),
        (b'{"text": "\xe9"}\n{"text": \n', r"not UTF-8 text: byte 0xE9 at offset 10 \(line 1\)"),
        ('{"text": "a\u2028b"}\n{"text": \n', r"line 2 is not valid JSON"),
    ],
)
def test_lines_that_cannot_be_read_are_named(
    tmp_path: Path, text: str | bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "data.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_text_dataset(str(path))
