"""Finds the column of a data set with the ground truth."""

from __future__ import annotations

from typing import Any

GROUND_TRUTH_COLUMNS = ("ground_truth", "completion", "answer")
# TRL passes the other columns of the dataset to reward functions, but not this one.
WITHHELD_COLUMN = "completion"


def ground_truth_column(columns: Any, wanted: str | None) -> str:
    """The name of the column with the ground truth.

    Args:
        columns: names of the existing columns.
        wanted: the name that the user gave, or None.

    Raises:
        ValueError: there is no such column, or several are possible.
    """
    names = sorted(columns)
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise ValueError(
            f"The dataset has no column {wanted!r} (ground_truth_column); it has {names}."
            + _about_withheld(wanted)
        )
    found = [name for name in GROUND_TRUTH_COLUMNS if name in columns]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"The columns {', '.join(found)} may all hold the ground truth; choose one with "
            "ground_truth_column."
        )
    raise ValueError(
        f"None of the columns {names} holds the ground truth; rename one of them to "
        f"{' or '.join(GROUND_TRUTH_COLUMNS)}, or name it in ground_truth_column."
        + _about_withheld(WITHHELD_COLUMN)
    )


def _about_withheld(name: str) -> str:
    if name != WITHHELD_COLUMN:
        return ""
    return (
        f" (TRL does not pass a column called {WITHHELD_COLUMN!r} to reward functions: rename it "
        "if you use FeatureMatchingReward without EBFTGRPOTrainer.)"
    )
