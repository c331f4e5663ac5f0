"""Renders a preflight as one self-contained HTML page, in the style of the report of runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from hf_ebft.evaluation.bootstrap import Interval
from hf_ebft.objective.noise_scale import NoiseScale
from hf_ebft.preflight.headroom import AtLength
from hf_ebft.preflight.ladder import RUNGS
from hf_ebft.preflight.result import Preflight
from hf_ebft.report.template import render
from hf_ebft.watching.charts import Curve, interval_chart, line_chart, to_svg


def render_preflight(found: Preflight, title: str = "EBFT preflight") -> str:
    """Render the page.

    Args:
        found: the result of `hf_ebft.preflight.preflight`.
        title: title of the page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return render(
        "preflight.html.jinja",
        folder=Path(__file__).parent,
        title=title,
        found=found,
        charts=[{"svg": svg, "meaning": meaning} for svg, meaning in _charts(found)],
        noise=[
            ("EBFT", _bounds(found.signal.ebft)),
            ("cross-entropy", _bounds(found.signal.cross_entropy)),
        ],
        cosine=_cosine(found),
        lengths=[_length(at) for at in found.headroom.lengths],
        rungs=[
            (
                name,
                _interval(found.rewards.rewards[name]),
                _interval(found.rewards.alignments[name]),
            )
            for name in RUNGS
        ],
        orders=[
            (order.better, order.worse, _interval(order.accuracy, "{:.0%}"))
            for order in found.rewards.orders
        ],
        cost=_cost(found),
    )


def _charts(found: Preflight) -> Iterator[tuple[str, str]]:
    unit, step = found.settings.unit, found.cost.rows_per_step
    scales = [
        (name, scale.documents, max(scale.low, 1e-3), scale.high)
        for name, scale in (
            ("EBFT", found.signal.ebft),
            ("cross-entropy", found.signal.cross_entropy),
        )
    ]
    drawing = interval_chart(
        "Signal equals noise at",
        scales,
        x_label=f"{unit} per step",
        mark=(f"yours: {step:,}", float(step)),
        logarithmic=True,
    )
    yield (
        to_svg(drawing),
        f"Steps with fewer {unit} are mostly noise. Intervals that reach the right edge have no "
        "upper bound.",
    )
    rewards = found.rewards.rewards
    drawing = interval_chart(
        "Reward of continuations, from the best to the worst",
        [(name, rewards[name].mean, rewards[name].low, rewards[name].high) for name in RUNGS],
        x_label="mean reward",
    )
    yield (
        to_svg(drawing),
        "Each continuation replaces one rollout of its group. A good reward falls from left to "
        "right.",
    )
    lengths = found.headroom.lengths
    x = [float(at.length) for at in lengths]
    curves = [
        Curve("CFM loss", 0, x, [at.cfm_loss.mean for at in lengths], marked=True),
        Curve("excess", 1, x, [at.excess.mean for at in lengths], marked=True),
        Curve("energy score", 2, x, [at.energy_score.mean for at in lengths], marked=True),
    ]
    drawing = line_chart("CFM loss, excess and energy score", curves, x_label="tokens")
    yield (
        to_svg(drawing),
        "By length of the rollouts: CFM loss (solid), its excess over the model's own spread "
        "(dashed), energy score (dotted).",
    )


def _bounds(scale: NoiseScale) -> str:
    if not math.isfinite(scale.high):
        return f"{scale.low:,.0f} or more"
    return f"{scale.documents:,.0f} [{scale.low:,.0f}, {scale.high:,.0f}]"


def _cosine(found: Preflight) -> str:
    cosine = found.signal.cosine
    if math.isnan(cosine.value):
        return "unknown: one of the gradients cannot be distinguished from zero"
    low, high = max(-1.0, cosine.low), min(1.0, cosine.high)
    return f"{cosine.value:.2f} [{low:.2f}, {high:.2f}]"


def _interval(interval: Interval, form: str = "{:.3f}") -> str:
    mean, low, high = (form.format(x) for x in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _length(at: AtLength) -> dict[str, str]:
    sharper = at.sharpened
    return {
        "length": str(at.length),
        "cfm_loss": _interval(at.cfm_loss),
        "excess": _interval(at.excess),
        "share": f"{at.share:.0%}",
        "energy_score": _interval(at.energy_score),
        "sharpened": f"{sharper['cfm_loss'].difference:+.3f}",
        "sharpened_energy": f"{sharper['energy_score'].difference:+.3f}",
    }


def _cost(found: Preflight) -> list[tuple[str, str]]:
    cost, unit = found.cost, found.settings.unit
    lines = [
        ("a step", f"{cost.seconds:.3g} s" if cost.fits else "does not fit into memory"),
        ("memory", f"{cost.memory / 2**30:.2f} of {cost.memory_there / 2**30:.1f} GiB"),
        ("kind of memory", cost.memory_of),
        (f"{unit} per step", f"{cost.rows_per_step:,} on {cost.processes} process(es)"),
    ]
    if cost.phases:
        split = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in cost.phases.items())
        lines.append(("a micro-batch", split))
    if cost.steps is not None and cost.hours is not None:
        lines.append(("the run", f"{cost.steps:,} steps, {cost.rows:,} {unit}"))
        lines.append(("hours", f"{cost.hours:.3g}, without evaluations and checkpoints"))
    return lines
