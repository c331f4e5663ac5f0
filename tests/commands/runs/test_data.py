"""How a run reads the columns of its data: chats, pairs, rows without a ground truth."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import datasets

from hf_ebft.commands.runs import structured, text
from hf_ebft.commands.runs.data import load_split, load_text
from hf_ebft.commands.runs.parsing import parse_arguments
from hf_ebft.commands.train import choose_mode
from hf_ebft.data import Table
from hf_ebft.structured.datasets import REFUSED_COLUMNS
from tests.support.tiny_structured import tokenizer

CHATS = [
    [
        {"role": "user", "content": f"question {n}"},
        {"role": "assistant", "content": f"first {n}"},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": f"second {n}"},
    ]
    for n in range(4)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, records: Sequence[dict[str, Any]]) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def opened(path: str, *options: str, mode: str = "strided") -> tuple[Table, Any, Any]:
    arguments = [f"--dataset_name_or_path={path}", f"--mode={mode}", "--use_cpu", "--bf16=false"]
    data, *_, args = parse_arguments([*arguments, *options])
    return load_split(path, "train", data), data, args


def pairs(path: str, *options: str) -> list[tuple[str, str]]:
    """The pairs that strided mode reads."""
    table, data, _ = opened(path, *options)
    return list(text.raw_text(table, data, tokenizer()).pairs())


def prompts(path: str, *options: str) -> list[dict[str, Any]]:
    """The prompts that structured mode reads."""
    table, data, args = opened(path, *options, mode="structured")
    return list(structured.read_prompts(table, data, args).records)


# ---- Chats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_chats_are_prompts_with_their_last_replies(
    column: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, [{column: chat, "id": n} for n, chat in enumerate(CHATS)])
    with caplog.at_level(logging.INFO):
        rows = prompts(path)
    assert [row["ground_truth"] for row in rows] == [f"second {n}" for n in range(4)]
    assert rows[1]["prompt"] == CHATS[1][:3]
    assert f"chats in '{column}'. The last reply of each chat is its ground truth" in caplog.text
    mode, why, _ = choose_mode([f"--dataset_name_or_path={path}"])
    assert (mode, why) == ("structured", "the columns are 'prompt' and 'ground_truth'")
    assert pairs(path)[1] == (
        "<|user|>question 1<|end|>\n<|assistant|>first 1<|end|>\n<|user|>and then?<|end|>\n"
        "<|assistant|>",
        "second 1",
    )


def test_the_transform_can_take_other_replies(tmp_path: Path) -> None:
    path = write(tmp_path, [{"messages": chat} for chat in CHATS])
    options = ("--transform=chat", '--transform_args={"turn": "first"}')
    assert [row["ground_truth"] for row in prompts(path, *options)] == [
        f"first {n}" for n in range(4)
    ]


def test_a_text_column_beside_chats_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, [{"messages": chat, "text": "plain"} for chat in CHATS])
    table, data, _ = opened(path)
    assert list(text.raw_text(table, data, tokenizer()).texts()) == ["plain"] * 4


def test_chats_with_tools_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [{"messages": chat, "tools": "[]"} for chat in CHATS])
    with pytest.raises(
        ValueError, match="tools in 'tools', but the tools would not be rendered into the prompt"
    ):
        pairs(path)


def test_chats_without_a_reply_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, [{"messages": chat} for chat in [*CHATS, CHATS[0][:1]]])
    with pytest.raises(ValueError, match=r"transform chat: Row 4: .*no reply of the assistant"):
        prompts(path)
    assert len(prompts(path, "--bad_rows=skip")) == 4
    assert "1 of 5 rows were left out" in caplog.text


# ---- Conversational prompts and completions, as TRL has them ---------------------------------


def conversation(number: int) -> dict[str, Any]:
    return {"prompt": CHATS[number][:1], "completion": CHATS[number][1:2]}


def test_conversational_pairs(tmp_path: Path) -> None:
    path = write(tmp_path, [conversation(n) for n in range(4)])
    assert pairs(path)[2] == ("<|user|>question 2<|end|>\n<|assistant|>", "first 2")
    row = prompts(path)[2]
    assert row == {"prompt": CHATS[2][:1], "ground_truth": CHATS[2][1:2]}


def test_strided_mode_refuses_a_completion_of_several_messages(tmp_path: Path) -> None:
    whole = {"prompt": CHATS[0][:1], "completion": CHATS[0][1:]}
    path = write(tmp_path, [conversation(1), whole])
    assert prompts(path)[1]["ground_truth"] == CHATS[0][1:]
    with pytest.raises(ValueError, match=r"row 1, 'completion', has 3 messages, 2 of them"):
        pairs(path)


def test_plain_pairs_are_read_unchanged(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "2 + 2 =", "completion": " 4"}])
    assert pairs(path) == [("2 + 2 =", " 4")]


# ---- Rows that cannot be used ---------------------------------------------------------------


def test_rows_without_a_ground_truth_are_counted_and_named_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p{n}", "answer": f"a{n}"} for n in range(9)]
    rows[2]["answer"] = None
    rows[5]["prompt"] = "  "
    rows[7]["answer"] = ""
    path = write(tmp_path, rows)
    named = (
        r"3 of 9 rows have no prompt or no ground truth: 2 \('ground_truth'\), 5 \('prompt'\), 7"
    )
    with pytest.raises(ValueError, match=named + r".*--bad_rows skip"):
        prompts(path)
    kept = prompts(path, "--bad_rows=skip")
    assert [row["prompt"] for row in kept] == ["p0", "p1", "p3", "p4", "p6", "p8"]
    assert "3 of 9 rows have no prompt" in caplog.text and "These rows are left out" in caplog.text


def test_data_without_any_ground_truth_cannot_be_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "p", "answer": " "}] * 7)
    with pytest.raises(ValueError, match=r"7 of 7 rows .*, \.\.\.\. No row is left to train on"):
        prompts(path, "--bad_rows=skip")


@pytest.mark.parametrize("column", sorted(REFUSED_COLUMNS))
def test_columns_that_the_trainer_refuses_are_refused_when_data_is_read(
    column: str, tmp_path: Path
) -> None:
    path = write(tmp_path, [{"prompt": "p", "answer": "a", column: "x"}] * 4)
    with pytest.raises(ValueError, match=f"the column '{column}' .*Remove or rename it"):
        prompts(path)


def test_columns_that_training_does_not_use_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "p", "answer": "a", "id": 3, "source": "web"}] * 4)
    assert prompts(path)[0] == {"prompt": "p", "ground_truth": "a"}


# ---- Several data sets ------------------------------------------------------------------------


def two_sets(folder: Path) -> list[str]:
    """A .csv with 40 texts and lines of JSON with 20, under other names."""
    rows = "".join(f"{n},from the table {n}\n" for n in range(40))
    (folder / "a.csv").write_text("id,text\n" + rows)
    lines = [json.dumps({"content": f"from the lines {n}"}) + "\n" for n in range(20)]
    (folder / "b.jsonl").write_text("".join(lines))
    return [str(folder / "a.csv"), str(folder / "b.jsonl")]


def texts_of(options: list[str]) -> tuple[list[str], list[str]]:
    data, *_ = parse_arguments([*options, "--use_cpu"])
    train, held_out = load_text(
        data, True, lambda table: text.raw_text(table, data, tokenizer()), None
    )
    assert held_out is not None
    return list(train.texts()), list(held_out.texts())


def test_several_data_sets_are_joined_and_each_has_held_out_rows(tmp_path: Path) -> None:
    options = ["--dataset_name_or_path", *two_sets(tmp_path), "--eval_fraction=0.1"]
    train, held_out = texts_of(options)
    assert len(train) == 54 and len(held_out) == 6
    assert sorted(train + held_out) == sorted(
        [f"from the table {n}" for n in range(40)] + [f"from the lines {n}" for n in range(20)]
    )
    assert sum("table" in text for text in held_out) == 4


def test_weights_from_the_command_line_and_from_a_file(tmp_path: Path) -> None:
    sets = two_sets(tmp_path)
    options = ["--dataset_name_or_path", *sets, "--dataset_weights", "1", "3"]
    train, held_out = texts_of(options)
    # The lines run out first: 19 are left to train on, and about a third as many of the table.
    assert sum("lines" in text for text in train) == 19
    assert sum("table" in text for text in train) < 16
    assert not set(train) & set(held_out)
    file = tmp_path / "run.yaml"
    file.write_text(f"dataset_name_or_path: [{', '.join(sets)}]\ndataset_weights: [1, 3]\n")
    assert texts_of([f"--config={file}"]) == (train, held_out)


def test_held_out_text_of_another_set_is_not_mixed(tmp_path: Path) -> None:
    sets = two_sets(tmp_path)
    (tmp_path / "held.txt").write_text("held out")
    options = ["--dataset_name_or_path", *sets, f"--eval_dataset_name_or_path={tmp_path}/held.txt"]
    train, held_out = texts_of(options)
    assert (len(train), held_out) == (60, ["held out"])


def test_weights_without_several_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 for 1 data set"):
        parse_arguments([f"--dataset_name_or_path={two_sets(tmp_path)[0]}", "--dataset_weights=1"])
