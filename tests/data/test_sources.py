"""Raw text read from files, and cut into rows without losing a token silently."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hf_ebft.data import (
    EBFTDataCollator,
    RawDataset,
    TokenizedRows,
    hold_out,
    load_text_dataset,
    tokenize_and_cut,
    tokenize_prompt_completion,
)
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import Documents
from tests.support.tiny import tiny_tokenizer

datasets = pytest.importorskip("datasets")

TOKENIZER = tiny_tokenizer(eos_token="<eos>")
EOS = TOKENIZER.eos_token_id
PAIRS = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "1 + 2 =", "completion": " 3"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def input_ids(rows: TokenizedRows) -> list[list[int]]:
    return [rows[index]["input_ids"].tolist() for index in range(len(rows))]


def write(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(list(records)).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# ---- Files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_text("one\n\ntwo ü\n", encoding="utf-8")
    assert list(load_text_dataset(str(path)).texts()) == ["one\n\ntwo ü\n"]


def test_a_folder_holds_a_document_a_file(tmp_path: Path) -> None:
    files = {"b.py": "b", "a/c.txt": "c", "a/d.md": "d", ".git/x.txt": "x", ".h.txt": "h"}
    files |= {"__pycache__/y.py": "y", "a/package.json": "{}", "e.png": "e"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(load_text_dataset(str(tmp_path)).texts()) == ["c", "d", "b"]


def test_files_that_are_no_utf8_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with caplog.at_level(logging.WARNING):
        data = load_text_dataset(str(tmp_path))
    assert list(data.texts()) == ["good"]
    assert "1 of 2 files" in caplog.text and "bad.txt" in caplog.text
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8 text: byte 0xFF at offset 0"):
        load_text_dataset(str(tmp_path / "bad.txt"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_tables_are_read(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", [{"text": "one", "n": 1}, {"text": "two", "n": 2}])
    data = load_text_dataset(path)
    assert list(data.texts()) == ["one", "two"]
    assert not data.has_prompts
    assert list(load_text_dataset(path, "train[1:]").texts()) == ["two"]


def test_a_folder_of_tables_has_the_splits_that_its_names_say(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", [{"text": "one"}])
    write(tmp_path / "data" / "test.jsonl", [{"text": "two"}])
    (tmp_path / "data" / "README.md").write_text("# About the data\n")
    assert list(load_text_dataset(str(tmp_path / "data"), "test").texts()) == ["two"]


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": ["one", "two"]})
    data.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "splits")
    assert list(load_text_dataset(str(tmp_path / "single")).texts()) == ["one", "two"]
    assert list(load_text_dataset(str(tmp_path / "splits"), "test").texts()) == ["two"]
    with pytest.raises(ValueError, match="split='dev'"):
        load_text_dataset(str(tmp_path / "splits"), "dev")


def test_prompts_with_completions_are_found(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [pair | {"text": "no"} for pair in PAIRS])
    data = load_text_dataset(path)
    assert data.has_prompts
    assert list(data.pairs()) == [("2 + 2 =", " 4"), ("1 + 2 =", " 3")]
    assert list(load_text_dataset(path, column="text").texts()) == ["no", "no"]


@pytest.mark.parametrize("column", ["text", "content", "code"])
def test_usual_names_of_text_columns_are_found(tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "data.jsonl", [{"id": "7", column: "one"}])
    assert list(load_text_dataset(path).texts()) == ["one"]


@pytest.mark.parametrize(
    ("record", "column", "message"),
    [
        ({"title": "a", "body": "b"}, None, "neither a text column .* it has 'title', 'body'"),
        ({"prompt": "a"}, None, "nor both of prompt and completion"),
        ({"text": "a"}, "body", "no column 'body'; it has 'text'"),
        ({"messages": [{"role": "user"}]}, None, "apply_chat_template"),
    ],
)
def test_columns_that_are_not_there_are_named(
    tmp_path: Path, record: dict[str, Any], column: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_text_dataset(write(tmp_path / "data.jsonl", [record]), column=column)


def test_values_that_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"text": "a", "n": 1}, {"text": None, "n": 2}])
    assert list(load_text_dataset(path).texts()) == ["a", ""]
    with pytest.raises(ValueError, match=r"Column 'n' of .* contains a int in row 0"):
        list(load_text_dataset(path, column="n").texts())


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("missing.jsonl", "train", "no file or folder"),
        ("./missing", "train", "no file or folder"),
        ("picture.png", "train", r"ends in '.png', which cannot be read; use one of \.txt"),
        ("nothing", "train", "contains no file that can be read from a folder"),
        ("mixed", "train", r"text files \(a\.txt, \.\.\.\) and tables \(b\.jsonl, \.\.\.\)"),
        ("text.txt", "test", "split='test'.*one split, 'train'"),
        ("data.jsonl", "test", "could not be loaded with split='test'"),
        ("broken.jsonl", "train", "could not be loaded"),
        ("empty.jsonl", "train", r"empty\.jsonl is empty"),
        ("empty.parquet", "train", r"empty\.parquet could not be loaded .* no data"),
        ("owner/no-such-dataset", "train", "owner/no-such-dataset could not be loaded"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, split: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("nothing", "mixed"):
        (tmp_path / folder).mkdir()
    for file in ("picture.png", "mixed/a.txt", "text.txt"):
        (tmp_path / file).write_text("x")
    for file in ("mixed/b.jsonl", "data.jsonl"):
        write(tmp_path / file, [{"text": "one"}])
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"te')
    (tmp_path / "empty.jsonl").write_text("")
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=message):
        load_text_dataset(name, split)


def test_a_missing_datasets_library_is_said_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "data.jsonl", [{"text": "one"}])
    (tmp_path / "plain.txt").write_text("one")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "hf_ebft\[examples\]"'):
        load_text_dataset(path)
    assert list(load_text_dataset(str(tmp_path / "plain.txt")).texts()) == ["one"]


# ---- Held-out text ----------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("count", "fraction", "n_held_out"), [(100, 0.05, 5), (7, 0.25, 1)])
def test_held_out_documents_are_disjoint(
    on_disk: bool, count: int, fraction: float, n_held_out: int
) -> None:
    records: Any = [{"text": str(index)} for index in range(count)]
    if on_disk:
        records = datasets.Dataset.from_list(records)
    data = RawDataset(records, ("text",), "test")
    kept, held_out = (list(part.texts()) for part in hold_out(data, fraction))
    assert len(held_out) == n_held_out
    assert sorted(kept + held_out) == sorted(data.texts())
    assert held_out == list(hold_out(data, fraction)[1].texts())


def test_few_documents_still_give_one_to_hold_out() -> None:
    data = RawDataset([{"text": "a"}, {"text": "b"}], ("text",), "test")
    kept, held_out = hold_out(data, 0.05)
    assert (list(kept.texts()), list(held_out.texts())) == (["a"], ["b"])


def test_the_end_of_a_single_document_is_held_out() -> None:
    data = RawDataset([{"code": "0123456789"}], ("code",), "test")
    kept, held_out = hold_out(data, 0.2)
    assert (list(kept.texts()), list(held_out.texts())) == (["01234567"], ["89"])


def test_what_cannot_be_held_out_is_refused() -> None:
    pair = RawDataset([PAIRS[0]], ("prompt", "completion"), "sums.jsonl")
    with pytest.raises(ValueError, match=r"sums\.jsonl has 1 row\(s\), too few"):
        hold_out(pair, 0.1)
    with pytest.raises(ValueError, match="fraction=0 must be above 0"):
        hold_out(pair, 0)


# ---- Text into rows ---------------------------------------------------------------------------


def test_documents_are_cut_into_rows_and_end_with_eos() -> None:
    documents = ["def f(x):\n    return x + 1\n", "import os"]
    streams = [[*ids_of(text), EOS] for text in documents]
    rows = tokenize_and_cut(documents, TOKENIZER, sequence_len=7, min_length=1)
    expected = [ids[start : start + 7] for ids in streams for start in range(0, len(ids), 7)]
    assert input_ids(rows) == expected
    assert [sum(s == (i,) for s in rows.sources) for i in (0, 1)] == [
        -(-len(stream) // 7) for stream in streams
    ]
    assert rows[0].keys() == {"input_ids"}
    assert rows[0]["input_ids"].dtype == torch.long


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    sequence_len=st.integers(4, 16),
    min_length=st.integers(1, 4),
    pack=st.booleans(),
    keep_short=st.booleans(),
)
def test_no_token_is_lost_uncounted(
    lengths: list[int], sequence_len: int, min_length: int, pack: bool, keep_short: bool
) -> None:
    """Every token is in a row exactly once, or counted as dropped."""
    documents = ["\n" * length for length in lengths]
    n_tokens = sum(len(ids_of(text)) + 1 for text in documents if text)
    settings_ = {"sequence_len": sequence_len, "min_length": min_length}
    try:
        rows = tokenize_and_cut(documents, TOKENIZER, **settings_, pack=pack, keep_short=keep_short)
    except ValueError as error:
        assert "No row of text is left" in str(error)
        return
    counts = rows.counts
    assert counts.documents == len(documents)
    assert counts.empty == lengths.count(0)
    assert counts.tokens == sum(map(len, input_ids(rows)))
    assert counts.tokens + (0 if keep_short else counts.short_tokens) == n_tokens
    assert all(len(ids) <= sequence_len for ids in input_ids(rows))
    pieces = [
        piece
        for index, ids in enumerate(input_ids(rows))
        for piece in split_at(ids, rows[index].get("document_ids"))
    ]
    assert sum(len(piece) < min_length for piece in pieces) == (counts.short if keep_short else 0)
    assert len(pieces) == sum(map(len, rows.sources))
    # Per source, the pieces make up the document again where none was dropped.
    if keep_short and not pack:
        for source, text in enumerate(documents):
            own = zip(input_ids(rows), rows.sources, strict=True)
            joined = [token for ids, sources in own if sources == (source,) for token in ids]
            assert joined == ([*ids_of(text), EOS] if text else [])


def split_at(ids: list[int], document_ids: torch.Tensor | None) -> list[list[int]]:
    """The documents of a row."""
    marks = [0] * len(ids) if document_ids is None else document_ids.tolist()
    return [
        [token for token, mark in zip(ids, marks, strict=True) if mark == document]
        for document in sorted(set(marks))
    ]


def test_packing_fills_rows_and_keeps_documents_apart() -> None:
    documents = ["a b c d", "import os", "x", "def f(): return 1", "y = 2"]
    streams = [[*ids_of(text), EOS] for text in documents]
    rows = tokenize_and_cut(documents, TOKENIZER, sequence_len=32, min_length=2, pack=True)
    assert len(rows) < len(documents)
    batch = EBFTDataCollator(TOKENIZER)([rows[index] for index in range(len(rows))])
    read = Documents.from_inputs(batch)
    for row, sources in enumerate(rows.sources):
        for slot, source in enumerate(sources):
            own = read.document[row] == slot
            assert read.input_ids[row][own].tolist() == streams[source]
            assert read.position[row][own].tolist() == list(range(len(streams[source])))
    assert sorted(source for sources in rows.sources for source in sources) == list(range(5))


def test_a_piece_goes_to_the_fullest_row_that_has_room() -> None:
    # Tokens with EOS: 7, 5, 3, 5, and rows of 10: 7 + 3 and 5 + 5.
    documents = ["\n" * (length - 1) for length in (7, 5, 3, 5)]
    assert [len(ids_of(text)) for text in documents] == [6, 4, 2, 4]
    rows = tokenize_and_cut(documents, TOKENIZER, sequence_len=10, min_length=1, pack=True)
    assert rows.sources == [(0, 2), (1, 3)]


def test_short_pieces_are_counted() -> None:
    documents = ["\n" * 9, "\n" * 2]  # with EOS 10 and 3 tokens
    rows = tokenize_and_cut(documents, TOKENIZER, sequence_len=6, min_length=5)
    assert [len(ids) for ids in input_ids(rows)] == [6]
    assert (rows.counts.cut, rows.counts.short, rows.counts.short_tokens) == (1, 2, 7)
    assert "2 pieces too short for a block dropped (7 tokens)" in str(rows.counts)
    kept = tokenize_and_cut(documents, TOKENIZER, sequence_len=6, min_length=5, keep_short=True)
    assert [len(ids) for ids in input_ids(kept)] == [6, 4, 3]
    assert "2 pieces too short for a block kept" in str(kept.counts)


def with_bos(*specials: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts these special tokens around a text, as a template."""
    tokenizer = tiny_tokenizer(bos_token="<bos>", eos_token="<eos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(specials),
        special_tokens=[
            (token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")
        ],
    )
    return tokenizer


@pytest.mark.parametrize("specials", [("<bos>", "$A"), ("<bos>", "$A", "<eos>")])
def test_every_row_begins_with_bos_where_the_tokenizer_adds_it(specials: tuple[str, ...]) -> None:
    tokenizer = with_bos(*specials)
    rows = tokenize_and_cut(["\n" * 7], tokenizer, sequence_len=5, min_length=1)
    newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert input_ids(rows) == [[bos, *[newline] * 4], [bos, *[newline] * 3, eos]]


def test_no_bos_is_added_where_the_tokenizer_adds_none() -> None:
    tokenizer = with_bos("$A", "<eos>")
    rows = tokenize_and_cut(["\n"], tokenizer, sequence_len=5, min_length=1)
    assert tokenizer.bos_token_id not in input_ids(rows)[0]
    assert input_ids(rows)[0].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("pack", [False, True])
def test_reading_stops_when_there_are_enough_rows(pack: bool) -> None:
    read = []

    def documents() -> Any:
        for index in range(10_000):
            read.append(index)
            yield "\n" * 9

    rows = tokenize_and_cut(
        documents(), TOKENIZER, sequence_len=10, min_length=4, pack=pack, max_rows=3
    )
    assert len(rows) == 3
    assert rows.counts.stopped_early and "stopped" in str(rows.counts)
    assert len(read) < 1000


def test_a_choice_of_rows_comes_from_many_sources() -> None:
    documents = ["\n" * 99, "\n" * 9, "\n" * 9, "\n" * 19]  # 10, 1, 1 and 2 rows
    rows = tokenize_and_cut(documents, TOKENIZER, sequence_len=10, min_length=4)
    assert len(rows) == 14
    assert {s for (s,) in rows.spread(4).sources} == {0, 1, 2, 3}
    sources = [s for (s,) in rows.spread(6).sources]
    assert sources == sorted(sources)
    assert [sources.count(s) for s in range(4)] == [2, 1, 1, 2]
    assert rows.spread(99).sources == rows.sources
    assert input_ids(rows.spread(99)) == input_ids(rows)
    assert rows.spread(4, seed=3).sources == rows.spread(4, seed=3).sources
    with pytest.raises(ValueError, match="count=0"):
        rows.spread(0)


@pytest.mark.parametrize(
    ("documents", "changed", "message"),
    [
        (["abc"], {"sequence_len": 4}, "sequence_len=4 is shorter than the 5 tokens"),
        (["abc"], {"max_rows": 0}, "max_rows=0 must be at least 1"),
        ([], {}, "No row of text is left .0 documents -> 0 rows"),
        (["", "\n"], {}, "1 pieces too short for a block dropped .2 tokens.; 1 empty documents"),
    ],
)
def test_text_that_gives_no_row_is_refused(
    documents: list[str], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_and_cut(documents, TOKENIZER, **({"sequence_len": 8, "min_length": 5} | changed))


# ---- Prompts with completions -----------------------------------------------------------------


def pair_rows(pairs: Sequence[tuple[str, str]], **changed: Any) -> TokenizedRows:
    settings_ = {"sequence_len": 24, "min_length": 2, "min_completion": 1} | changed
    return tokenize_prompt_completion(pairs, TOKENIZER, **settings_)


def test_only_the_completion_and_its_eos_are_labelled() -> None:
    rows = pair_rows([("2 + 2 =", " 4"), ("", "x = 1")])
    for row, (prompt, completion) in zip(
        (rows[0], rows[1]), [("2 + 2 =", " 4"), ("", "x = 1")], strict=True
    ):
        before, after = ids_of(prompt), [*ids_of(completion), EOS]
        assert row["input_ids"].tolist() == before + after
        assert row["labels"].tolist() == [-100] * len(before) + after
    assert rows.sources == [(0,), (1,)]


def test_long_completions_are_cut_and_counted() -> None:
    rows = pair_rows([("a", "\n" * 50), ("a", "b")], sequence_len=8)
    assert rows[0]["input_ids"].tolist() == [*ids_of("a"), *ids_of("\n") * 7]
    assert rows.counts.cut == 1
    assert EOS not in rows[0]["labels"]


def test_examples_without_room_for_a_completion_are_counted() -> None:
    pairs = [("\n" * 30, "b"), ("a", ""), ("a", "b")]
    rows = pair_rows(pairs, sequence_len=8)
    assert rows.sources == [(2,)]
    assert (rows.counts.short, rows.counts.short_tokens, rows.counts.empty) == (1, 8, 1)
    # Nothing is left to train on, so keeping short ones does not keep it.
    assert pair_rows(pairs, sequence_len=8, keep_short=True).sources == [(2,)]


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(0, 14),
    completion=st.integers(1, 14),
    context_length=st.integers(1, 6),
    min_completion_prefix=st.integers(0, 4),
    generate_max_len=st.integers(1, 5),
    sequence_len=st.integers(12, 20),
)
def test_an_example_is_kept_exactly_if_it_has_a_block(
    prompt: int,
    completion: int,
    context_length: int,
    min_completion_prefix: int,
    generate_max_len: int,
    sequence_len: int,
) -> None:
    pair = ("\n" * prompt, "\n" * completion)
    settings_ = {
        "sequence_len": sequence_len,
        "min_length": context_length + generate_max_len,
        "min_completion": min_completion_prefix + generate_max_len,
    }
    try:
        kept = pair_rows([pair], keep_short=True, **settings_)
    except ValueError:  # no token of the completion is left
        assert prompt >= sequence_len
        return
    documents = Documents.from_inputs(EBFTDataCollator(TOKENIZER)([kept[0]]))
    blocks = find_blocks(
        documents,
        stride=3,
        context_length=context_length,
        generate_max_len=generate_max_len,
        min_completion_prefix=min_completion_prefix,
    )
    assert bool(blocks.exists.any()) == (kept.counts.short == 0)


def test_the_prompt_begins_with_bos_where_the_tokenizer_adds_it() -> None:
    tokenizer = with_bos("<bos>", "$A")
    rows = tokenize_prompt_completion(
        [("\n", "\n")], tokenizer, sequence_len=8, min_length=1, min_completion=1
    )
    newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
    assert rows[0]["labels"].tolist() == [-100, -100, newline, tokenizer.eos_token_id]
    assert rows[0]["input_ids"][0] == tokenizer.bos_token_id


def test_enough_examples_are_enough() -> None:
    rows = pair_rows([("a", "b")] * 10, max_rows=4)
    assert len(rows) == 4 and rows.counts.stopped_early


def test_completions_need_an_end() -> None:
    with pytest.raises(ValueError, match="no EOS token"):
        tokenize_prompt_completion(
            [("a", "b")], tiny_tokenizer(), sequence_len=8, min_length=1, min_completion=1
        )
