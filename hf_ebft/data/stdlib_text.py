"""Text that comes with every Python: the source of the standard library, in fixed splits.

The small model in `examples/tiny_model` is trained on it (`examples/pretrain_tiny.py`), and
`hf-ebft demo` trains on it, so that nothing has to be downloaded. Each uses splits of its own,
which are defined only here.

A *domain* is a kind of text. It depends on the file's place in the library:

=============  ===============================================  ================================
domain         documents                                        splits (share of the names)
=============  ===============================================  ================================
`general`      every module that is in no other domain          pretrain 90, pretrain_eval 5,
                                                                demo_reserve 5 %
`topics`       the language reference as prose: the entries of  train 70, tune 10, report 20 %
               `pydoc_data/topics.py`, less those printed
               a second time within a longer one
`tests`        everything below a `test`, `tests` or            train 70, tune 10, report 20 %
               `idle_test` folder
`encodings`    the character tables in `encodings/`             train 70, tune 10, report 20 %
=============  ===============================================  ================================

The small model was trained on `general/pretrain` only and is measured on `pretrain_eval`; nothing
is trained on `demo_reserve`. In the other domains, `tune` is for choosing hyper-parameters and
`report` for published results.

The SHA-256 of a document's name decides its split. So the splits are disjoint, and a file has the
same split on every machine and with every Python version. The files themselves can differ: some
distributions leave out the `test` folders, for example.
"""

import ast
import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOPICS_FILE = "pydoc_data/topics.py"

#: For each domain, its splits with their shares of the hash range in percent.
SPLITS: dict[str, dict[str, int]] = {
    "general": {"pretrain": 90, "pretrain_eval": 5, "demo_reserve": 5},
    "topics": {"train": 70, "tune": 10, "report": 20},
    "tests": {"train": 70, "tune": 10, "report": 20},
    "encodings": {"train": 70, "tune": 10, "report": 20},
}

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# Folders that are not part of the standard library: installed packages, and compiled copies.
_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


class Document(NamedTuple):
    """One document.

    `name` is the file's path relative to the library, with forward slashes; the name of a topic is
    `pydoc_data/topics.py#<topic>`.
    """

    name: str
    text: str


class Corpus(NamedTuple):
    """Documents sorted by name, and the names of the files that could not be read or decoded."""

    documents: list[Document]
    skipped: list[str]


def stdlib_root() -> Path:
    """Folder of the running Python's standard library (in a venv, that of the base Python)."""
    return Path(sysconfig.get_paths()["stdlib"])


def file_names(root: Path) -> list[str]:
    """Relative names of the library's Python files, sorted; empty if `root` does not exist.

    Files that building Python has generated (`_sysconfigdata*`, `config-*`) are left out, since
    they differ from machine to machine.
    """
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _FOREIGN_FOLDERS and not name.startswith("config-")
        ]
        names += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in files
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(names)


def domain_of(name: str) -> str:
    """Domain of the file or topic called `name`."""
    folders = name.split("/")[:-1]
    if _TEST_FOLDERS.intersection(folders):
        return "tests"
    if folders[:1] == ["pydoc_data"]:
        return "topics"
    if folders[:1] == ["encodings"]:
        return "encodings"
    return "general"


def split_of(name: str) -> str:
    """Split, within its domain, of the document called `name`."""
    percentile = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    bound = 0
    for split, share in SPLITS[domain_of(name)].items():
        bound += share
        if percentile < bound:
            return split
    raise AssertionError("the shares of a domain's splits add up to 100")


def parse_topics(source: str) -> dict[str, str]:
    """The dictionary that `pydoc_data/topics.py` assigns to `topics`, without running it.

    Raises:
        ValueError: `source` contains no such literal.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"{TOPICS_FILE} does not parse as Python: {error}") from error
    for statement in statements:
        if isinstance(statement, ast.Assign):
            targets: list[ast.expr] = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        if not any(isinstance(target, ast.Name) and target.id == "topics" for target in targets):
            continue
        topics = ast.literal_eval(statement.value) if statement.value is not None else None
        if isinstance(topics, dict) and all(
            isinstance(part, str) for item in topics.items() for part in item
        ):
            return topics
    raise ValueError(f"{TOPICS_FILE} assigns no dictionary of strings to the name 'topics'")


def whole_topics(topics: dict[str, str]) -> dict[str, str]:
    """`topics` without those that are parts of others, so that no text is in two splits.

    Sections of the reference manual are nested ("while" is also printed within "compound"). A topic
    is left out if at least half of its text, by paragraphs, also occurs in longer topics.
    """
    whole: dict[str, str] = {}
    seen: set[str] = set()
    for topic in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        paragraphs = {" ".join(part.split()) for part in topics[topic].split("\n\n")}
        repeated = sum(len(part) for part in paragraphs & seen)
        if 2 * repeated < sum(len(part) for part in paragraphs):
            whole[topic] = topics[topic]
            seen |= paragraphs
    return whole


def documents_of_file(root: Path, name: str) -> Iterator[Document]:
    """The documents of one file: its text, or one for each topic; none if it is blank.

    The file is decoded as Python does it (by the coding cookie, else as UTF-8; every newline is
    read as `\\n`).

    Raises:
        OSError: the file cannot be read.
        SyntaxError: its encoding is unknown.
        ValueError: its bytes cannot be decoded, or it contains no topics.
    """
    with tokenize.open(root / name) as file:
        text = file.read()
    if name == TOPICS_FILE:
        for topic, body in whole_topics(parse_topics(text)).items():
            yield Document(f"{name}#{topic}", body)
    elif text.strip():
        yield Document(name, text)


def load(domain: str, split: str, root: Path | None = None) -> Corpus:
    """All documents of one split of one domain, sorted by name.

    Args:
        domain: a key of `SPLITS`.
        split: one of that domain's splits.
        root: the library's folder; `None` means the running Python's.

    Raises:
        ValueError: the domain or split is unknown, or this Python installation has no document of
            that kind.
    """
    if domain not in SPLITS:
        raise ValueError(f"domain {domain!r} does not exist: use one of {', '.join(SPLITS)}")
    if split not in SPLITS[domain]:
        raise ValueError(
            f"domain {domain!r} has no split {split!r}: use one of {', '.join(SPLITS[domain])}"
        )
    root = stdlib_root() if root is None else root
    documents: list[Document] = []
    skipped: list[str] = []
    for name in file_names(root):
        if domain_of(name) != domain:
            continue
        # The topics of one file are spread over the splits; any other file is in one split.
        if name != TOPICS_FILE and split_of(name) != split:
            continue
        try:
            documents += [
                document
                for document in documents_of_file(root, name)
                if split_of(document.name) == split
            ]
        except (OSError, SyntaxError, ValueError):
            skipped.append(name)
    if not documents:
        others = ", ".join(repr(other) for other in SPLITS if other != domain)
        raise ValueError(
            f"no text for domain {domain!r}, split {split!r}: the standard library in {root} "
            f"has no such files ({len(skipped)} could not be read). Some distributions leave "
            f"them out. Use another domain ({others}), a full Python installation "
            "(python.org, pyenv, or your distribution's packages with the test suite and the "
            "documentation), or a text file of your own."
        )
    return Corpus(sorted(documents), skipped)
