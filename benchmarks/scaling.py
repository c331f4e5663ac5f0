"""Time and peak memory of the library's step against document length, samples, rollout length and
vocabulary, one at a time.

    python benchmarks/scaling.py --json scaling.json --plot scaling.svg    # the plot: matplotlib

Each curve has an exponent: the slope of its logarithm over the logarithm of what was varied. 1 is
linear; fixed costs lower it. The exponent of the multiply-adds themselves (`benchmarks/limit.py`)
is shown beside it. For the document's length it is above 1, because a token sees everything before
it. If time grows faster than its multiply-adds, or memory faster than linearly, this is a fault.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from settings import MODELS, Preset, machine
from step import Options, measure

BASE = Preset(document=256, repeats=3)
MODEL = "3m"
# What is varied: its label, and the values.
AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "document": ("document tokens S", (128, 256, 512, 1024)),
    "n_samples": ("samples n", (2, 4, 8, 16)),
    "generate_max_len": ("rollout tokens G", (4, 8, 16)),
    "vocabulary": ("vocabulary V", (2048, 8192, 32768)),
}
QUANTITIES = {
    "seconds": "seconds",
    "peak_bytes": "peak memory, bytes",
    "multiply_adds": "multiply-adds",
}


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least-squares slope of log y over log x; 0 where y is 0 throughout."""
    if not any(ys):
        return 0.0
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def point(axis: str, value: int, device: str) -> dict[str, float]:
    """Measure one setting."""
    vocabulary = MODELS[MODEL].shape["vocab_size"]
    if axis == "vocabulary":
        preset, vocabulary = BASE, value
    else:
        preset = replace(BASE, **{axis: value})
    figures = measure(
        preset,
        MODEL,
        Options(device=device, with_naive=False, shape={"vocab_size": vocabulary}),
    )
    return {
        "value": value,
        "seconds": figures["seconds"]["ours"]["total"],
        "peak_bytes": figures["peak_bytes"]["ours"],
        "multiply_adds": sum(figures["multiply_adds"].values()),
        "ratio_vs_limit": figures["ratio_vs_limit"],
    }


def exponents(points: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of each quantity: over all points, and over the last two."""
    xs = [point["value"] for point in points]
    return {
        name: {
            "all": exponent(xs, [point[name] for point in points]),
            "last": exponent(xs[-2:], [point[name] for point in points[-2:]]),
        }
        for name in QUANTITIES
    }


def table(curves: dict[str, Any]) -> str:
    """The figures, and each curve's exponents."""
    lines = []
    for axis, curve in curves.items():
        lines += [
            f"| {AXES[axis][0]} | seconds | peak, MiB | G multiply-adds | times the limit |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['value']} | {row['seconds']:.3f} | {row['peak_bytes'] / 2**20:.1f} | "
            f"{row['multiply_adds'] / 1e9:.2f} | {row['ratio_vs_limit']:.2f} |"
            for row in curve["points"]
        ]
        slopes = [
            f"{curve['exponents'][name]['all']:.2f} ({curve['exponents'][name]['last']:.2f})"
            for name in QUANTITIES
        ]
        lines += [f"| exponent (of the last two) | {' | '.join(slopes)} | |", ""]
    return "\n".join(lines)


def plot(curves: dict[str, Any], path: Path) -> None:
    """Time and memory over each axis, both logarithmic, with a line of slope 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(curves), 5.4), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False)
    for column, (axis, curve) in enumerate(curves.items()):
        points = curve["points"]
        xs = [row["value"] for row in points]
        for panel, name in zip(panels[:, column], ("seconds", "peak_bytes"), strict=True):
            ys = [row[name] for row in points]
            slope = curve["exponents"][name]["all"]
            panel.loglog(xs, ys, "o-", label=f"exponent {slope:.2f}")
            panel.loglog(xs, [ys[-1] * x / xs[-1] for x in xs], ":", color="gray", label="linear")
            panel.set_xticks(xs, [str(x) for x in xs])
            panel.minorticks_off()
            panel.legend(frameon=False, fontsize="small")
            panel.set_xlabel(AXES[axis][0])
        panels[0, 0].set_ylabel(QUANTITIES["seconds"])
        panels[1, 0].set_ylabel(QUANTITIES["peak_bytes"])
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="Write the figures here.")
    parser.add_argument("--plot", type=Path, help="Draw them here (.svg or .png).")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--points", type=int, help="Only the first so many of each axis.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads.")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    given = parser.parse_args(arguments)
    if given.points is not None and given.points < 2:
        parser.error("--points must be 2 or more: a slope takes two.")
    torch.set_num_threads(given.threads)
    curves: dict[str, Any] = {}
    for axis in given.axes:
        points = [point(axis, value, given.device) for value in AXES[axis][1][: given.points]]
        curves[axis] = {"points": points, "exponents": exponents(points)}
        print(table({axis: curves[axis]}), flush=True)
    if given.json:
        about = {"model": MODEL, "machine": machine(torch.device(given.device))}
        given.json.write_text(json.dumps(about | {"curves": curves}, indent=2) + "\n")
    if given.plot:
        plot(curves, given.plot)


if __name__ == "__main__":
    main()
