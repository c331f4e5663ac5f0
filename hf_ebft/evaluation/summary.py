"""Shows a comparison of two policies as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from hf_ebft.evaluation.bootstrap import PairedDifference, paired_bootstrap
from hf_ebft.evaluation.documents import DOCUMENT_METRICS, DocumentMeasurements
from hf_ebft.evaluation.samples import Continuation

# Number of characters shown of a prefix: its end, where the continuations begin.
PREFIX_CHARACTERS = 160


def compare(
    before: DocumentMeasurements, after: DocumentMeasurements, *, groups: ArrayLike | None = None
) -> dict[str, PairedDifference]:
    """Paired differences of every measurement that any document has.

    Args:
        before, after: measurements from `evaluate_documents`, on the same rows.
        groups: the group of each document, see `paired_bootstrap`.

    Raises:
        ValueError: the rows differ, or are too few.
    """
    if before.row.tolist() != after.row.tolist():
        raise ValueError(
            "The two evaluations are of different documents, so their differences mean nothing: "
            "pass the same rows to both."
        )
    return {
        name: paired_bootstrap(before.values[name], after.values[name], groups=groups)
        for name in DOCUMENT_METRICS
        if not np.isnan(before.values[name] + after.values[name]).all()
    }


def format_table(differences: Mapping[str, PairedDifference]) -> str:
    """One line per measurement: before, after, difference, interval, a star beyond the noise."""
    lines = [f"{'':34}{'before':>9}{'after':>9}   difference [95 % interval]"]
    for name, paired in differences.items():
        star = " *" if paired.beyond_noise else ""
        lines.append(
            f"{DOCUMENT_METRICS[name].label:34}{paired.before:9.4f}{paired.after:9.4f}"
            f"{paired.difference:+13.4f} [{paired.low:+.4f}, {paired.high:+.4f}]{star}"
        )
    return "\n".join(lines)


def format_samples(
    before: Sequence[Continuation],
    after: Sequence[Continuation],
    decode: Callable[[list[int]], str],
) -> str:
    """Prefix, ground truth and both rollouts, with line ends and tabs made visible.

    Args:
        before, after: continuations of the same prefixes.
        decode: converts token ids to text.
    """
    blocks = []
    for old, new in zip(before, after, strict=True):
        if old.prefix != new.prefix:
            raise ValueError("The continuations are of different prefixes: sample the same rows.")
        prefix = decode(old.prefix)
        shown = ("..." if len(prefix) > PREFIX_CHARACTERS else "") + prefix[-PREFIX_CHARACTERS:]
        parts = {
            "prefix": shown,
            "before": decode(old.rollout),
            "after": decode(new.rollout),
            "truth": decode(old.ground_truth),
        }
        blocks.append("\n".join(f"{name:>8} | {_one_line(text)}" for name, text in parts.items()))
    return "\n\n".join(blocks)


def _one_line(text: str) -> str:
    return text.replace("\n", "\u23ce").replace("\r", "\u240d").replace("\t", "\u2192")
