"""Combines several data sets into one, with `datasets`: joined, or mixed in given shares."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hf_ebft.data.sources import RawDataset, import_datasets

logger = logging.getLogger(__name__)

# Temporary column with the number of the data set that a row is from.
_SOURCE = "__source"


def check_weights(weights: Sequence[float] | None, count: int) -> None:
    """Raise for weights that do not fit `count` data sets.

    Raises:
        ValueError: there is a single data set, or not one weight for each, or a weight is not above
            0.
    """
    if weights is None:
        return
    if count < 2 or len(weights) != count:
        raise ValueError(
            f"dataset_weights={list(weights)}: {len(weights)} for {count} data set(s). Give one "
            "weight for each of several data sets, or leave dataset_weights unset."
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"dataset_weights={list(weights)} contains {weight}, but weights must be above 0. "
                "Leave out a data set that should not be used."
            )


def mix(parts: Sequence[RawDataset], weights: Sequence[float] | None, seed: int) -> RawDataset:
    """Combine several data sets into one.

    Without weights the result contains every row of every part, one part after the other. With
    weights, rows are drawn from part i with probability `weights[i] / sum(weights)`, each row once,
    until one part is used up. The log says how many rows of each part are used.

    Args:
        parts: data sets with the same kind of columns, which are renamed to those of the first one.
        weights: shares of the parts; they need not add up to 1.
        seed: seed of the random choice.

    Raises:
        ValueError: weights or columns do not fit.
    """
    check_weights(weights, len(parts))
    if len(parts) == 1:
        return parts[0]
    name = " + ".join(part.name for part in parts)
    datasets = import_datasets(name)
    tables = _aligned(parts, datasets)
    if weights is None:
        return RawDataset(datasets.concatenate_datasets(tables), parts[0].columns, name)
    marked = [
        table.add_column(_SOURCE, [number] * len(table)) for number, table in enumerate(tables)
    ]
    total = sum(weights)
    mixed = datasets.interleave_datasets(
        marked,
        probabilities=[weight / total for weight in weights],
        seed=seed,
        stopping_strategy="first_exhausted",
    )
    used = Counter(mixed[_SOURCE])
    logger.info(
        "Rows drawn by dataset_weights, until one data set was used up: %s.",
        ", ".join(
            f"{used[number]} of {len(part)} of {part.name}" for number, part in enumerate(parts)
        ),
    )
    return RawDataset(mixed.remove_columns(_SOURCE), parts[0].columns, name)


def _aligned(parts: Sequence[RawDataset], datasets: Any) -> list[Any]:
    """Each part as a `datasets.Dataset` with the column names and types of the first one."""
    first = parts[0]
    tables: list[Any] = []
    for part in parts:
        if len(part.columns) != len(first.columns):
            raise ValueError(
                f"{part.name} has the columns {' and '.join(part.columns)}, but {first.name} has "
                f"{' and '.join(first.columns)}; only data sets of one kind can be mixed. Use text "
                "in all of them, or prompts with completions in all."
            )
        table = part.records
        if not isinstance(table, datasets.Dataset):
            table = datasets.Dataset.from_list([dict(record) for record in part.records])
        table = table.select_columns(list(part.columns))
        renamed = {
            old: new for old, new in zip(part.columns, first.columns, strict=True) if old != new
        }
        table = table.rename_columns(renamed) if renamed else table
        if tables and table.features != tables[0].features:
            try:
                table = table.cast(tables[0].features)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{part.name} and {first.name} have values of different types "
                    f"({table.features} and {tables[0].features}); convert them to the same types "
                    "first."
                ) from error
        tables.append(table)
    return tables
