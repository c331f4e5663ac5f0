"""Files as people have them: what is in a file is what is trained on, whatever its format."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from hf_ebft.data import load_table, load_text_dataset

datasets = pytest.importorskip("datasets")

TEXTS = (
    "plain",
    "two\nlines",
    'with "quotes", and, commas',
    "a\ttab",
    "4",
    "NA",
    "null",
    "007",
    "1e5",
    "true",
    " spaces around ",
    "grün 漢字",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, texts: Sequence[str], column: str = "text") -> str:
    """A table with the texts and a number for each, in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as stream:
        if kind in ("csv", "tsv"):
            rows = csv.writer(stream, delimiter="," if kind == "csv" else "\t")
            rows.writerows([("n", column), *enumerate(texts)])
        elif kind == "json":
            json.dump([{"n": n, column: text} for n, text in enumerate(texts)], stream)
        else:
            for n, text in enumerate(texts):
                stream.write(json.dumps({"n": n, column: text}, ensure_ascii=False) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "name",
    [f"a.{kind}{gz}" for kind in ("csv", "tsv", "json", "jsonl", "ndjson") for gz in ("", ".gz")],
)
def test_every_format_gives_back_the_texts(name: str, tmp_path: Path) -> None:
    data = load_text_dataset(write(tmp_path / name, TEXTS))
    assert list(data.texts()) == list(TEXTS)
    assert load_table(str(tmp_path / name)).columns == ("n", "text")


def test_capitals_in_a_name_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path / "A.csv", TEXTS)
    (tmp_path / "A.csv").rename(tmp_path / "A.CSV")
    assert list(load_text_dataset(str(tmp_path / "A.CSV")).texts()) == list(TEXTS)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.ndjson"])
def test_a_mark_of_the_encoding_is_no_text(name: str, tmp_path: Path) -> None:
    """Excel writes one before the first column's name."""
    path = Path(write(tmp_path / name, TEXTS, column="text"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_table(str(path)).columns == ("n", "text")
    assert list(load_text_dataset(str(path)).texts()) == list(TEXTS)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_text_file(compressed: bool, tmp_path: Path) -> None:
    path = tmp_path / ("a.txt.gz" if compressed else "a.txt")
    data = "\ufeffone\r\ntwo ü\r\n".encode()
    path.write_bytes(gzip.compress(data) if compressed else data)
    assert list(load_text_dataset(str(path)).texts()) == ["one\ntwo ü\n"]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.json", "a.csv.gz"])
def test_another_encoding_is_named_with_its_byte(name: str, tmp_path: Path) -> None:
    data = 'n,text\n1,"caf\u00e9"\n'.encode("latin-1")
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(ValueError, match=r"byte 0xE9 at offset 13 \(line 2\).*iconv -f LATIN1"):
        load_text_dataset(str(path))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.json", "a.csv.gz"])
@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf\n"])
def test_a_file_of_nothing_is_empty(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=r"a\..* is empty"):
        load_text_dataset(str(path))


def test_a_table_of_a_header_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,text\n")
    with pytest.raises(ValueError, match=r"a\.csv could not be loaded .* no data"):
        load_text_dataset(str(tmp_path / "a.csv"))


def test_an_index_without_a_name_is_a_column_like_others(tmp_path: Path) -> None:
    """As pandas writes one by default."""
    (tmp_path / "a.csv").write_text(",text\n0,one\n")
    assert load_table(str(tmp_path / "a.csv")).columns == ("Unnamed: 0", "text")
    assert list(load_text_dataset(str(tmp_path / "a.csv")).texts()) == ["one"]


def test_a_name_that_two_columns_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\none,two\n")
    with pytest.raises(ValueError, match=r"first line of a\.csv has 'text' twice"):
        load_text_dataset(str(tmp_path / "a.csv"))


def test_a_row_with_too_many_cells_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,text\n1,one\n2,two,three\n")
    with pytest.raises(ValueError, match="Expected 2 fields in line 3, saw 3"):
        load_text_dataset(str(tmp_path / "a.csv"))


def test_a_broken_line_of_a_compressed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"te'))
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        load_text_dataset(str(path))


def test_a_folder_of_csv_has_the_splits_that_its_names_say(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.csv", TEXTS)
    write(tmp_path / "data" / "test.csv", ["4", "NA"])
    (tmp_path / "data" / "README.md").write_text("# About the data\n")
    assert list(load_text_dataset(str(tmp_path / "data")).texts()) == list(TEXTS)
    assert list(load_text_dataset(str(tmp_path / "data"), "test").texts()) == ["4", "NA"]
    write(tmp_path / "data" / "test.csv", ["4"], column="other")
    with pytest.raises(ValueError, match=r"the columns n, text.*give all files the same columns"):
        load_text_dataset(str(tmp_path / "data"))


def test_a_csv_beside_source_code_does_not_make_a_data_set(tmp_path: Path) -> None:
    write(tmp_path / "package" / "table.csv", TEXTS)
    (tmp_path / "package" / "code.py").write_text("x = 1")
    assert list(load_text_dataset(str(tmp_path / "package")).texts()) == ["x = 1"]


def test_files_that_are_left_out_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_text(" \n")
    with caplog.at_level(logging.WARNING):
        assert list(load_text_dataset(str(tmp_path)).texts()) == ["one"]
    assert "1 of 3 files" in caplog.text and "b.txt is not UTF-8 text: byte 0xE9" in caplog.text
    assert re.search(r"are empty and were left out. The first: .*c.txt", caplog.text)
