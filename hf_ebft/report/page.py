"""The report as one self-contained HTML page: no script, no network, inline SVG.

Every text that comes from a run is escaped here, in :func:`_e`, or by `drawing.to_svg`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hf_ebft.config import EBFTSettings
from hf_ebft.report.health import Finding, examine
from hf_ebft.report.plots import charts_of, timing_chart
from hf_ebft.report.runs import Run, Sample, Watched
from hf_ebft.training.metric_table import HELD_OUT_METRICS, label_of, metric_of
from hf_ebft.version import __version__
from hf_ebft.watching.charts import DASHES, css_variables, to_svg
from hf_ebft.watching.curves import changes, format_number
from hf_ebft.watching.model_card import ARGUMENTS
from hf_ebft.watching.tensorboard import visible

# Of a prefix that is watched: its end, and how often it is shown.
PREFIX_CHARACTERS = 160
MOST_LOOKS = 8

STYLE = """
:root { color-scheme: light dark; %(light)s --card: #f6f7f9; --line: #d9dce1; --serious: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { %(dark)s --card: #22252b; --line: #3c4043; --serious: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 24px 20px 60px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 36px 0 10px; border-bottom: 1px solid var(--line); }
h3 { font-size: 15px; margin: 16px 0 6px; }
p { max-width: 78ch; margin: 6px 0; }
.muted { color: var(--muted); }
.grid { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%%), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 10px 6px; break-inside: avoid; }
figcaption { color: var(--muted); font-size: 12.5px; line-height: 1.35; padding: 2px 4px 4px; }
svg { display: block; width: 100%%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; }
td.number, th.number { text-align: right; white-space: nowrap; }
.better { color: var(--good); } .worse { color: var(--bad); }
.finding { border-left: 5px solid var(--muted); background: var(--card); padding: 8px 14px;
  margin: 8px 0; border-radius: 0 8px 8px 0; break-inside: avoid; }
.finding.serious { border-color: var(--serious); } .finding.warning { border-color: var(--bad); }
.finding .kind { font-size: 12px; font-weight: 700; letter-spacing: .04em; margin-right: 8px; }
.serious .kind { color: var(--serious); } .warning .kind { color: var(--bad); }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 12px; margin: 8px 0; break-inside: avoid; }
.sample div { display: grid; grid-template-columns: 62px 1fr; }
.sample code, code { font: 13px/1.45 ui-monospace, monospace; overflow-wrap: anywhere;
  white-space: pre-wrap; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0; }
.legend svg { width: 42px; height: 12px; display: inline-block; vertical-align: middle; }
summary { cursor: pointer; }
@media print { body { max-width: none; font-size: 12px; padding: 0; } details { display: none; }
  .grid { grid-template-columns: 1fr 1fr; } }
"""


def render_page(
    runs: Sequence[Run], title: str = "EBFT runs", smoothing: float | None = None
) -> str:
    """The page of one or several runs.

    Args:
        runs: in the order in which they are to be listed.
        title: of the page.
        smoothing: weight of the past in the smoothed curves; default: about a tenth of a curve.

    Raises:
        ValueError: no runs, more than can be told apart, or a weight out of range.
    """
    if not runs:
        raise ValueError("There is no run to report on.")
    style = STYLE % {"light": css_variables(dark=False), "dark": css_variables(dark=True)}
    sections = [
        f"<h1>{_e(title)}</h1>",
        f'<p class="muted">{_e(_subtitle(runs))}</p>',
        _legend(runs) if len(runs) > 1 else "",
        _findings(runs),
        _glance(runs),
        _comparisons(runs),
        _curves(runs, smoothing),
        _timing(runs),
        _samples(runs),
        _watched(runs),
        _configuration(runs),
        f'<p class="muted">Written by hf_ebft {_e(__version__)}. The method: Jelassi et al., 2026, '
        '<a href="https://arxiv.org/abs/2603.12248">arXiv 2603.12248</a>.</p>',
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(title)}</title><style>{style}</style></head>\n<body>{body}</body></html>\n"
    )


# ---- Sections -----------------------------------------------------------------------------------


def _subtitle(runs: Sequence[Run]) -> str:
    return "; ".join(f"{run.name}: {run.last_step} steps, read from {run.source}" for run in runs)


def _legend(runs: Sequence[Run]) -> str:
    keys = []
    for number, run in enumerate(runs):
        dash = " ".join(f"{length:g}" for length in DASHES[number])
        keys.append(
            '<span><svg viewBox="0 0 42 12" aria-hidden="true"><line x1="1" y1="6" x2="41" y2="6" '
            f'stroke-width="3" stroke-dasharray="{dash}" style="stroke:var(--series{number})"/>'
            f"</svg> {_e(run.name)}</span>"
        )
    return f'<div class="legend">{"".join(keys)}</div>'


def _findings(runs: Sequence[Run]) -> str:
    parts = ["<h2>What to look at</h2>"]
    for run in runs:
        if len(runs) > 1:
            parts.append(f"<h3>{_e(run.name)}</h3>")
        found = examine(run)
        if not any(finding.severity != "note" for finding in found):
            parts.append("<p>Nothing looks unhealthy.</p>")
        parts += [_finding(finding) for finding in found]
    return "\n".join(parts)


def _finding(finding: Finding) -> str:
    return (
        f'<div class="finding {finding.severity}"><span class="kind">{finding.severity.upper()}'
        f"</span><strong>{_e(finding.title)}.</strong> {_e(finding.evidence)}<br>"
        f"{_e(finding.advice)}</div>"
    )


def _glance(runs: Sequence[Run]) -> str:
    by_run = [changes(run.series) for run in runs]
    names = list(dict.fromkeys(name for found in by_run for name in found))
    if not names:
        return ""
    head = "".join(f'<th class="number">{_e(run.name)}</th><th></th>' for run in runs)
    rows = []
    for name in names:
        cells = []
        for found in by_run:
            if name not in found:
                cells.append("<td></td><td></td>")
                continue
            change = found[name]
            verdict = change.verdict(metric_of(name)) or ""
            kind = verdict if verdict in ("better", "worse") else "muted"
            cells.append(
                f'<td class="number">{format_number(change.first)} → '
                f"{format_number(change.last)}</td>"
                f'<td class="{kind}">{verdict}</td>'
            )
        rows.append(f"<tr><td>{_e(label_of(name))}</td>{''.join(cells)}</tr>")
    return (
        "<h2>From the first to the last fifth of the log</h2>"
        f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
        '<p class="muted">"Better" and "worse": by more than two standard errors, judged by how '
        "much neighbouring points differ. One run says nothing about other seeds.</p>"
    )


def _comparisons(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        rows = "".join(_comparison_row(name, figures) for name, figures in run.comparison.items())
        if rows:
            parts.append(
                (f"<h3>{_e(run.name)}</h3>" if len(runs) > 1 else "")
                + '<div class="scroll"><table><tr><th></th><th class="number">before</th>'
                '<th class="number">after</th><th class="number">difference</th>'
                f"<th>95 % interval</th><th></th></tr>{rows}</table></div>"
            )
    if not parts:
        return ""
    return (
        "<h2>Held-out text, before and after</h2>" + "".join(parts) + '<p class="muted">The same '
        "rows, random numbers and feature network; intervals by paired bootstrap.</p>"
    )


def _held_out_label(name: str) -> str:
    metric = HELD_OUT_METRICS.get(name)
    return name if metric is None else metric.label


def _comparison_row(name: str, figures: Any) -> str:
    wanted = ("before", "after", "difference", "low", "high")
    if not isinstance(figures, dict) or not all(
        isinstance(figures.get(key), (int, float)) for key in wanted
    ):
        return ""  # another file of that name has other things in it
    before, after, difference, low, high = (float(figures[key]) for key in wanted)
    clear = "beyond the noise" if low > 0 or high < 0 else ""
    return (
        f'<tr><td>{_e(_held_out_label(name))}</td><td class="number">{before:.4f}</td>'
        f'<td class="number">{after:.4f}</td><td class="number">{difference:+.4f}</td>'
        f'<td>[{low:+.4f}, {high:+.4f}]</td><td class="muted">{clear}</td></tr>'
    )


def _curves(runs: Sequence[Run], smoothing: float | None) -> str:
    figures = "".join(
        f"<figure>{to_svg(chart.drawing)}<figcaption>{_e(chart.metric.meaning)}</figcaption>"
        "</figure>"
        for chart in charts_of(runs, smoothing)
    )
    return f'<h2>Curves</h2><div class="grid">{figures}</div>'


def _timing(runs: Sequence[Run]) -> str:
    drawing = timing_chart(runs)
    if drawing is None:
        return ""
    return f'<h2>Time</h2><figure style="max-width:760px">{to_svg(drawing)}</figure>'


def _samples(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        if run.samples:
            parts.append(f"<h3>{_e(run.name)}</h3>" if len(runs) > 1 else "")
            parts += [_sample(sample) for sample in run.samples]
    return "<h2>Samples, before and after</h2>" + "".join(parts) if parts else ""


def _sample(sample: Sample) -> str:
    lines = "".join(
        f'<div><span class="muted">{name}</span><code>{_e(visible(text))}</code></div>'
        for name, text in dataclasses.asdict(sample).items()
    )
    return f'<div class="sample">{lines}</div>'


def _watched(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        by_prefix: dict[tuple[str, str], list[Watched]] = {}
        for watched in run.watched:
            by_prefix.setdefault((watched.prefix, watched.ground_truth), []).append(watched)
        if by_prefix and len(runs) > 1:
            parts.append(f"<h3>{_e(run.name)}</h3>")
        for (prefix, truth), seen in by_prefix.items():
            rows = "".join(
                f'<tr><td class="number">{look.step}</td>'
                f'<td class="number">{format_number(look.reward)}</td>'
                f"<td><code>{_e(visible(look.rollout))}</code></td></tr>"
                for look in _spread(seen)
            )
            parts.append(
                f'<div class="sample"><div><span class="muted">prefix</span><code>'
                f"{_e(visible(prefix[-PREFIX_CHARACTERS:]))}</code></div>"
                f'<div><span class="muted">truth</span><code>{_e(visible(truth))}</code></div>'
                '<table><tr><th class="number">step</th><th class="number">mean reward</th>'
                f"<th>first rollout</th></tr>{rows}</table></div>"
            )
    if not parts:
        return ""
    return "<h2>The same prefixes while training</h2>" + "".join(parts)


def _spread(seen: Sequence[Watched]) -> list[Watched]:
    """The first, the last, and some in between."""
    if len(seen) <= MOST_LOOKS:
        return list(seen)
    last = len(seen) - 1
    return [seen[round(number * last / (MOST_LOOKS - 1))] for number in range(MOST_LOOKS)]


def _configuration(runs: Sequence[Run]) -> str:
    if not any(run.arguments for run in runs):
        return ""
    everything = sorted({name for run in runs for name in run.arguments})
    settings = [field.name for field in dataclasses.fields(EBFTSettings)]
    named = [*settings, *ARGUMENTS, "max_steps", "num_train_epochs"]
    main = [name for name in named if name in everything]
    rest = [name for name in everything if name not in main]
    note = "Bold where not EBFT's default." if len(runs) == 1 else "Bold where the runs differ."
    return (
        f'<h2>Configuration</h2><p class="muted">{note}</p>'
        + _arguments_table(runs, main)
        + f"<details><summary>All other arguments ({len(rest)})</summary>"
        + _arguments_table(runs, rest)
        + "</details>"
    )


def _arguments_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    defaults = dataclasses.asdict(EBFTSettings())
    rows = []
    for name in names:
        values = [run.arguments.get(name, "") for run in runs]
        if len(runs) == 1:
            stands_out = name in defaults and values[0] != defaults[name]
        else:
            stands_out = any(value != values[0] for value in values)
        cells = "".join(f"<td>{_value(value, stands_out)}</td>" for value in values)
        rows.append(f"<tr><td><code>{_e(name)}</code></td>{cells}</tr>")
    head = "".join(f"<th>{_e(run.name)}</th>" for run in runs) if len(runs) > 1 else ""
    head = f"<tr><th></th>{head}</tr>" if head else ""
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _value(value: Any, stands_out: bool) -> str:
    if isinstance(value, float) and math.isfinite(value):
        text = f"{value:g}"
    elif isinstance(value, Mapping) and not value:
        text = ""
    else:
        text = str(value)
    return f"<strong><code>{_e(text)}</code></strong>" if stands_out else f"<code>{_e(text)}</code>"


def _e(text: str) -> str:
    return escape(text, quote=True)
