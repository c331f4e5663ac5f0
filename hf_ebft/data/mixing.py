"""Several data sets as one, by `datasets`: one after the other, or in given shares."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hf_ebft.data.sources import RawDataset, import_datasets

logger = logging.getLogger(__name__)

# Of each row, which data set it is from; taken out again.
_SOURCE = "__source"


def check_weights(weights: Sequence[float] | None, count: int) -> None:
    """Refuse weights that do not fit `count` data sets.

    Raises:
        ValueError: not one for each, none of one data set to weigh, or not above 0.
    """
    if weights is None:
        return
    if count < 2 or len(weights) != count:
        raise ValueError(
            f"dataset_weights={list(weights)} are {len(weights)} for {count} data set(s); give one "
            "weight to each of several data sets, or none."
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"dataset_weights={list(weights)} holds {weight}; shares are above 0. Leave out a "
                "data set that is not to be used."
            )


def mix(parts: Sequence[RawDataset], weights: Sequence[float] | None, seed: int) -> RawDataset:
    """One data set of several.

    Without weights every row of every part is there, one part after the other. With weights rows
    are drawn from part i with probability `weights[i]` over their sum, each row once, until one
    part has no row left; what is left of the others is logged.

    Args:
        parts: with the same kind of columns, which get the names of the first one's.
        weights: shares, of any sum.
        seed: of the drawing.

    Raises:
        ValueError: weights or columns that do not fit.
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
        "Rows by dataset_weights, until one data set has none left: %s.",
        ", ".join(
            f"{used[number]} of {len(part)} of {part.name}" for number, part in enumerate(parts)
        ),
    )
    return RawDataset(mixed.remove_columns(_SOURCE), parts[0].columns, name)


def _aligned(parts: Sequence[RawDataset], datasets: Any) -> list[Any]:
    """Each part as a `datasets.Dataset`, with names and types of the first one's columns."""
    first = parts[0]
    tables: list[Any] = []
    for part in parts:
        if len(part.columns) != len(first.columns):
            raise ValueError(
                f"{part.name} has {' with '.join(part.columns)} and {first.name} has "
                f"{' with '.join(first.columns)}; only data sets of one kind can be mixed."
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
                    f"{part.name} and {first.name} hold values of different types "
                    f"({table.features} and {tables[0].features}); make them alike first."
                ) from error
        tables.append(table)
    return tables
