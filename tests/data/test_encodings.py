"""What is wrong with a file that is no UTF-8: the byte, its place, and the way out."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_ebft.data import encodings
from hf_ebft.data.encodings import not_utf8, open_bytes, suffix_of


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.csv", ".csv"),
        ("A.CSV", ".csv"),
        ("a.b.json.gz", ".json"),
        ("a.TXT.GZ", ".txt"),
        ("a", ""),
        ("a.gz", ""),
    ],
)
def test_the_kind_of_a_file_is_behind_its_compression(name: str, suffix: str) -> None:
    assert suffix_of(Path(name)) == suffix


def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("grün".encode()))
    with open_bytes(tmp_path / "a.txt.gz") as stream:
        assert stream.read().decode() == "grün"
    assert not_utf8(tmp_path / "a.txt.gz") is None


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_the_advice_converts_the_file(suffix: str, tmp_path: Path) -> None:
    """The command of the message, as it stands, makes UTF-8 of it."""
    text = "first\nsecond: caf\u00e9\n"
    path = tmp_path / f"in latin 1{suffix}"
    data = text.encode("latin-1")
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    said = not_utf8(path)
    assert said is not None
    assert f"{path} is not UTF-8 text: byte 0xE9 at offset 17 (line 2)" in said
    assert "in Latin-1 it would be '\u00e9'" in said
    subprocess.run(said.partition("Convert it first: ")[2], shell=True, check=True)
    converted = tmp_path / "in latin 1.utf8.txt"
    assert converted.read_text(encoding="utf-8") == text
    assert not_utf8(converted) is None


def test_utf16_is_known_by_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("word".encode("utf-16"))
    assert "the file begins with the mark of UTF-16" in str(not_utf8(path))
    assert "iconv -f UTF-16 -t UTF-8" in str(not_utf8(path))


def test_a_file_that_is_not_compressed_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_text("plain")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    for name in ("a.txt.gz", "cut.txt.gz"):
        assert "cannot be uncompressed" in str(not_utf8(tmp_path / name))


@given(st.binary(max_size=40))
@example("aé\n漢".encode() + b"\xff")
@example("漢".encode()[:2])
@settings(max_examples=200, deadline=None)
def test_the_byte_is_the_one_that_python_names(data: bytes) -> None:
    """Whatever the pieces are that the file is read in."""
    import tempfile

    try:
        data.decode()
        expected = None
    except UnicodeDecodeError as error:
        line = 1 + data[: error.start].count(b"\n")
        expected = f"byte 0x{data[error.start]:02X} at offset {error.start} (line {line})"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, "a.txt")
        path.write_bytes(data)
        for size in (1, 3, 1 << 20):
            patch.setattr(encodings, "_CHUNK", size)
            found = not_utf8(path)
            assert (found is None) == (expected is None)
            assert expected is None or (found is not None and expected in found)
