"""A table of several measured models: intervals, paired differences; as JSON, Markdown and PNG."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_ebft.evaluation.bootstrap import mean_bootstrap, paired_bootstrap
from hf_ebft.evaluation.models import (
    ModelMeasurements,
    same_documents,
)
from hf_ebft.training.metric_table import (
    HELD_OUT_METRICS,
    PERPLEXITIES,
    ROLLOUT_METRICS,
    SECOND_NETWORK_METRICS,
    TEXT_METRICS,
)

OF_ROLLOUTS = ROLLOUT_METRICS | SECOND_NETWORK_METRICS
# Measurements that are drawn in the PNG.
PLOTTED = (
    "cfm_loss",
    "energy_score",
    "excess_over_spread",
    "cosine_alignment",
    "dot_diversity",
    "reward",
    "reward_best",
    "entropy",
)


@dataclass(frozen=True)
class Entry:
    """One measurement of one model.

    Attributes:
        model: name of the model.
        measurement: name in `HELD_OUT_METRICS`.
        length: tokens of the rollouts; None for measurements of the text itself.
        value: mean over documents (over tokens, for measurements of the text).
        low, high: bounds of its interval.
        difference, difference_low, difference_high: difference to the first model, paired by
            document, with its interval. None for the first model, and for perplexities, since the
            cross-entropy shows the same.
        beyond_noise: whether zero is outside the interval of the difference.
        n_documents, n_groups: numbers of documents used and of groups resampled.
    """

    model: str
    measurement: str
    length: int | None
    value: float
    low: float
    high: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    beyond_noise: bool
    n_documents: int
    n_groups: int


@dataclass(frozen=True)
class ModelComparison:
    """The table of all models.

    Attributes:
        models: names of the models; differences are to the first.
        lengths: lengths of the rollouts.
        counts: `documents`; `duplicates`, documents that are equal to an earlier one;
            `skipped`, documents without room for a rollout of the greatest length; `prefixes`,
            continued prefixes; `groups`, the largest number of groups that were resampled.
        entries: every measurement of every model.
        settings: settings of the evaluation, for the record.
    """

    models: list[str]
    lengths: list[int]
    counts: dict[str, int]
    entries: list[Entry]
    settings: dict[str, Any] = field(default_factory=dict)

    def get(self, model: str, measurement: str, length: int | None = None) -> Entry:
        """One entry.

        Raises:
            KeyError: there is none.
        """
        for entry in self.entries:
            if (entry.model, entry.measurement, entry.length) == (model, measurement, length):
                return entry
        raise KeyError(f"no {measurement!r} of {model!r} at length {length}")

    def to_json(self) -> str:
        """All entries as JSON; missing numbers are null."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Tables: text, then one for each measurement of rollouts, with a line for each length."""
        counts = self.counts
        lines = [
            f"{counts['documents']} documents ({counts['duplicates']} equal to an earlier one), "
            f"{counts['prefixes']} prefixes; {counts['skipped']} documents are too short for a "
            f"rollout of {max(self.lengths)} tokens and count for the text only.",
            "",
            f"Value [95 % interval] for {self.models[0]}; value, difference to "
            f"{self.models[0]} [95 % interval of the difference] for the others. Bold: beyond the "
            "noise of the documents.",
            "",
        ]
        found = {entry.measurement for entry in self.entries}
        text = [name for name in HELD_OUT_METRICS if name in found and name not in OF_ROLLOUTS]
        lines += self._table("text", [(HELD_OUT_METRICS[name].label, name, None) for name in text])
        for name, measurement in OF_ROLLOUTS.items():
            if name not in found:  # there was no second feature network
                continue
            better = f", {measurement.better} is better" if measurement.better else ""
            lines += [f"**{measurement.label}{better}**", ""]
            lines += self._table("rollout tokens", [(str(g), name, g) for g in self.lengths])
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Curves over the length of rollouts, with intervals, as PNG. Needs matplotlib."""
        from matplotlib.backends.backend_agg import (  # type: ignore[import-not-found,unused-ignore]
            FigureCanvasAgg,
        )
        from matplotlib.figure import (  # type: ignore[import-not-found,unused-ignore]
            Figure as Canvas,
        )

        # Without pyplot, which would open a display and keep the figure in memory.
        canvas = Canvas(figsize=(16, 6.5), layout="constrained")
        FigureCanvasAgg(canvas)
        for name, axes in zip(PLOTTED, canvas.subplots(2, 4).flat, strict=True):
            for model in self.models:
                curve = [self.get(model, name, g) for g in self.lengths]
                (line,) = axes.plot(
                    self.lengths, [entry.value for entry in curve], marker="o", label=model
                )
                axes.fill_between(
                    self.lengths,
                    [entry.low for entry in curve],
                    [entry.high for entry in curve],
                    color=line.get_color(),
                    alpha=0.15,
                )
            measured = ROLLOUT_METRICS[name]
            arrow = {"lower": " \u2193", "higher": " \u2191", None: ""}[measured.better]
            axes.set_title(measured.label + arrow)
            axes.set_xscale("log", base=2)
            axes.set_xticks(self.lengths, [str(g) for g in self.lengths])
            axes.set_xlabel("rollout tokens")
        canvas.axes[0].legend()
        canvas.savefig(path, dpi=120)

    def save(self, folder: str | os.PathLike[str], *, png: bool = True) -> list[Path]:
        """Write `evaluation.json`, `evaluation.md` and, if wanted, `evaluation.png`."""
        paths = [Path(folder, f"evaluation.{kind}") for kind in ("json", "md")]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(self.to_json(), encoding="utf-8")
        paths[1].write_text(self.to_markdown(), encoding="utf-8")
        if png:
            paths.append(Path(folder, "evaluation.png"))
            self.plot(paths[-1])
        return paths

    def _table(self, corner: str, rows: list[tuple[str, str, int | None]]) -> list[str]:
        lines = [
            f"| {corner} | {' | '.join(self.models)} |",
            f"|---|{'---|' * len(self.models)}",
        ]
        for label, measurement, length in rows:
            cells = [_cell(self.get(model, measurement, length)) for model in self.models]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        return [*lines, ""]


def compare_models(
    measured: Mapping[str, ModelMeasurements],
    *,
    groups: ArrayLike | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> ModelComparison:
    """Intervals of every measurement, and paired differences from the first model.

    Args:
        measured: name -> measurements from `measure_model`, of the same documents.
        groups: (N,) labels of groups that are resampled as a whole (such as the file that each
            document was cut from). Default: each document is a group; equal documents are one.
        n_resamples: number of bootstrap resamples.
        seed: seed of the resampling, the same for every measurement.
        settings: settings to record in the result.

    Raises:
        ValueError: there are no models, their documents differ, or are too few for an interval.
    """
    if not measured:
        raise ValueError("measured holds no models: pass {name: measure_model(...), ...}.")
    same_documents(measured)
    first = next(iter(measured.values()))
    labels = np.asarray(first.document if groups is None else groups)
    options: dict[str, Any] = {"groups": labels, "n_resamples": n_resamples, "seed": seed}
    entries: list[Entry] = []
    for model, measurements in measured.items():
        base = None if measurements is first else first
        for name in TEXT_METRICS:
            if np.isnan(measurements.text[name]).all():
                continue  # no completion is marked
            before = None if base is None else base.text[name]
            weights = np.nan_to_num(measurements.tokens[name])
            entry = _entry(model, name, None, before, measurements.text[name], weights, options)
            entries += [entry, _perplexity(entry)]
        for g, by_name in measurements.rollouts.items():
            for name, values in by_name.items():
                before = None if base is None else base.rollouts[g][name]
                entries.append(_entry(model, name, g, before, values, None, options))
    return ModelComparison(
        models=list(measured),
        lengths=list(first.rollouts),
        counts={
            "documents": len(first),
            "duplicates": len(first) - len(set(first.document.tolist())),
            "skipped": int((first.blocks == 0).sum()),
            "prefixes": int(first.blocks.sum()),
            "groups": len(set(labels.tolist())),
        },
        entries=entries,
        settings=settings or {},
    )


def _entry(
    model: str,
    name: str,
    length: int | None,
    before: NDArray[np.float64] | None,
    values: NDArray[np.float64],
    weights: NDArray[np.float64] | None,
    options: dict[str, Any],
) -> Entry:
    own = mean_bootstrap(values, weights=weights, **options)
    paired = None
    if before is not None:
        paired = paired_bootstrap(before, values, weights=weights, **options)
    return Entry(
        model=model,
        measurement=name,
        length=length,
        value=own.mean,
        low=own.low,
        high=own.high,
        difference=paired.difference if paired else None,
        difference_low=paired.low if paired else None,
        difference_high=paired.high if paired else None,
        beyond_noise=paired.beyond_noise if paired else False,
        n_documents=own.n_documents,
        n_groups=own.n_groups,
    )


def _perplexity(entry: Entry) -> Entry:
    """exp of a cross-entropy and of the bounds of its interval."""
    return Entry(
        model=entry.model,
        measurement=PERPLEXITIES[entry.measurement].name,
        length=None,
        value=math.exp(entry.value),
        low=math.exp(entry.low),
        high=math.exp(entry.high),
        difference=None,
        difference_low=None,
        difference_high=None,
        beyond_noise=entry.beyond_noise,
        n_documents=entry.n_documents,
        n_groups=entry.n_groups,
    )


def _cell(entry: Entry) -> str:
    value = _number(entry.value)
    if entry.difference is None:
        value = f"**{value}**" if entry.beyond_noise else value
        return f"{value} [{_number(entry.low)}, {_number(entry.high)}]"
    difference = _number(entry.difference, "+")
    difference = f"**{difference}**" if entry.beyond_noise else difference
    low, high = entry.difference_low, entry.difference_high
    assert low is not None and high is not None
    return f"{value}, {difference} [{_number(low, '+')}, {_number(high, '+')}]"


def _number(value: float, sign: str = "") -> str:
    """Four decimals, one for large numbers."""
    digits = 4 if abs(value) < 100 else 1
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0 turns -0.0 into 0.0
