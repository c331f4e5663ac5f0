"""Raw text from where people keep it: text files, folders of them, tables, the hub.

Text files are read here; everything else through the `datasets` library, imported when needed.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ebft.data.encodings import COMPRESSED, not_utf8, open_bytes, read_text, suffix_of
from hf_ebft.data.unicode import fault_of, require_unicode

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "content", "code")
PAIR_COLUMNS = ("prompt", "completion")
TEXT_SUFFIXES = (".txt", ".md", ".py")
# Suffix of a data file -> name of the loader in `datasets`.
TABLE_SUFFIXES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
# All of these, and all of the text files, may be compressed: `.csv.gz`.
LISTED_SUFFIXES = ", ".join((*TEXT_SUFFIXES, *TABLE_SUFFIXES)) + f" (also with {COMPRESSED})"
# What makes a folder a data set. Folders of source code often hold a .json or a .md as well; a .csv
# makes one only where there is no such code.
FOLDER_TABLE_SUFFIXES = (*JSON_LINES, ".parquet")
FOLDER_SUFFIXES = (*FOLDER_TABLE_SUFFIXES, *SEPARATORS)
# The one split of what has no splits of its own; also the name that `datasets` gives it.
ONLY_SPLIT = "train"


@dataclass(frozen=True)
class RawDataset:
    """Documents, or prompts with completions, before tokenization.

    Attributes:
        records: the rows, in any indexable container (a list, a `datasets.Dataset`).
        columns: `(text column,)`, or those of a prompt, its completion and what belongs to them.
        name: where it comes from, for messages.
    """

    records: Sequence[Mapping[str, Any]]
    columns: tuple[str, ...]
    name: str

    @property
    def has_prompts(self) -> bool:
        """Whether rows are prompts with completions instead of documents."""
        return len(self.columns) > 1

    def __len__(self) -> int:
        return len(self.records)

    def texts(self) -> Iterator[str]:
        """The documents; a missing value reads as an empty one."""
        (column,) = self.columns
        for index in range(len(self)):
            yield self._text(index, column)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The prompts with their completions; a missing value reads as an empty one."""
        prompt, completion = self.columns
        for index in range(len(self)):
            yield self._text(index, prompt), self._text(index, completion)

    def select(self, indices: Sequence[int]) -> RawDataset:
        """The rows at `indices`, in that order."""
        if hasattr(self.records, "select"):  # a datasets.Dataset, which then stays on disk
            return RawDataset(self.records.select(indices), self.columns, self.name)
        return RawDataset([self.records[index] for index in indices], self.columns, self.name)

    def _text(self, index: int, column: str) -> str:
        value = self.records[index][column]
        if value is None:
            return ""
        if not isinstance(value, str):
            raise ValueError(
                f"Column {column!r} of {self.name} holds a {type(value).__name__} in row {index}, "
                "not text; choose another column, or turn it into text first."
            )
        return require_unicode(value, f"Column {column!r} of {self.name}, row {index},")


@dataclass(frozen=True)
class Table:
    """Rows with all their columns, before anybody has said what they are for.

    Attributes:
        records: the rows, in any indexable container (a list, a `datasets.Dataset`).
        columns: their names.
        name: where it comes from, for messages.
    """

    records: Any
    columns: tuple[str, ...]
    name: str

    def text(self, column: str | None = None) -> RawDataset:
        """The documents, or prompts with completions, as `find_columns` finds them.

        Raises:
            ValueError: there are none.
        """
        return self.take(find_columns(self.columns, column, self.name))

    def take(self, columns: tuple[str, ...]) -> RawDataset:
        """These columns and no others."""
        if hasattr(self.records, "select_columns"):  # a datasets.Dataset, which then stays on disk
            return RawDataset(self.records.select_columns(list(columns)), columns, self.name)
        records = [{column: record[column] for column in columns} for record in self.records]
        return RawDataset(records, columns, self.name)


def load_text_dataset(
    name_or_path: str,
    split: str = ONLY_SPLIT,
    *,
    config_name: str | None = None,
    column: str | None = None,
) -> RawDataset:
    """Load documents or prompt/completion pairs.

    Args:
        name_or_path: a `.txt`, `.md` or `.py` file (one document); a folder of such files, at
            any depth (a document each, sorted by path); a `.csv`, `.tsv`, `.jsonl`, `.ndjson`,
            `.json` or `.parquet` file; a folder of tables, or one that `Dataset.save_to_disk`
            wrote; or a dataset's name on the hub. Files may be compressed (`.csv.gz`).
        split: which split; `datasets` also takes slices such as `train[:10%]`. Text files have
            only `train`.
        config_name: configuration of a hub dataset that has several.
        column: the column with the text. By default `prompt` with `completion` if both are
            there, else the first of `text`, `content` and `code`.

    Raises:
        ValueError: no such data, split or column; nothing in it; or undecodable text.
        ImportError: the format needs `datasets`, which is not installed.
    """
    return load_table(name_or_path, split, config_name=config_name, column=column).text(column)


def load_table(
    name_or_path: str,
    split: str = ONLY_SPLIT,
    *,
    config_name: str | None = None,
    column: str | None = None,
) -> Table:
    """Load rows with all their columns; text files have one, `text`.

    Args:
        name_or_path: as for `load_text_dataset`.
        split: likewise.
        config_name: likewise.
        column: a column that has to be there.

    Raises:
        ValueError: no such data, split or column; nothing in it; or undecodable text.
        ImportError: the format needs `datasets`, which is not installed.
    """
    path = Path(name_or_path).expanduser()
    text_files = _text_files(path)
    if text_files:
        if split != ONLY_SPLIT or column not in (None, TEXT_COLUMNS[0]):
            raise ValueError(
                f"{name_or_path} holds text files, which have one split, 'train', and one column, "
                f"'text'; there is no split={split!r} with column={column!r}. Name another file or "
                "folder for other data."
            )
        records: Any = _read_text_files(text_files, str(path))
        columns: tuple[str, ...] = (TEXT_COLUMNS[0],)
    else:
        records = _load_table(name_or_path, path, split, config_name)
        columns = tuple(records.column_names)
    if column is not None and column not in columns:
        raise ValueError(_no_column(name_or_path, column, columns))
    if len(records) == 0:
        raise ValueError(
            f"{name_or_path} (split {split!r}) is empty: there is no text to sample prefixes from. "
            "Check the path and the split."
        )
    return Table(records, columns, name_or_path)


def open_stream(
    name_or_path: str,
    split: str = ONLY_SPLIT,
    *,
    config_name: str | None = None,
    column: str | None = None,
) -> Table:
    """Rows that are read one after the other when they are wanted, from the hub or a table.

    Args:
        name_or_path: as for `load_text_dataset`, but no text file and no saved data set.
        split: which one; a stream has no slices.
        config_name: configuration of a hub dataset that has several.
        column: a column that has to be there.

    Returns:
        A table whose `records` are a `datasets.IterableDataset`.

    Raises:
        ValueError: no such data, split or column; nothing in it; or data that is no stream.
        ImportError: `datasets` is not installed.
    """
    path = Path(name_or_path).expanduser()
    if _text_files(path) or (path.is_dir() and _is_saved_dataset(path)):
        raise ValueError(
            f"{name_or_path} is read as a whole, so it cannot be streamed; leave streaming out."
        )
    if "[" in split:
        raise ValueError(
            f"split={split!r} is a slice, and a stream has no end to count from; name a whole "
            "split, and say by max_steps how much of it is read."
        )
    records = _load_table(name_or_path, path, split, config_name, streaming=True)
    first = next(iter(records), None)
    if first is None:
        raise ValueError(f"{name_or_path} (split {split!r}) is empty: there is nothing to stream.")
    if column is not None and column not in first:
        raise ValueError(_no_column(name_or_path, column, list(first)))
    return Table(records, tuple(first), name_or_path)


def _no_column(name: str, column: str, available: Sequence[str]) -> str:
    return f"{name} has no column {column!r}; it has {', '.join(map(repr, available))}."


def find_columns(available: Sequence[str], column: str | None, name: str) -> tuple[str, ...]:
    """The columns that hold the text: `column` if given, else pairs, else a usual name.

    Raises:
        ValueError: there are none.
    """
    listed = ", ".join(map(repr, available))
    if column is not None:
        if column not in available:
            raise ValueError(_no_column(name, column, available))
        return (column,)
    if set(PAIR_COLUMNS) <= set(available):
        return PAIR_COLUMNS
    for candidate in TEXT_COLUMNS:
        if candidate in available:
            return (candidate,)
    if "messages" in available:
        raise ValueError(
            f"{name} holds chats ('messages'), which are not read directly. Turn them into prompts "
            "and ground truths with hf_ebft.data.chat, into 'prompt' and 'completion' columns with "
            "tokenizer.apply_chat_template, or name a text column."
        )
    raise ValueError(
        f"{name} has neither a text column ({', '.join(TEXT_COLUMNS)}) nor both of "
        f"{' and '.join(PAIR_COLUMNS)}; it has {listed}. Name the column that holds the "
        "text (text_column)."
    )


def hold_out(data: RawDataset, fraction: float) -> tuple[RawDataset, RawDataset]:
    """Split off a share of the documents for evaluation, the same one every time.

    Every k-th document is held out, k = 1 / fraction, so both parts run through the whole dataset.
    Of a single document the end is held out.

    Args:
        data: at least one document, or two pairs.
        fraction: share to hold out, above 0 and at most one half.

    Returns:
        What remains, and what is held out.

    Raises:
        ValueError: a fraction out of range, or too little data to split.
    """
    if not 0.0 < fraction <= 0.5:
        raise ValueError(f"fraction={fraction} must be above 0 and at most 0.5 to hold out text.")
    if len(data) == 1 and not data.has_prompts:
        (text,) = data.texts()
        end = len(text) - max(1, round(len(text) * fraction))
        (column,) = data.columns
        return (
            RawDataset([{column: text[:end]}], data.columns, data.name),
            RawDataset([{column: text[end:]}], data.columns, data.name),
        )
    if len(data) < 2:
        raise ValueError(
            f"{data.name} has {len(data)} row(s), too few to hold one out for evaluation; name a "
            "dataset or split to evaluate on, or do without."
        )
    step = min(round(1 / fraction), len(data))
    held_out = range(step - 1, len(data), step)
    kept = [index for index in range(len(data)) if index not in held_out]
    return data.select(kept), data.select(held_out)


def _text_files(path: Path) -> list[Path]:
    """The text files at `path`, sorted; none if it is something else."""
    if path.is_file():
        return [path] if suffix_of(path) in TEXT_SUFFIXES else []
    if not path.is_dir() or _is_saved_dataset(path):
        return []
    files = _files(path)
    text_files, tables = _with_suffix(files, TEXT_SUFFIXES), _tables(files)
    if not tables:
        return text_files
    documents = _documents(text_files)
    if documents:
        raise ValueError(
            f"The folder {path} holds text files ({documents[0].name}, ...) and tables "
            f"({tables[0].name}, ...); name a file, or a folder with one kind of them."
        )
    return []


def _files(folder: Path) -> list[Path]:
    """All files below `folder`, sorted, but for hidden files and folders."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        found += [Path(parent) / name for name in names if not name.startswith(".")]
    return sorted(found)


def _with_suffix(files: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    return [file for file in files if suffix_of(file) in suffixes]


def _tables(files: Sequence[Path]) -> list[Path]:
    """Of the files of a folder, the tables that make it a data set, if there are any."""
    beside_code = _documents(_with_suffix(files, TEXT_SUFFIXES))
    return _with_suffix(files, FOLDER_TABLE_SUFFIXES if beside_code else FOLDER_SUFFIXES)


def _documents(text_files: Sequence[Path]) -> list[Path]:
    """Text files that are more than a README."""
    return [file for file in text_files if suffix_of(file) != ".md"]


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def _read_text_files(files: Sequence[Path], name: str) -> list[dict[str, str]]:
    records, undecodable, blank = [], [], []
    for file in files:
        try:
            text = read_text(file)
        except ValueError as error:
            undecodable.append(str(error))
            continue
        # As Python reads text files.
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if text.strip():
            records.append({TEXT_COLUMNS[0]: text})
        else:
            blank.append(file)
    if undecodable and not records:
        raise ValueError(undecodable[0])
    if not records:
        raise ValueError(f"{blank[0]} is empty: there is no text in it.")
    if undecodable:
        logger.warning(
            "%d of %d files of %s are not UTF-8 text and were left out. The first: %s",
            len(undecodable),
            len(files),
            name,
            undecodable[0],
        )
    if blank:
        logger.warning(
            "%d of %d files of %s are empty and were left out, %s first.",
            len(blank),
            len(files),
            name,
            blank[0],
        )
    return records


def _load_table(
    name_or_path: str, path: Path, split: str, config_name: str | None, *, streaming: bool = False
) -> Any:
    """A `datasets.Dataset`, or `IterableDataset`, from a data file, a folder or the hub."""
    tables = _readable_tables(name_or_path, path)
    datasets = import_datasets(name_or_path)
    try:
        if path.is_file():
            return datasets.load_dataset(
                TABLE_SUFFIXES[suffix_of(path)],
                data_files={ONLY_SPLIT: str(path)},
                split=split,
                streaming=streaming,
                **_csv_options(tables, datasets),
            )
        if path.is_dir() and _is_saved_dataset(path):
            saved = datasets.load_from_disk(str(path))
            return saved[split] if isinstance(saved, dict) else saved
        if path.is_dir():
            options = {"streaming": streaming, **_csv_options(tables, datasets)}
            return datasets.load_dataset(str(path), config_name, split=split, **options)
        return datasets.load_dataset(name_or_path, config_name, split=split, streaming=streaming)
    except (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{name_or_path} could not be loaded with split={split!r} and configuration "
            f"{config_name!r}: {_json_fault(path) or error.__cause__ or error}"
        ) from error


def _readable_tables(name_or_path: str, path: Path) -> list[Path]:
    """The files of a data set that lies here as tables; none of a saved one and of the hub's.

    Raises:
        ValueError: files and folders that are not there, of no known kind, empty, or not UTF-8,
            with what to name instead.
    """
    suffix = suffix_of(path)
    looks_local = name_or_path.startswith((".", "/", "~")) or suffix in (
        *TEXT_SUFFIXES,
        *TABLE_SUFFIXES,
    )
    if not path.exists() and looks_local:
        raise ValueError(f"There is no file or folder {name_or_path}.")
    if path.is_file() and suffix not in TABLE_SUFFIXES:
        raise ValueError(
            f"{name_or_path} ends in {path.suffix!r}, which is not read; use one of "
            f"{LISTED_SUFFIXES}, or a dataset's name on the hub."
        )
    if path.is_file() and _is_blank(path):
        raise ValueError(f"{name_or_path} is empty.")
    tables = [path] if path.is_file() else []
    if path.is_dir() and not _is_saved_dataset(path):
        tables = _tables(_files(path))
        if not tables:
            raise ValueError(
                f"The folder {name_or_path} holds no file that is read from folders; these are: "
                f"{', '.join((*TEXT_SUFFIXES, *FOLDER_SUFFIXES))}."
            )
    for table in tables:
        fault = None if suffix_of(table) == ".parquet" else not_utf8(table)
        if fault is not None:
            raise ValueError(fault)
    return tables


def _csv_options(tables: Sequence[Path], datasets: Any) -> dict[str, Any]:
    """How tables of text are read, so that every cell stays the text that it is.

    pandas would make a number of `4` and a missing value of `NA` or `null`.

    Raises:
        ValueError: two of the files have other columns or another separator.
    """
    suffixes = {suffix_of(table) for table in tables}
    if not suffixes & SEPARATORS.keys():
        return {}
    if len(suffixes) > 1:
        raise ValueError(
            f"its files are of several kinds ({', '.join(sorted(suffixes))}); put each kind into a "
            "folder of its own."
        )
    separator = SEPARATORS[suffixes.pop()]
    columns = _header(tables[0], separator)
    for table in tables[1:]:
        if (found := _header(table, separator)) != columns:
            raise ValueError(
                f"{table.name} has the columns {', '.join(found)}, {tables[0].name} has "
                f"{', '.join(columns)}; give all files the same ones, or name one file."
            )
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    return {
        "sep": separator,
        "features": features,
        "keep_default_na": False,
        "encoding": "utf-8-sig",
    }


def _header(table: Path, separator: str) -> list[str]:
    """The names in the first line of a .csv or .tsv; one without a name is called as by pandas.

    Raises:
        ValueError: two columns have one name.
    """
    with open_bytes(table) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        names = next((row for row in csv.reader(lines, delimiter=separator) if row), [])
    names = [name or f"Unnamed: {place}" for place, name in enumerate(names)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the first line of {table.name} has {twice[0]!r} twice; rename one.")
    return names


def _is_blank(path: Path) -> bool:
    """Whether a file holds nothing but some space, or an empty list."""
    with open_bytes(path) as stream:
        start = stream.read(1024)
    return len(start) < 1024 and start.removeprefix(b"\xef\xbb\xbf").strip() in (b"", b"[]")


def _json_fault(path: Path) -> str | None:
    """The first line of a file of JSON lines that cannot be read, and why; None if all can."""
    if suffix_of(path) not in JSON_LINES or not path.is_file():
        return None
    with open_bytes(path) as stream:
        # Bytes: a text would also be split at characters that JSON may hold as they are (U+2028).
        for number, line in enumerate(stream, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                return f"line {number} is no JSON ({error})"
            # Surrogates are found in the text that they are escaped in, however deep they lie.
            fault = fault_of(json.dumps(record, ensure_ascii=False))
            if fault is not None:
                return f"line {number} {fault}"
    return None


def import_datasets(name: str) -> Any:
    """The library `datasets`.

    Args:
        name: what it is needed for.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Reading {name} needs the `datasets` library, which is not installed: "
            'pip install "hf_ebft[examples]". Text files and folders of text files need no extra.'
        ) from error
    return datasets
