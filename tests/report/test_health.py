"""Every rule speaks up on the run that it is for, and on no healthy one."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_ebft.report import Finding, Run, examine, load_run
from hf_ebft.report import health as rules
from hf_ebft.training.metric_table import label_of
from hf_ebft.watching.curves import Series, series_of

LOGS = Path(__file__).parent / "run_logs"
POINTS = 40
ARGUMENTS = {
    "n_samples_per_prompt": 4,
    "temperature": 0.6,
    "rl_coef": 1.0,
    "diversity_coef": 1.0,
    "use_whitening": False,
    "whitening_space": "feature",
}


def ramp(first: float, last: float, noise: float = 0.0, seed: int = 0) -> list[float]:
    """A straight line with noise."""
    generator = random.Random(seed)
    return [
        first + (last - first) * place / (POINTS - 1) + generator.gauss(0, noise)
        for place in range(POINTS)
    ]


def healthy(seed: int = 0) -> dict[str, list[float]]:
    """Curves as the demo's are."""
    return {
        "loss": ramp(-0.02, -0.02, 0.02, seed),
        "grad_norm": ramp(0.16, 0.17, 0.01, seed),
        "ebft/cfm_loss": ramp(0.72, 0.58, 0.02, seed),
        "ebft/energy_score": ramp(0.58, 0.5, 0.02, seed),
        "ebft/alignment": ramp(0.55, 0.8, 0.04, seed),
        "ebft/diversity": ramp(0.53, 0.75, 0.02, seed),
        "ebft/mean_reward": ramp(0.02, 0.05, 0.02, seed),
        "ebft/entropy": ramp(2.35, 1.74, 0.05, seed),
        "ebft/duplicate_rollouts": ramp(0.0, 0.06, 0.01, seed),
        "ebft/zero_advantage_groups": ramp(0.0, 0.05, 0.01, seed),
        "ebft/advantages_std": ramp(0.4, 0.45, 0.02, seed),
        "ebft/documents_without_blocks": ramp(0.0, 0.0),
        "ebft/blocks_per_document": ramp(15, 15),
        "ebft/seconds_rollout": ramp(0.8, 0.8),
        "ebft/seconds_features": ramp(0.5, 0.5),
        "ebft/seconds_training": ramp(2.4, 2.4),
        "eval_loss": [2.26, 2.21, 2.19, 2.18, 2.17],
    }


def run_of(changes: dict[str, list[float]] | None = None, **arguments: Any) -> Run:
    curves = healthy() | (changes or {})
    series = {name: Series(tuple(range(1, len(v) + 1)), tuple(v)) for name, v in curves.items()}
    return Run("run", series, ARGUMENTS | arguments)


def only(rule: Callable[[Run], Finding | None], run: Run) -> Finding:
    finding = rule(run)
    assert finding is not None
    assert finding in examine(run)
    assert finding.evidence
    assert finding.advice
    return finding


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_raises_no_alarm(seed: int) -> None:
    series = {
        name: Series(tuple(range(1, len(v) + 1)), tuple(v)) for name, v in healthy(seed).items()
    }
    assert examine(Run("run", series, ARGUMENTS)) == []
    assert examine(Run("run", series)) == [], "nor where the settings are unknown"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("healthy", set()),
        (
            "cold",
            {"Rollouts repeat each other", "The entropy has collapsed", "Hardly any advantages"},
        ),
        (
            "diverged",
            {
                "The cross-entropy rises",
                "The entropy has collapsed",
                "Alignment falls",
                "The CFM loss rises",
            },
        ),
    ],
)
def test_real_runs(name: str, expected: set[str]) -> None:
    """Logs of `hf-ebft train` with the demo's settings (healthy), with temperature 0.05
    (cold), and on prose with whitening and a learning rate of 5e-3 (diverged).
    """
    run = load_run(LOGS / name)
    assert {finding.title for finding in examine(run)} == expected


def test_a_run_that_stands_still_raises_no_alarm() -> None:
    for seed in range(20):
        curves = {name: ramp(0.5, 0.5, 0.1, seed) for name in healthy() if name.startswith("ebft")}
        # Shares of a half would be alarming of themselves.
        curves |= {name: ramp(0.1, 0.1, 0.01, seed) for name in curves if "_" in name}
        series = {n: Series(tuple(range(len(v))), tuple(v)) for n, v in curves.items()}
        found = examine(Run("run", series, ARGUMENTS))
        assert [f for f in found if f.severity != "note"] == []


@pytest.mark.parametrize(("share", "severity"), [(0.3, None), (0.45, "warning"), (0.65, "serious")])
def test_duplicates(share: float, severity: str | None) -> None:
    run = run_of({"ebft/duplicate_rollouts": ramp(share, share)})
    if severity is None:
        assert rules.duplicate_rollouts(run) is None
        return
    finding = only(rules.duplicate_rollouts, run)
    assert finding.severity == severity
    assert "75%" in finding.evidence
    assert "now 0.6" in finding.advice


def test_duplicates_are_measured_against_what_can_be() -> None:
    """Of two rollouts only one can be a repetition."""
    changes = {"ebft/duplicate_rollouts": ramp(0.45, 0.45)}
    assert only(rules.duplicate_rollouts, run_of(changes, n_samples_per_prompt=2)).severity == (
        "serious"
    )
    unknown = Run("r", run_of(changes).series)
    assert rules.duplicate_rollouts(unknown) is None


def test_zero_advantages() -> None:
    half = run_of({"ebft/zero_advantage_groups": ramp(0.1, 0.7)})
    assert only(rules.zero_advantages, half).severity == "warning"
    everything = run_of({"ebft/zero_advantage_groups": ramp(1.0, 1.0)})
    assert only(rules.zero_advantages, everything).severity == "serious"
    flat = run_of({"ebft/advantages_std": ramp(0.4, 0.0)[:-10] + [0.0] * 10})
    assert only(rules.zero_advantages, flat).severity == "serious"


def test_diverging_cross_entropy() -> None:
    held_out = run_of({"eval_loss": [2.3, 2.2, 2.5, 2.9, 3.4]})
    finding = only(rules.diverging_cross_entropy, held_out)
    assert finding.severity == "serious"
    assert "held-out" in finding.evidence
    assert only(rules.diverging_cross_entropy, run_of({"eval_loss": [2.2, 2.5]})).severity == (
        "warning"
    )
    training = run_of({"ebft/ce_loss": ramp(2.0, 2.6, 0.02)})
    del training.series["eval_loss"]  # type: ignore[attr-defined]
    assert "training text" in only(rules.diverging_cross_entropy, training).evidence
    noisy = run_of({"ebft/ce_loss": ramp(2.0, 2.0, 0.5)})
    del noisy.series["eval_loss"]  # type: ignore[attr-defined]
    assert rules.diverging_cross_entropy(noisy) is None


def test_the_policy_loss_of_structured_mode_is_no_cross_entropy() -> None:
    log = [
        {"step": step, "ebft/ground_truth_length": 9.0, "eval_loss": step, "eval_ebft/ce_loss": 2.0}
        for step in range(1, 9)
    ]
    series = series_of(log)
    assert "eval_loss" not in series
    assert label_of("eval_policy_loss") == "policy loss, held-out"
    assert rules.diverging_cross_entropy(Run("run", series)) is None
    rising = series_of([entry | {"eval_ebft/ce_loss": 2.0 + entry["step"]} for entry in log])
    assert "held-out" in only(rules.diverging_cross_entropy, Run("run", rising)).evidence


def test_collapsed_entropy() -> None:
    gone = run_of({"ebft/entropy": ramp(0.05, 0.04)})
    assert only(rules.collapsed_entropy, gone).severity == "serious"
    falling = {"ebft/entropy": ramp(3.0, 0.3)}
    assert rules.collapsed_entropy(run_of(falling)) is None, "the CFM loss falls: it is learning"
    stuck = run_of(falling | {"ebft/cfm_loss": ramp(0.7, 0.7, 0.02)})
    assert only(rules.collapsed_entropy, stuck).severity == "warning"
    sharper = run_of({**falling, "eval_loss": [2.2, 2.5]})
    assert only(rules.collapsed_entropy, sharper).severity == "warning", "sharpening is no learning"


def test_trends_in_the_wrong_direction() -> None:
    assert only(rules.falling_alignment, run_of({"ebft/alignment": ramp(0.8, 0.5, 0.04)}))
    assert only(rules.rising_cfm_loss, run_of({"ebft/cfm_loss": ramp(0.7, 0.8, 0.02)}))
    assert rules.falling_alignment(run_of({"ebft/alignment": ramp(0.8, 0.77, 0.001)})) is None
    assert rules.rising_cfm_loss(run_of({"ebft/cfm_loss": ramp(0.7, 0.71, 0.001)})) is None
    spread = {"ebft/energy_score": ramp(0.5, 0.6, 0.01), "ebft/cfm_loss": ramp(0.7, 0.65, 0.01)}
    assert only(rules.only_sharper, run_of(spread)).title == "The policy only becomes sharper"
    assert rules.only_sharper(run_of(spread | {"ebft/energy_score": ramp(0.5, 0.45, 0.01)})) is None
    assert rules.only_sharper(run_of(spread | {"ebft/cfm_loss": ramp(0.7, 0.8, 0.01)})) is None
    lost = run_of({"ebft/alignment": ramp(0.8, 0.7, 1.0)})
    assert rules.falling_alignment(lost) is None, "not in noise as large as this"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_metrics_that_are_not_finite(bad: float) -> None:
    curve = ramp(0.1, 0.1)
    curve[7] = curve[9] = bad
    finding = only(rules.not_finite, run_of({"grad_norm": curve}))
    assert finding.severity == "serious"
    assert "grad_norm at step 8, 10" in finding.evidence


def test_everything_not_finite_is_told_and_breaks_nothing() -> None:
    run = run_of({name: [math.nan] * 3 for name in healthy()})
    assert examine(run)[0].severity == "serious"


def test_gradient_kl_time_and_short_documents() -> None:
    assert only(rules.growing_gradient, run_of({"grad_norm": [0.1 * 1.2**k for k in range(40)]}))
    assert only(rules.large_kl, run_of({"ebft/kl": ramp(0.0, 3.0)}))
    slow = only(rules.rollouts_take_the_time, run_of({"ebft/seconds_rollout": ramp(9.0, 9.0)}))
    assert slow.severity == "note"
    assert "76%" in slow.evidence
    short = run_of({"ebft/documents_without_blocks": ramp(0.5, 0.5)})
    assert only(rules.documents_without_blocks, short)


def test_whitening_without_a_diversity_term_is_noted() -> None:
    flat = {"ebft/diversity": ramp(0.001, 0.002)}
    finding = only(rules.no_diversity_term, run_of(flat, use_whitening=True))
    assert finding.severity == "note"
    assert rules.no_diversity_term(run_of(flat)) is None
    corpus = run_of(flat, use_whitening=True, whitening_space="corpus")
    assert rules.no_diversity_term(corpus) is None
    assert rules.no_diversity_term(run_of(use_whitening=True)) is None
    assert rules.no_diversity_term(run_of(flat, use_whitening=True, diversity_coef=0.0)) is None


def test_short_and_foreign_logs_are_noted() -> None:
    assert only(rules.few_points, run_of({n: [0.5, 0.6] for n in healthy()})).severity == "note"
    foreign = Run("r", {"loss": Series((1, 2), (3.0, 2.0))})
    assert [finding.title for finding in examine(foreign)] == ["No EBFT metrics"]


def test_training_without_rewards_is_not_blamed_for_its_rollouts() -> None:
    bad = {
        "ebft/duplicate_rollouts": ramp(0.7, 0.7),
        "ebft/zero_advantage_groups": ramp(1.0, 1.0),
        "ebft/entropy": ramp(0.01, 0.01),
        "ebft/alignment": ramp(0.8, 0.1),
        "ebft/cfm_loss": ramp(0.1, 0.8),
    }
    assert len(examine(run_of(bad))) == 5
    assert examine(run_of(bad, rl_coef=0.0)) == []


def test_the_serious_comes_first() -> None:
    run = run_of(
        {
            "ebft/seconds_rollout": ramp(9.0, 9.0),
            "ebft/alignment": ramp(0.8, 0.1),
            "ebft/entropy": ramp(0.01, 0.01),
        }
    )
    assert [finding.severity for finding in examine(run)] == ["serious", "warning", "note"]
