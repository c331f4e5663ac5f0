"""Writes the tables of the study into docs/study.md, and its plots, from the existing results.

    python studies/tables.py --results studies/results --docs docs/study.md

Each table is between `<!-- table: NAME -->` and `<!-- end -->` and is replaced as a whole.
`NAME` is one of `TABLES` for the tiny model, or `SETUP_NAME` for another setup.

Values are means over documents (tokens, for the cross-entropy) of the mean over seeds. Intervals
are 95 % by paired bootstrap over held-out files, of this mean over seeds. The differences of single
seeds are shown beside them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matrix
import numpy as np
from matrix import ROOT, Run, Setup
from numpy.typing import NDArray
from run import chosen_rates, kind_of, mean_of, read

from hf_ebft.evaluation import PairedDifference, paired_bootstrap

FIGURES = {
    "cross_entropy": "cross-entropy, nats/token ↓",
    "cfm_loss@8": "CFM loss, 8 tokens ↓",
    "cfm_loss@16": "CFM loss, 16 tokens ↓",
    "cfm_loss@32": "CFM loss, 32 tokens ↓",
    "cfm_loss@64": "CFM loss, 64 tokens ↓",
    "energy_score@8": "energy score, 8 tokens ↓",
    "energy_score@64": "energy score, 64 tokens ↓",
    "excess_over_spread@8": "excess over own spread, 8 tokens (0 is right)",
    "excess_over_spread@64": "excess over own spread, 64 tokens (0 is right)",
    "second_cfm_loss@8": "CFM loss, 8 tokens, second network ↓",
    "second_energy_score@8": "energy score, 8 tokens, second network ↓",
    "cosine_alignment@8": "alignment, 8 tokens ↑",
    "cosine_alignment@64": "alignment, 64 tokens ↑",
    "dot_diversity@8": "diversity, 8 tokens",
    "dot_diversity@64": "diversity, 64 tokens",
    "entropy@8": "entropy of rollouts, nats/token",
    "duplicates@8": "duplicate rollouts, 8 tokens",
    "parse_greedy": "parses, greedy ↑",
    "parse_sampled": "parses, sampled ↑",
}
LABELS = {
    "sft_steps": "SFT, equal steps",
    "sft_tokens": "SFT, equal tokens",
    "sft_time": "SFT, equal time",
    "ebft_ce_0.1": "EBFT, `ce_coef` 0.1",
    "ebft": "EBFT",
    "ebft_ema": "EBFT, averaged weights (0.9)",
    "whitening_feature": "whitening by group (feature)",
    "whitening_sample": "whitening by group (sample)",
    "whitening_corpus": "whitening by corpus",
    "ce_0.03": "`ce_coef` 0.03",
    "ce_0.1": "`ce_coef` 0.1",
    "diversity_0": "`diversity_coef` 0",
    "diversity_0.5": "`diversity_coef` 0.5",
    "mean_pooling": "`mean_pooling`",
    "reinforce": "`reinforce`",
    "group_norm": "`group_norm`",
    "fitted": "`fitted`",
    "naive_baseline": "naive leave-one-out",
    "kl_0.1": "`kl_coef` 0.1",
}
SHORT = ("cross_entropy", "cfm_loss@8", "cfm_loss@64", "cosine_alignment@8", "dot_diversity@8")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the tables, draw the plots."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--results", type=Path, default=ROOT / "studies" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "study.md")
    options = parser.parse_args(argv)
    results = {name: Results(options.results, setup) for name, setup in matrix.SETUPS.items()}
    text = options.docs.read_text(encoding="utf-8")
    options.docs.write_text(with_tables(text, results), encoding="utf-8")
    draw(results[matrix.TINY.name], options.results / "study.png")


def with_tables(text: str, results: Mapping[str, Results]) -> str:
    """The page with its tables made anew; `results`: by setup."""

    def table(found: re.Match[str]) -> str:
        setup, _, name = found[2].rpartition("_")
        tables = WARM_TABLES if setup == matrix.WARM.name else TABLES
        return f"{found[1]}{tables[name](results[setup or matrix.TINY.name])}\n{found[3]}"

    return BLOCK.sub(table, text)


# ---- Results --------------------------------------------------------------------------------


class Results:
    """The runs of a setup that are there.

    Args:
        root: folder of the setups' folders.
        setup: whose.
    """

    def __init__(self, root: Path, setup: Setup) -> None:
        self.setup, self.folder = setup, root / setup.name
        folder = self.folder
        names = sorted(path.stem for path in folder.glob("*.json"))
        self.runs = {
            name: read(folder, name) for name in names if name.startswith(("tune-", "report-"))
        }
        self.probe = read(folder, "probe-rewards") if "probe-rewards" in names else None
        self.stop_rule = read(folder, "stop_rule") if "stop_rule" in names else None

    def of(self, arm: str, split: str = "report") -> list[dict[str, Any]]:
        """The runs of an arm, by seed and rate."""
        found = [
            result
            for result in self.runs.values()
            if (result["run"]["arm"], result["run"]["split"]) == (arm, split)
        ]
        return sorted(found, key=lambda r: (r["run"]["seed"], r["run"]["learning_rate"] or 0))

    def evaluations(self, arm: str) -> dict[int, dict[str, Any]]:
        """Seed -> evaluation on `report`; `ebft_ema` are the averaged weights of `ebft`."""
        key = "evaluation_ema" if arm == "ebft_ema" else "evaluation"
        runs = self.of(arm.removesuffix("_ema"))
        return {r["run"]["seed"]: r[key] for r in runs if key in r}

    def base(self, split: str = "report") -> dict[str, Any]:
        """Evaluation of the untrained model."""
        found: dict[str, Any] = self.runs[f"{split}-base-seed0"]["evaluation"]
        return found

    def figures(self) -> dict[str, str]:
        """What was measured, with labels."""
        measured = self.base()["by_file"]
        return {figure: label for figure, label in FIGURES.items() if figure in measured}

    def rates(self) -> dict[str, float]:
        """Method -> rate chosen for it; empty while the sweep is not finished."""
        swept = {run.name for run in matrix.sweep_runs(self.setup)} <= self.runs.keys()
        return chosen_rates(self.setup, self.folder) if swept else {}


def seeds_mean(evaluations: Sequence[dict[str, Any]], figure: str) -> NDArray[np.float64]:
    """(F,) by file, mean over seeds."""
    return np.mean([e["by_file"][figure] for e in evaluations], axis=0).astype(np.float64)


def difference(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], figure: str
) -> PairedDifference:
    """Of the means over seeds, with an interval by bootstrap over files."""
    return paired_bootstrap(
        seeds_mean(before, figure),
        seeds_mean(after, figure),
        weights=after[0]["weights"][kind_of(figure)],
    )


def seed_differences(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], figure: str
) -> list[float]:
    """Of the means over documents, seed by seed; one `before` serves all."""
    first = [mean_of(e, figure) for e in before] * (len(after) if len(before) == 1 else 1)
    return [mean_of(e, figure) - b for e, b in zip(after, first, strict=True)]


def certain(paired: PairedDifference, by_seed: Sequence[float]) -> bool:
    """Beyond the noise of the files, and of one sign for all seeds."""
    return paired.beyond_noise and (min(by_seed) > 0 or max(by_seed) < 0)


# ---- Tables ---------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def number(value: float, sign: str = "") -> str:
    """Three decimals."""
    return f"{round(value, 3) + 0.0:{sign}.3f}"


def change(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], figure: str) -> str:
    """A difference, its interval, and its range over seeds."""
    paired = difference(before, after, figure)
    by_seed = seed_differences(before, after, figure)
    text = number(paired.difference, "+")
    text = f"**{text}**" if certain(paired, by_seed) else text
    text += f" [{number(paired.low, '+')}, {number(paired.high, '+')}]"
    if len(by_seed) > 1:
        text += f" ({number(min(by_seed), '+')} to {number(max(by_seed), '+')})"
    return text


def runs_table(results: Results) -> str:
    """What was declared, and what is there."""
    setup, rates = results.setup, results.rates()
    declared = {
        "untrained model": matrix.base_runs(setup),
        "sweep, `tune`": matrix.sweep_runs(setup),
        "main comparison, `report`": matrix.main_runs(setup, rates) if rates else [],
    }
    if setup.with_ablations and "ebft" in rates:
        ablations = matrix.ablation_runs(setup, rates["ebft"])
        whitening = [run for run in ablations if run.arm in matrix.WHITENING]
        declared["whitening, `report`"] = whitening
        declared["other factors, `report`"] = [r for r in ablations if r not in whitening]
        declared["sweep of whitening by group, `tune`"] = matrix.whitened_sweep_runs(setup)
        declared["`fitted`, `report`"] = matrix.fitted_runs(setup, rates["ebft"])
        declared["sweep of `reinforce`, `tune`"] = matrix.reinforce_sweep_runs(setup)
        declared["SFT at equal time, `report`"] = matrix.equal_time_runs(setup, rates["sft_tokens"])
    rows = [
        [label, str(len(runs)), str(sum(run.name in results.runs for run in runs)), missing]
        for label, runs in declared.items()
        if (missing := ", ".join(absent(runs, results)) or "-")
    ]
    return table(["part", "declared", "run", "not run"], rows)


def absent(runs: Sequence[Run], results: Results) -> list[str]:
    """Arms of runs that are not there, with their seeds or rates."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.name not in results.runs:
            which = f"{run.learning_rate:g}" if run.split == "tune" else f"seed {run.seed}"
            found.setdefault(run.arm, []).append(which)
    return [f"`{arm}` ({', '.join(which)})" for arm, which in found.items()]


def sweep_table(results: Results) -> str:
    """Every method at every rate, on `tune`."""
    base = results.base("tune")
    figures = ("cross_entropy", "cfm_loss@8", "entropy@8")
    rows = [["untrained", "-", *(number(mean_of(base, figure)) for figure in figures)]]
    for arm in (*matrix.CRITERIA, "whitening_feature", "reinforce"):
        runs = results.of(arm, "tune")
        criterion = matrix.CRITERIA.get(arm, "cfm_loss@8")
        best = min((mean_of(r["evaluation"], criterion) for r in runs), default=None)
        for result in runs:
            cells = [number(mean_of(result["evaluation"], figure)) for figure in figures]
            at = figures.index(criterion)
            if mean_of(result["evaluation"], criterion) == best:
                cells[at] = f"**{cells[at]}**"
            rows.append([LABELS[arm], f"{result['run']['learning_rate']:g}", *cells])
    return table(["method", "learning rate", *(FIGURES[figure] for figure in figures)], rows)


def main_table(results: Results) -> str:
    """Base, SFT and EBFT: every figure, values."""
    arms = [arm for arm in (*matrix.CRITERIA, "ebft_ema") if results.evaluations(arm)]
    base = results.base()
    rows = []
    for figure, label in results.figures().items():
        cells = [number(mean_of(base, figure))]
        for arm in arms:
            evaluations = list(results.evaluations(arm).values())
            value = np.mean([mean_of(e, figure) for e in evaluations])
            cells.append(f"{number(float(value))}, {change([base], evaluations, figure)}")
        rows.append([label, *cells])
    if "parse_truth" in base["by_file"]:
        truth = number(mean_of(base, "parse_truth"))
        rows.append(["parses, the file's own continuation", truth, *("" for _ in arms)])
    return table(["", "untrained", *(LABELS[arm] for arm in arms)], rows)


def cost_table(results: Results) -> str:
    """Tokens and time of one training run."""
    rows = []
    for arm in (*matrix.CRITERIA, "sft_time"):
        runs = results.of(arm)
        if not runs:
            continue
        seen = [r["training"] for r in runs]
        rows.append(
            [
                LABELS[arm],
                f"{runs[0]['run']['learning_rate']:g}",
                str(len(runs)),
                str(seen[0]["steps"]),
                *(
                    f"{np.mean([s[kind] for s in seen]):,.0f}"
                    for kind in ("document_tokens", "rollout_tokens")
                ),
                f"{np.mean([r['cpu_seconds']['training'] for r in runs]):.0f}",
            ]
        )
    head = ["method", "learning rate", "seeds", "steps", "document tokens", "rollout tokens"]
    return table([*head, "core-seconds"], rows)


def direct_table(results: Results) -> str:
    """EBFT less SFT."""
    ebft = results.evaluations("ebft")
    rows = []
    arms = [a for a in ("sft_steps", "sft_tokens", "sft_time") if results.evaluations(a)]
    for figure, label in results.figures().items():
        cells = []
        for arm in arms:
            other = results.evaluations(arm)
            seeds = sorted(ebft.keys() & other.keys())
            cells.append(change([other[s] for s in seeds], [ebft[s] for s in seeds], figure))
        rows.append([label, *cells])
    return table(["EBFT less", *(LABELS[arm] for arm in arms)], rows)


def factor_rows(results: Results, arms: Sequence[str], figures: Sequence[str]) -> list[list[str]]:
    """Differences of arms from EBFT, of the same seeds."""
    ebft = results.evaluations("ebft")
    rows = []
    for arm in arms:
        other = results.evaluations(arm)
        seeds = sorted(ebft.keys() & other.keys())
        if seeds:
            before, after = [ebft[s] for s in seeds], [other[s] for s in seeds]
            cells = [change(before, after, figure) for figure in figures]
            rows.append([LABELS[arm], str(len(seeds)), *cells])
    return rows


def whitening_table(results: Results) -> str:
    """Each whitening, from the untrained model and from EBFT without it."""
    base = results.base()
    figures = ("cross_entropy", "entropy@8", *SHORT[1:])
    rows = []
    for arm in ("ebft", *matrix.WHITENING):
        evaluations = list(results.evaluations(arm).values())
        if evaluations:
            label = "no whitening" if arm == "ebft" else LABELS[arm]
            cells = [change([base], evaluations, figure) for figure in figures]
            rows.append([label, str(len(evaluations)), *cells])
    head = ["less the untrained model", "seeds", *(FIGURES[figure] for figure in figures)]
    second = ["less no whitening", *head[1:]]
    rows_2 = factor_rows(results, list(matrix.WHITENING), figures)
    return f"{table(head, rows)}\n\n{table(second, rows_2)}"


def log_table(results: Results) -> str:
    """What training logged at its beginning and end: reward's own alignment and diversity."""
    names = ("alignment", "diversity", "entropy", "duplicate_rollouts", "advantages_std")
    rows = []
    for arm in ("ebft", *matrix.WHITENING):
        logs = [r["training"]["log"] for r in results.of(arm)]
        if logs:
            cells = [
                f"{number(np.mean([log[0][f'ebft/{name}'] for log in logs]).item())} to "
                f"{number(np.mean([log[-1][f'ebft/{name}'] for log in logs]).item())}"
                for name in names
            ]
            rows.append(["no whitening" if arm == "ebft" else LABELS[arm], *cells])
    head = ["alignment", "diversity", "entropy", "duplicates", "spread of advantages"]
    return table(["as rewarded, first to last log", *head], rows)


def probe_table(results: Results) -> str:
    """The same rollouts under each whitening."""
    if results.probe is None:
        return "Not run."
    names = {
        "alignment": "alignment",
        "diversity": "diversity",
        "within": "spread of the reward in a group",
        "agreement": "correlation with the unwhitened reward",
        "advantages": "correlation of the RLOO advantages",
    }
    rows = [
        [
            "no whitening" if space == "off" else LABELS[f"whitening_{space}"],
            *(number(reward[name]) for name in names),
        ]
        for space, reward in results.probe["rewards"].items()
    ]
    return table(["", *names.values()], rows)


def factors_table(results: Results) -> str:
    """The other factors."""
    figures = ("cross_entropy", "entropy@8", *SHORT[1:], "parse_sampled")
    rows = factor_rows(results, [*matrix.OTHER_FACTORS, *matrix.FITTED, "ebft_ema"], figures)
    return table(["less EBFT", "seeds", *(FIGURES[figure] for figure in figures)], rows)


def correction_table(results: Results) -> str:
    """EBFT with and without a baseline, from the untrained model and beside SFT."""
    base = results.base()
    sft = results.evaluations("sft_steps")
    arms = {"ebft": "EBFT (`rloo`)", "reinforce": "EBFT (`reinforce`)", "fitted": "EBFT (`fitted`)"}
    arms = {arm: label for arm, label in arms.items() if results.evaluations(arm)}
    rows = []
    for figure, label in results.figures().items():
        cells = []
        for arm in arms:
            after = results.evaluations(arm)
            seeds = sorted(after.keys() & sft.keys())
            runs = [after[s] for s in seeds]
            cells.append(change([base], runs, figure))
            cells.append(change([sft[s] for s in seeds], runs, figure))
        rows.append([label, *cells])
    labels = arms.values()
    head = [
        f"{label} less {other}" for label in labels for other in ("untrained", "SFT, equal steps")
    ]
    return table(["", *head], rows)


# ---- From the warm start --------------------------------------------------------------------


def rule_table(results: Results) -> str:
    """Noise scales at the warm start, and the products that the stop rule is about."""
    rule = results.stop_rule
    if rule is None:
        return "Not run."
    labels = {"rloo": "EBFT, `rloo`", "reinforce": "EBFT, `reinforce`"}
    labels["cross_entropy"] = "cross-entropy"
    rows = []
    for name, label in labels.items():
        cosine = rule["cosines"][name]
        product = [1e4 * cosine[key] for key in ("product", "product_low", "product_high")]
        rows.append(
            [
                label,
                documents(rule["scales"][f"train/{name}"]),
                documents(rule["scales"][f"tune/{name}"]),
                "{:+.1f} [{:+.1f}, {:+.1f}]".format(*product),
            ]
        )
    head = ["gradient", "noise scale, training text", "noise scale, held-out text"]
    return table([*head, "product with the held-out CFM gradient, 1e-4"], rows)


def documents(scale: dict[str, Any]) -> str:
    """A noise scale in documents, with its interval; None stands for infinity."""
    value, low, high = (
        "∞" if scale[key] is None else f"{max(scale[key], 0):,.0f}"
        for key in ("documents", "low", "high")
    )
    return f"{value} [{low}, {high}]"


def controls_table(results: Results) -> str:
    """The warm start, and what sharpening alone makes of it."""
    base = results.base()
    arms = [f"tempered_{t:g}" for t in results.setup.controls]
    rows = [
        [
            label,
            number(mean_of(base, figure)),
            *(change([base], list(results.evaluations(arm).values()), figure) for arm in arms),
        ]
        for figure, label in results.figures().items()
    ]
    temperatures = [f"temperature {t:g}, less it" for t in results.setup.controls]
    return table(["", "warm start", *temperatures], rows)


def warm_sweep_table(results: Results) -> str:
    """Every swept method that was run, on `tune`."""
    figures = ("cross_entropy", "cfm_loss@8", "energy_score@8", "entropy@8")
    base = results.base("tune")
    rows = [["warm start", "-", "-", *(number(mean_of(base, figure)) for figure in figures)]]
    for arm in matrix.WARM_CRITERIA:
        for result in results.of(arm, "tune"):
            cells = [number(mean_of(result["evaluation"], figure)) for figure in figures]
            seconds = f"{result['cpu_seconds']['training']:.0f}"
            rows.append([LABELS[arm], f"{result['run']['learning_rate']:g}", seconds, *cells])
    head = ["method", "learning rate", "core-seconds"]
    return table([*head, *(FIGURES[figure] for figure in figures)], rows)


WARM_TABLES: dict[str, Callable[[Results], str]] = {
    "rule": rule_table,
    "controls": controls_table,
    "rates": warm_sweep_table,
}
TABLES: dict[str, Callable[[Results], str]] = {
    "runs": runs_table,
    "sweep": sweep_table,
    "cost": cost_table,
    "main": main_table,
    "direct": direct_table,
    "whitening": whitening_table,
    "log": log_table,
    "probe": probe_table,
    "factors": factors_table,
    "correction": correction_table,
}


# ---- Plots ----------------------------------------------------------------------------------


def draw(results: Results, path: Path) -> None:
    """Four panels, as PNG. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(12, 8.5), layout="constrained")
    FigureCanvasAgg(canvas)
    (sweep, lengths), (scatter, curves) = canvas.subplots(2, 2)
    _draw_sweep(results, sweep)
    _draw_lengths(results, lengths)
    _draw_scatter(results, scatter)
    _draw_entropy(results, curves)
    canvas.savefig(path, dpi=100)


def _draw_sweep(results: Results, axes: Any) -> None:
    base = results.base("tune")
    for arm in (*matrix.CRITERIA, "whitening_feature"):
        runs = results.of(arm, "tune")
        if runs:
            rates = [r["run"]["learning_rate"] for r in runs]
            loss = [mean_of(r["evaluation"], "cfm_loss@8") for r in runs]
            axes.plot(rates, loss, marker="o", label=LABELS[arm])
    axes.axhline(mean_of(base, "cfm_loss@8"), color="grey", linestyle=":", label="untrained")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_title("CFM loss, 8 tokens, on the development split ↓")
    axes.legend(fontsize="small")


def _draw_lengths(results: Results, axes: Any) -> None:
    base = [results.base()]
    for shift, arm in enumerate((*matrix.CRITERIA, *matrix.WHITENING)):
        after = list(results.evaluations(arm).values())
        if after:
            found = [difference(base, after, f"cfm_loss@{g}") for g in results.setup.lengths]
            middle = np.array([paired.difference for paired in found])
            bounds = [
                middle - [paired.low for paired in found],
                [paired.high for paired in found] - middle,
            ]
            places = np.array(results.setup.lengths) * 1.03 ** (shift - 2)
            axes.errorbar(places, middle, bounds, marker="o", capsize=2, label=LABELS[arm])
    axes.axhline(0, color="grey", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(results.setup.lengths, [str(g) for g in results.setup.lengths])
    axes.set_xlabel("rollout tokens (training: 8)")
    axes.set_title("CFM loss less the untrained model's ↓")
    axes.legend(fontsize="small")


def _draw_scatter(results: Results, axes: Any) -> None:
    for arm in (*matrix.CRITERIA, *matrix.WHITENING, *matrix.OTHER_FACTORS):
        found = list(results.evaluations(arm).values())
        if found:
            axes.scatter(
                [mean_of(e, "cross_entropy") for e in found],
                [mean_of(e, "cfm_loss@8") for e in found],
                marker="o" if arm in matrix.CRITERIA else "x",
                label=LABELS[arm].replace("`", ""),
            )
    base = results.base()
    axes.scatter(
        [mean_of(base, "cross_entropy")],
        [mean_of(base, "cfm_loss@8")],
        marker="*",
        s=120,
        color="black",
        label="untrained",
    )
    axes.set_xlabel("cross-entropy, nats/token ↓")
    axes.set_ylabel("CFM loss, 8 tokens ↓")
    axes.set_title("Every run on the report split")
    axes.legend(fontsize="x-small", ncols=2)


def _draw_entropy(results: Results, axes: Any) -> None:
    for arm in ("ebft", *matrix.WHITENING):
        logs = [r["training"]["log"] for r in results.of(arm)]
        if logs:
            steps = [entry["step"] for entry in logs[0]]
            entropy = np.mean([[entry["ebft/entropy"] for entry in log] for log in logs], axis=0)
            label = "no whitening" if arm == "ebft" else LABELS[arm]
            axes.plot(steps, entropy, marker=".", label=label)
    axes.set_xlabel("step")
    axes.set_title("Entropy of rollouts in training, nats/token (mean over seeds)")
    axes.legend(fontsize="small")


if __name__ == "__main__":
    main()
