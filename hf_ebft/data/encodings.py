"""Reads bytes of files, compressed or not, and describes files that are not UTF-8."""

from __future__ import annotations

import codecs
import gzip
import shlex
from pathlib import Path
from typing import BinaryIO, cast

COMPRESSED = ".gz"
_CHUNK = 1 << 20
# Byte-order marks that editors write at the start of files in other encodings.
_MARKS = ((codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))


def suffix_of(path: Path) -> str:
    """The suffix without compression: `.csv` for `data.csv`, `data.csv.gz` and `DATA.CSV`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == COMPRESSED else suffix


def open_bytes(path: Path) -> BinaryIO:
    """The file's bytes, uncompressed."""
    if path.suffix.lower() == COMPRESSED:
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def read_text(path: Path) -> str:
    """Read a whole file as text, without a byte-order mark at its start.

    Raises:
        ValueError: the file is not UTF-8; the message is that of `not_utf8`.
    """
    try:
        with open_bytes(path) as stream:
            return stream.read().decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(not_utf8(path)) from error


def not_utf8(path: Path) -> str | None:
    """An error message for a file that is not UTF-8; None if it is.

    The message names the file, the byte and its place, and how to convert the file.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, newlines = 0, 0
    try:
        with open_bytes(path) as stream:
            while True:
                chunk = stream.read(_CHUNK)
                pending = decoder.getstate()[0]  # first bytes of a character that two chunks share
                try:
                    decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    line = 1 + newlines + (pending + chunk)[: error.start].count(b"\n")
                    bad = (pending + chunk)[error.start]
                    return _not_utf8_message(path, bad, read - len(pending) + error.start, line)
                if not chunk:
                    return None
                read += len(chunk)
                newlines += chunk.count(b"\n")
    except (gzip.BadGzipFile, EOFError) as error:
        return (
            f"{path} ends in {COMPRESSED} but cannot be uncompressed: {error}. Compress it again "
            "with gzip, or rename it."
        )


def _not_utf8_message(path: Path, byte: int, offset: int, line: int) -> str:
    with open_bytes(path) as stream:
        start = stream.read(2)
    utf16 = next((name for mark, name in _MARKS if start == mark), None)
    encoding = utf16 or "LATIN1"
    plain = path.with_suffix("") if path.suffix.lower() == COMPRESSED else path
    target = plain.with_name(f"{plain.stem}.utf8{plain.suffix}")
    named, written = shlex.quote(str(path)), shlex.quote(str(target))
    convert = f"iconv -f {encoding} -t UTF-8"
    command = f"gunzip -c {named} | {convert}" if plain != path else f"{convert} {named}"
    guess = (
        f"the file begins with the mark of {utf16}"
        if utf16
        else f"in Latin-1 it would be {bytes([byte]).decode('latin-1')!r}"
    )
    return (
        f"{path} is not UTF-8 text: byte 0x{byte:02X} at offset {offset} (line {line}) is not part "
        f"of a character; {guess}. Convert it first: {command} > {written}"
    )
