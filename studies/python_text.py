"""Several hundred megabytes of text that every machine with torch has: installed Python source.

The text is the standard library and the installed packages, one document per file. The package
`DOMAIN` is the special domain (computer algebra; torch depends on it, so it is always installed).
All other text is general. The SHA-256 of its name decides the split of a file, so splits are
disjoint and the same on every machine. A tokenizer is trained on the general text.

Dimension letters: R rows, S tokens of a row, F files.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

DOMAIN = "sympy"
EOS, PAD = "<|endoftext|>", "<|pad|>"
# Percent of the names; the rest is "train".
SHARES = {"tune": 5, "report": 5}
Split = Literal["train", "tune", "report"]
# Larger files are tables or generated code, smaller ones hold nothing.
SMALLEST, LARGEST = 500, 200_000
_LEFT_OUT = frozenset({"__pycache__", "hf_ebft"})


@dataclass(frozen=True)
class Source:
    """A file: `name` is relative to the folder that packages lie in, with forward slashes."""

    name: str
    path: Path

    @property
    def in_domain(self) -> bool:
        """Whether it is of the package `DOMAIN`."""
        return self.name.split("/")[0] == DOMAIN

    @property
    def split(self) -> Split:
        """Decided by the name alone."""
        percentile = int(_digest(self.name), 16) % 100
        if percentile < SHARES["tune"]:
            return "tune"
        return "report" if percentile < sum(SHARES.values()) else "train"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def roots() -> list[Path]:
    """The folders of the standard library and of installed packages; none inside of another."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[name]).resolve() for name in ("stdlib", "purelib")))


def find_sources(folders: Sequence[Path]) -> list[Source]:
    """All Python files below some folders, each once, in an order that is random but fixed.

    Raises:
        ValueError: no file of the domain.
    """
    found: dict[str, Source] = {}
    for root in folders:
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [
                name
                for name in subfolders
                if name not in _LEFT_OUT and Path(folder, name).resolve() not in folders
            ]
            for file in files:
                path = Path(folder, file)
                if file.endswith(".py") and SMALLEST <= path.stat().st_size <= LARGEST:
                    name = path.relative_to(root).as_posix()
                    found.setdefault(name, Source(name, path))
    sources = sorted(found.values(), key=lambda source: _digest(source.name))
    if not any(source.in_domain for source in sources):
        raise ValueError(
            f"No file of the package {DOMAIN} below {', '.join(map(str, folders))}: it is the text "
            "that the model is fine-tuned on. Install it, as torch does with its dependencies."
        )
    return sources


def read(sources: Sequence[Source], at_most: int) -> Iterator[tuple[Source, str]]:
    """Their text, until `at_most` characters are reached; what is not UTF-8 is left out."""
    total = 0
    for source in sources:
        try:
            text = source.path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        yield source, text
        total += len(text)
        if total >= at_most:
            return


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text encodes, and decodes to itself."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[EOS, PAD],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)


def _encoded(tokenizer: Any, texts: Sequence[str], at_once: int = 1000) -> Iterator[list[int]]:
    """Token ids of each text; a thousand at a time, whose encodings take memory."""
    for first in range(0, len(texts), at_once):
        some = list(texts[first : first + at_once])
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(some):
            yield encoding.ids


def packed_rows(tokenizer: Any, texts: Sequence[str], width: int) -> NDArray[np.uint16]:
    """(R, S): files one after the other, an EOS after each; the last, unfilled row is left out."""
    end = tokenizer.eos_token_id
    pieces = [np.array([*ids, end], dtype=np.uint16) for ids in _encoded(tokenizer, texts)]
    stream = np.concatenate(pieces)
    return stream[: len(stream) // width * width].reshape(-1, width)


def cut_rows(
    tokenizer: Any, texts: Sequence[str], width: int
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """(R, S), each row from one file, and (R,), which one; what is left of a file is left out."""
    rows, files = [], []
    for file, found in enumerate(_encoded(tokenizer, texts)):
        ids = np.array(found, dtype=np.uint16)
        whole = ids[: len(ids) // width * width].reshape(-1, width)
        rows.append(whole)
        files += [file] * len(whole)
    return np.concatenate(rows), np.array(files, dtype=np.int64)


def spread(files: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Indices of at most `count` of the rows, from as many files as possible, in order."""
    order = np.random.default_rng(0).permutation(len(files))
    rank = np.zeros(len(files), dtype=np.int64)
    taken: dict[int, int] = {}
    for row in order.tolist():
        file = int(files[row])
        rank[row] = taken.get(file, 0)
        taken[file] = rank[row] + 1
    by_rank = order[np.argsort(rank[order], kind="stable")]
    return np.sort(by_rank[:count])
