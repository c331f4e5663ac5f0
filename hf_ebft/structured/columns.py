"""Which column of a data set holds the ground truth."""

from __future__ import annotations

from typing import Any

GROUND_TRUTH_COLUMNS = ("ground_truth", "completion", "answer")
# TRL hands the other columns of the dataset to reward functions, but not this one.
WITHHELD_COLUMN = "completion"


def ground_truth_column(columns: Any, wanted: str | None) -> str:
    """The column with the ground truth.

    Args:
        columns: names of the columns there are.
        wanted: the one that was asked for, or None.

    Raises:
        ValueError: there is none, or more than one to choose from.
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
            f"The columns {', '.join(found)} may all hold the ground truth; say which by "
            "ground_truth_column."
        )
    raise ValueError(
        f"None of the columns {names} holds the ground truth; name one of them "
        f"{' or '.join(GROUND_TRUTH_COLUMNS)}, or say which by ground_truth_column."
        + _about_withheld(WITHHELD_COLUMN)
    )


def _about_withheld(name: str) -> str:
    if name != WITHHELD_COLUMN:
        return ""
    return (
        f" (TRL keeps a column called {WITHHELD_COLUMN!r} from reward functions: rename it where "
        "FeatureMatchingReward is used on its own.)"
    )
