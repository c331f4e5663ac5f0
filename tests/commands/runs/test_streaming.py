"""A streamed data set gives the same rows as a loaded one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

import datasets

from hf_ebft.commands.runs import streaming, strided
from hf_ebft.commands.runs.parsing import parse_arguments
from hf_ebft.commands.train import choose_mode, main
from tests.support.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer(eos_token="<eos>", pad_token="<pad>")
TEXTS = [f"def function_{n}(value):\n    return value + {n} * {n}\n" for n in range(60)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, records: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def parsed(path: str, *options: str) -> tuple[Any, Any]:
    arguments = [f"--dataset_name_or_path={path}", "--use_cpu", "--max_steps=5"]
    data, *_, args = parse_arguments([*arguments, "--sequence_len=24", *options])
    return data, args


def rows_of(path: str, *options: str, wants_eval: bool = False) -> tuple[Any, Any]:
    data, args = parsed(path, "--streaming", *options)
    return strided.load_rows(data, TOKENIZER, args, wants_eval=wants_eval)


def contents(rows: Any) -> list[tuple[tuple[str, tuple[int, ...]], ...]]:
    """All columns of all rows, in an order that does not depend on that of the documents."""
    return sorted(
        tuple(sorted((name, tuple(map(int, ids))) for name, ids in row.items())) for row in rows
    )


@pytest.mark.parametrize(
    "records",
    [
        [{"text": text, "id": n} for n, text in enumerate(TEXTS)],
        [{"prompt": f"# {n}\n", "completion": text} for n, text in enumerate(TEXTS)],
    ],
    ids=["text", "pairs"],
)
def test_a_stream_gives_the_rows_of_the_loaded_data_set(
    records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several batches."""
    monkeypatch.setattr(streaming, "BATCH", 7)
    path = write(tmp_path, records)
    stream, _ = rows_of(path)
    assert isinstance(stream, datasets.IterableDataset)
    loaded, _ = strided.load_rows(*loading(path), wants_eval=False)
    assert contents(stream) == contents(loaded[n] for n in range(len(loaded)))


def loading(path: str) -> tuple[Any, Any, Any]:
    data, args = parsed(path)
    return data, TOKENIZER, args


def test_the_order_is_shuffled_by_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": text} for text in TEXTS])

    def first(seed: int) -> list[list[int]]:
        return [row["input_ids"] for row in rows_of(path, f"--seed={seed}")[0]]

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_the_first_documents_are_held_out_and_not_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": text} for text in TEXTS])
    stream, held_out = rows_of(path, "--max_eval_rows=10", wants_eval=True)
    assert {source for sources in held_out.sources for source in sources} == set(range(10))
    whole, _ = rows_of(path)
    trained, measured = contents(stream), contents(held_out[n] for n in range(len(held_out)))
    assert not set(trained) & set(measured)
    assert sorted(trained + measured) == contents(whole)


def test_a_stream_without_documents_to_train_on_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": text} for text in TEXTS])
    for options, held_out in (((), 256), (("--max_eval_rows=60",), 60)):
        message = rf"data\.jsonl has 60 documents, and the first {held_out} .* Lower max_eval_rows"
        with pytest.raises(ValueError, match=message):
            rows_of(path, *options, wants_eval=True)
    stream, _ = rows_of(path, "--max_eval_rows=59", wants_eval=True)
    assert len(list(stream)) > 0


def test_held_out_text_may_be_another_data_set(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": text} for text in TEXTS])
    other = write(tmp_path, [{"text": "something else, long enough"}] * 3, "other.jsonl")
    stream, held_out = rows_of(path, f"--eval_dataset_name_or_path={other}", wants_eval=True)
    assert held_out.counts.documents == 3
    assert contents(stream) == contents(rows_of(path)[0])


def test_the_number_of_documents_that_a_stream_leaves_out_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch from which no row is made does not end the run."""
    monkeypatch.setattr(streaming, "BATCH", 2)
    path = write(tmp_path, [{"text": text} for text in ("x", "", *TEXTS[:4])])
    with caplog.at_level(logging.INFO):
        stream, _ = rows_of(path)
        monkeypatch.setattr(streaming, "SHUFFLED", 1)
        assert len(list(stream)) > 0
        stream, _ = rows_of(path)
        rows = list(stream)
    assert "A batch of 2 documents gives no row" in caplog.text
    assert "1 empty documents skipped" in caplog.text
    assert rows


def test_a_run_on_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(vocabulary=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    path = write(tmp_path, [{"text": text} for text in TEXTS])
    arguments = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name_or_path": path,
        "streaming": True,
        "output_dir": tmp_path / "out",
        "use_cpu": True,
        "sequence_len": 24,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "report_rows": 6,
        "report_draws": 1,
        "max_eval_rows": 8,
        "save_strategy": "no",
        "verify_packing": False,
        "report_to": "none",
    }
    main([f"--{name}={value}" for name, value in arguments.items()])
    said = capsys.readouterr().out
    assert "Mode: strided (only strided mode can stream)." in said
    assert "is read during training, for max_steps=3 steps" in said
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_steps=-1"], "max_steps=-1: the length of a stream is unknown"),
        (["--max_train_rows=3"], "max_train_rows=3 with streaming=True: .* cannot be chosen"),
        (["--eval_fraction=0.3"], "eval_fraction=0.3 with streaming=True: .* is unknown"),
        (["--train_split=train[:9]"], r"split='train\[:9\]' is a slice"),
        (["--text_column=body"], "no column 'body'; it has 'text'"),
    ],
)
def test_options_that_a_stream_cannot_honour_are_refused(
    options: list[str], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, [{"text": text} for text in TEXTS])
    with pytest.raises(ValueError, match=message):
        rows_of(path, *options)


def test_data_that_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt is a text file"):
        rows_of(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="stdlib:topics comes with Python"):
        rows_of("stdlib:topics")
    paths = [write(tmp_path, [{"text": "a"}], name) for name in ("a.jsonl", "b.jsonl")]
    data, args = parsed(paths[0], "--streaming")
    data.dataset_name_or_path = paths
    with pytest.raises(ValueError, match="reads one data set, not 2"):
        strided.load_rows(data, TOKENIZER, args, wants_eval=False)
    with pytest.raises(ValueError, match=r"c\.jsonl is empty"):
        rows_of(write(tmp_path, [], "c.jsonl"))


def test_the_mode_is_strided_without_opening_anything(tmp_path: Path) -> None:
    mode, _, table = choose_mode(["--dataset_name_or_path=owner/name", "--streaming"])
    assert mode == "strided" and table is None
