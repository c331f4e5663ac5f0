"""Reads raw text from text files, folders of them, tables and the hub.

Text files are read here; everything else with the `datasets` library, which is imported when it is
needed.
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
# Files that make a folder a data set of tables. Folders of source code often contain a .json or .md
# file, so these do not count; a .csv counts only if the folder has no source code.
FOLDER_TABLE_SUFFIXES = (*JSON_LINES, ".parquet")
FOLDER_SUFFIXES = (*FOLDER_TABLE_SUFFIXES, *SEPARATORS)
# The split of data without splits of its own; `datasets` calls it so, too.
ONLY_SPLIT = "train"


@dataclass(frozen=True)
class RawDataset:
    """Documents, or prompts with completions, before tokenization.

    Attributes:
        records: the rows, in any indexable container (a list, a `datasets.Dataset`).
        columns: `(text column,)`, or the columns of prompts, completions and further values.
        name: source of the data, for messages.
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
        """The documents; a missing value is read as an empty text."""
        (column,) = self.columns
        for index in range(len(self)):
            yield self._text(index, column)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The prompts with their completions; a missing value is read as an empty text."""
        prompt, completion = self.columns
        for index in range(len(self)):
            yield self._text(index, prompt), self._text(index, completion)

    def select(self, indices: Sequence[int]) -> RawDataset:
        """The rows at `indices`, in that order."""
        if hasattr(self.records, "select"):  # a datasets.Dataset, whose rows stay on disk
            return RawDataset(self.records.select(indices), self.columns, self.name)
        return RawDataset([self.records[index] for index in indices], self.columns, self.name)

    def _text(self, index: int, column: str) -> str:
        value = self.records[index][column]
        if value is None:
            return ""
        if not isinstance(value, str):
            raise ValueError(
                f"Column {column!r} of {self.name} contains a {type(value).__name__} in row "
                f"{index}, not text; choose another column, or convert its values to text first."
            )
        return require_unicode(value, f"Column {column!r} of {self.name}, row {index},")


@dataclass(frozen=True)
class Table:
    """Rows with all their columns, before the columns to train on are chosen.

    Attributes:
        records: the rows, in any indexable container (a list, a `datasets.Dataset`).
        columns: the names of the columns.
        name: source of the data, for messages.
    """

    records: Any
    columns: tuple[str, ...]
    name: str

    def text(self, column: str | None = None) -> RawDataset:
        """The documents, or prompts with completions, in the columns that `find_columns` finds.

        Raises:
            ValueError: there are no such columns.
        """
        return self.take(find_columns(self.columns, column, self.name))

    def take(self, columns: tuple[str, ...]) -> RawDataset:
        """The rows with these columns only."""
        if hasattr(self.records, "select_columns"):  # a datasets.Dataset, whose rows stay on disk
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
            any depth (one document per file, sorted by path); a `.csv`, `.tsv`, `.jsonl`,
            `.ndjson`, `.json` or `.parquet` file; a folder of tables, or one that
            `Dataset.save_to_disk` wrote; or a dataset's name on the hub. Files may be compressed
            (`.csv.gz`).
        split: the split; `datasets` also takes slices such as `train[:10%]`. Text files have only
            `train`.
        config_name: configuration of a hub dataset that has several.
        column: the column with the text. By default `prompt` and `completion` if both exist, else
            the first of `text`, `content` and `code`.

    Raises:
        ValueError: the data, the split or the column does not exist, the data is empty, or a text
            cannot be decoded.
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
        name_or_path, split, config_name: as for `load_text_dataset`.
        column: a column that must exist.

    Raises:
        ValueError: the data, the split or the column does not exist, the data is empty, or a text
            cannot be decoded.
        ImportError: the format needs `datasets`, which is not installed.
    """
    path = Path(name_or_path).expanduser()
    text_files = _text_files(path)
    if text_files:
        if split != ONLY_SPLIT or column not in (None, TEXT_COLUMNS[0]):
            raise ValueError(
                f"split={split!r} with column={column!r} does not exist in {name_or_path}: text "
                "files have one split, 'train', and one column, 'text'. Name another file or "
                "folder for other data."
            )
        records: Any = _read_text_files(text_files, str(path))
        columns: tuple[str, ...] = (TEXT_COLUMNS[0],)
    else:
        records = _load_table(name_or_path, path, split, config_name)
        columns = tuple(records.column_names)
    if column is not None and column not in columns:
        raise ValueError(_missing_column_message(name_or_path, column, columns))
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
    """Open rows from the hub or a table that are read one after the other when they are needed.

    Args:
        name_or_path: as for `load_text_dataset`, but not a text file or a saved data set.
        split: the split; a stream has no slices.
        config_name: configuration of a hub dataset that has several.
        column: a column that must exist.

    Returns:
        A table whose `records` are a `datasets.IterableDataset`.

    Raises:
        ValueError: the data, the split or the column does not exist, the data is empty, or it
            cannot be streamed.
        ImportError: `datasets` is not installed.
    """
    path = Path(name_or_path).expanduser()
    if _text_files(path) or (path.is_dir() and _is_saved_dataset(path)):
        raise ValueError(
            f"{name_or_path} is a text file or a saved data set, which is read as a whole, so it "
            "cannot be streamed; leave streaming out."
        )
    if "[" in split:
        raise ValueError(
            f"split={split!r} is a slice, but the length of a stream is unknown; name a whole "
            "split. max_steps limits how much of it is read."
        )
    records = _load_table(name_or_path, path, split, config_name, streaming=True)
    first = next(iter(records), None)
    if first is None:
        raise ValueError(
            f"{name_or_path} (split {split!r}) is empty: there is nothing to stream. Check the "
            "path and the split."
        )
    if column is not None and column not in first:
        raise ValueError(_missing_column_message(name_or_path, column, list(first)))
    return Table(records, tuple(first), name_or_path)


def _missing_column_message(name: str, column: str, available: Sequence[str]) -> str:
    return f"{name} has no column {column!r}; it has {', '.join(map(repr, available))}."


def find_columns(available: Sequence[str], column: str | None, name: str) -> tuple[str, ...]:
    """The columns with the text: `column` if given, else `prompt` and `completion`, else `text`...

    Raises:
        ValueError: there are no such columns.
    """
    listed = ", ".join(map(repr, available))
    if column is not None:
        if column not in available:
            raise ValueError(_missing_column_message(name, column, available))
        return (column,)
    if set(PAIR_COLUMNS) <= set(available):
        return PAIR_COLUMNS
    for candidate in TEXT_COLUMNS:
        if candidate in available:
            return (candidate,)
    if "messages" in available:
        raise ValueError(
            f"{name} contains chats ('messages'), which are not read directly. Convert them to "
            "prompts and ground truths with hf_ebft.data.chat, or to 'prompt' and 'completion' "
            "columns with tokenizer.apply_chat_template, or name a text column."
        )
    raise ValueError(
        f"{name} has neither a text column ({', '.join(TEXT_COLUMNS)}) nor both of "
        f"{' and '.join(PAIR_COLUMNS)}; it has {listed}. Name the column with the text "
        "(text_column)."
    )


def hold_out(data: RawDataset, fraction: float) -> tuple[RawDataset, RawDataset]:
    """Split off a share of the documents for evaluation; it is the same in every run.

    Every k-th document is held out, k = 1 / fraction, so both parts cover the whole dataset. Of a
    single document, the end is held out.

    Args:
        data: at least one document, or two pairs.
        fraction: share to hold out, above 0 and at most one half.

    Returns:
        The remaining data, and the held-out data.

    Raises:
        ValueError: the fraction is out of range, or there is too little data to split.
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
            "dataset or split to evaluate on, or do not evaluate."
        )
    step = min(round(1 / fraction), len(data))
    held_out = range(step - 1, len(data), step)
    kept = [index for index in range(len(data)) if index not in held_out]
    return data.select(kept), data.select(held_out)


def _text_files(path: Path) -> list[Path]:
    """The text files at `path`, sorted; none if `path` is another kind of data."""
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
            f"The folder {path} contains text files ({documents[0].name}, ...) and tables "
            f"({tables[0].name}, ...), so it is unclear which to read; name a file, or a folder "
            "with one kind only."
        )
    return []


def _files(folder: Path) -> list[Path]:
    """All files below `folder`, sorted, without hidden files and folders."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        found += [Path(parent) / name for name in names if not name.startswith(".")]
    return sorted(found)


def _with_suffix(files: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    return [file for file in files if suffix_of(file) in suffixes]


def _tables(files: Sequence[Path]) -> list[Path]:
    """The tables among the files of a folder that make it a data set, if there are any."""
    text_files = _documents(_with_suffix(files, TEXT_SUFFIXES))
    return _with_suffix(files, FOLDER_TABLE_SUFFIXES if text_files else FOLDER_SUFFIXES)


def _documents(text_files: Sequence[Path]) -> list[Path]:
    """Text files without those that may be a README."""
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
        # Python reads newlines of text files in this way, too.
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if text.strip():
            records.append({TEXT_COLUMNS[0]: text})
        else:
            blank.append(file)
    if undecodable and not records:
        raise ValueError(undecodable[0])
    if not records:
        raise ValueError(f"{blank[0]} is empty: there is no text in it. Check the path.")
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
            "%d of %d files of %s are empty and were left out. The first: %s",
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
    """The files of a local data set of tables; none for a saved data set or one on the hub.

    Raises:
        ValueError: a file or folder does not exist, is of an unknown kind, is empty or is not
            UTF-8; the message says what to name instead.
    """
    suffix = suffix_of(path)
    looks_local = name_or_path.startswith((".", "/", "~")) or suffix in (
        *TEXT_SUFFIXES,
        *TABLE_SUFFIXES,
    )
    if not path.exists() and looks_local:
        raise ValueError(f"There is no file or folder {name_or_path}; check the path.")
    if path.is_file() and suffix not in TABLE_SUFFIXES:
        raise ValueError(
            f"{name_or_path} ends in {path.suffix!r}, which cannot be read; use one of "
            f"{LISTED_SUFFIXES}, or a dataset's name on the hub."
        )
    if path.is_file() and _is_blank(path):
        raise ValueError(f"{name_or_path} is empty; check the path.")
    tables = [path] if path.is_file() else []
    if path.is_dir() and not _is_saved_dataset(path):
        tables = _tables(_files(path))
        if not tables:
            raise ValueError(
                f"The folder {name_or_path} contains no file that can be read from a folder; these "
                f"end in {', '.join((*TEXT_SUFFIXES, *FOLDER_SUFFIXES))}."
            )
    for table in tables:
        fault = None if suffix_of(table) == ".parquet" else not_utf8(table)
        if fault is not None:
            raise ValueError(fault)
    return tables


def _csv_options(tables: Sequence[Path], datasets: Any) -> dict[str, Any]:
    """Options for reading .csv and .tsv files, so that the text of every cell stays unchanged.

    By default, pandas would make a number of `4`, and a missing value of `NA` or `null`.

    Raises:
        ValueError: the files differ in their columns or separators.
    """
    suffixes = {suffix_of(table) for table in tables}
    if not suffixes & SEPARATORS.keys():
        return {}
    if len(suffixes) > 1:
        raise ValueError(
            f"its files are of several kinds ({', '.join(sorted(suffixes))}); put each kind into "
            "its own folder."
        )
    separator = SEPARATORS[suffixes.pop()]
    columns = _header(tables[0], separator)
    for table in tables[1:]:
        if (found := _header(table, separator)) != columns:
            raise ValueError(
                f"{table.name} has the columns {', '.join(found)}, but {tables[0].name} has "
                f"{', '.join(columns)}; give all files the same columns, or name one file."
            )
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    return {
        "sep": separator,
        "features": features,
        "keep_default_na": False,
        "encoding": "utf-8-sig",
    }


def _header(table: Path, separator: str) -> list[str]:
    """The column names in the first line of a .csv or .tsv file.

    A column without a name gets the name that pandas gives it.

    Raises:
        ValueError: two columns have the same name.
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
    """Whether a file contains only white space, or an empty list."""
    with open_bytes(path) as stream:
        start = stream.read(1024)
    return len(start) < 1024 and start.removeprefix(b"\xef\xbb\xbf").strip() in (b"", b"[]")


def _json_fault(path: Path) -> str | None:
    """A message about the first line of a JSON-lines file that cannot be read; None if all can."""
    if suffix_of(path) not in JSON_LINES or not path.is_file():
        return None
    with open_bytes(path) as stream:
        # Bytes, since text would also be split at characters that JSON allows in a line (U+2028).
        for number, line in enumerate(stream, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                return f"line {number} is not valid JSON ({error})"
            # Dumping the record finds surrogates in all its texts, however deeply nested.
            fault = fault_of(json.dumps(record, ensure_ascii=False))
            if fault is not None:
                return f"line {number} {fault}"
    return None


def import_datasets(name: str) -> Any:
    """Import the library `datasets`.

    Args:
        name: the data that needs it, for the error.

    Raises:
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Reading {name} needs the `datasets` library, which is not installed: "
            'pip install "hf_ebft[examples]". Text files and folders of text files need no extra.'
        ) from error
    return datasets
