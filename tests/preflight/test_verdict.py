"""Every rule speaks up beyond its boundary, and not before it."""

import dataclasses
import math

import pytest

from hf_ebft.evaluation.bootstrap import Interval
from hf_ebft.objective.noise_scale import Estimate
from hf_ebft.preflight import verdict
from hf_ebft.preflight.ladder import OTHER, RANDOM, RUNGS, TRUTH
from hf_ebft.preflight.result import Preflight, Settings
from hf_ebft.report.health import Finding
from tests.support.preflights import at_length, healthy, interval, scale, with_changes


def with_accuracy(pair: tuple[str, str], accuracy: Interval) -> Preflight:
    """A healthy run but for one pair of rungs."""
    orders = [
        dataclasses.replace(order, accuracy=accuracy)
        if (order.better, order.worse) == pair
        else order
        for order in healthy().rewards.orders
    ]
    return with_changes("rewards", orders=orders)


def only(rule: verdict.Rule, found: Preflight) -> Finding:
    finding = rule(found)
    assert finding is not None
    assert finding in verdict.judge(found)
    assert finding.evidence
    assert finding.advice
    return finding


def test_a_healthy_run_gets_a_note_alone() -> None:
    assert [finding.title for finding in verdict.judge(healthy())] == ["Steps are mostly signal"]


@pytest.mark.parametrize(
    ("low", "severity"), [(30.0, "warning"), (639.0, "warning"), (640.0, "serious")]
)
def test_no_signal(low: float, severity: str) -> None:
    found = with_changes("signal", ebft=scale(math.inf, low, math.inf))
    finding = only(verdict.no_signal, found)
    assert finding.severity == severity
    assert f"at {low:,.0f} documents per step or more; yours has 64" in finding.evidence
    # Only a bound above the step's documents is a reason for more of them.
    assert ("gradient_accumulation_steps" in finding.advice) == (low > 64)
    assert "measure more documents" in finding.advice
    assert verdict.mostly_noise(found) is None
    assert verdict.enough_signal(found) is None


@pytest.mark.parametrize(
    ("documents", "low", "severity"),
    [
        (63.9, 30.0, None),
        (64.0, 30.0, "warning"),
        (900.0, 639.0, "warning"),
        (900.0, 640.0, "serious"),
    ],
)
def test_mostly_noise(documents: float, low: float, severity: str | None) -> None:
    found = with_changes("signal", ebft=scale(documents, low))
    finding = verdict.mostly_noise(found)
    assert (finding and finding.severity) == severity
    assert (verdict.enough_signal(found) is None) == (finding is not None)


def test_evidence_and_advice_for_a_noisy_run() -> None:
    found = dataclasses.replace(
        with_changes("signal", ebft=scale(900.0, 600.0, 1800.0)),
        settings=Settings(16, 1, 4, 1.0, 8, 0.0, False, None),
        cost=dataclasses.replace(healthy().cost, rows_per_step=16),
    )
    finding = only(verdict.mostly_noise, found)
    assert finding.evidence == (
        "Signal equals noise at 900 documents per step [600, 1,800]; yours has 16. So a step makes "
        "1.7 % of the progress of a step without noise: expect no progress before about 58 steps."
    )
    assert finding.advice == (
        "Raise gradient_accumulation_steps (now 1; 57 would have as much signal as noise, at about "
        "112 s per step) or n_samples_per_prompt (now 4; the noise of rollouts falls like 1 / n), "
        "or add the signal of the cross-entropy by ce_coef (0.1)."
    )


def test_noise_scales_of_packed_rows_count_rows() -> None:
    found = with_changes("settings", packed=True)
    assert "at 20 rows per step" in only(verdict.enough_signal, found).evidence


@pytest.mark.parametrize(("high", "speaks"), [(2.1, False), (2.0, True)])
def test_cross_entropy_first(high: float, speaks: bool) -> None:
    found = with_changes("signal", cross_entropy=scale(1.0, 0.5, high))
    assert (verdict.cross_entropy_first(found) is not None) == speaks


def test_cross_entropy_without_signal_is_no_advice() -> None:
    found = with_changes("signal", cross_entropy=scale(math.inf, 1.0, math.inf))
    assert verdict.cross_entropy_first(found) is None


@pytest.mark.parametrize(("high", "speaks"), [(0.0, False), (-0.01, True), (math.nan, False)])
def test_opposed(high: float, speaks: bool) -> None:
    found = with_changes("signal", cosine=Estimate(-0.4, -0.8, high))
    assert (verdict.opposed(found) is not None) == speaks


@pytest.mark.parametrize(("excess", "speaks"), [(0.026, False), (0.024, True), (-0.1, True)])
def test_no_headroom(excess: float, speaks: bool) -> None:
    """The upper bound is 0.01 above the excess, the boundary 5 % of 0.7."""
    found = with_changes("headroom", lengths=[at_length(8, excess), at_length(16, 0.3)])
    finding = verdict.no_headroom(found)
    assert (finding is not None) == speaks
    if finding is not None:
        assert finding.severity == "note"
        assert "generate_max_len=16" in finding.advice


def test_longer_rollouts_are_not_praised_without_ground() -> None:
    found = with_changes("headroom", lengths=[at_length(8, 0.0), at_length(16, 0.005)])
    assert "None of the longer rollouts" in only(verdict.no_headroom, found).advice


@pytest.mark.parametrize(("by", "speaks"), [(-0.049, False), (-0.051, True), (0.2, False)])
def test_sharpening(by: float, speaks: bool) -> None:
    """A quarter of an excess of 0.2."""
    found = with_changes("headroom", lengths=[at_length(8, 0.2, by)])
    finding = verdict.sharpening(found)
    assert (finding is not None) == speaks
    assert finding is None or "temperature 0.7 instead of 1" in finding.evidence


@pytest.mark.parametrize(
    ("mean", "margin", "severity"),
    [(0.61, 0.2, None), (0.59, 0.05, "warning"), (0.55, 0.06, "serious"), (0.3, 0.01, "serious")],
)
@pytest.mark.parametrize("pair", [(TRUTH, RUNGS[1]), (TRUTH, OTHER), (TRUTH, RANDOM)])
def test_blind_reward(
    pair: tuple[str, str], mean: float, margin: float, severity: str | None
) -> None:
    finding = verdict.blind_reward(with_accuracy(pair, interval(mean, margin)))
    assert (finding and finding.severity) == severity
    assert finding is None or f"prefers {pair[0]} to {pair[1]}" in finding.evidence


@pytest.mark.parametrize("pair", [(RUNGS[1], RUNGS[2]), (RUNGS[2], OTHER), (RUNGS[2], RANDOM)])
def test_rungs_that_need_no_order(pair: tuple[str, str]) -> None:
    assert verdict.blind_reward(with_accuracy(pair, interval(0.1))) is None


@pytest.mark.parametrize(("mean", "speaks"), [(0.52, False), (0.51, True), (0.4, True)])
@pytest.mark.parametrize("worse", [OTHER, RANDOM])
def test_rollouts_and_other_text(mean: float, speaks: bool, worse: str) -> None:
    """The lower bound is 0.01 below."""
    found = with_accuracy((RUNGS[2], worse), interval(mean))
    finding = verdict.no_better_than_other_text(found)
    assert (finding and finding.severity) == ("note" if speaks else None)


@pytest.mark.parametrize(
    ("rule", "field", "below", "beyond"),
    [
        (verdict.duplicates, "duplicates", 0.374, 0.375),
        (verdict.idle_groups, "zero_advantages", 0.49, 0.5),
        (verdict.short_documents, "without_blocks", 0.19, 0.2),
    ],
)
def test_rules_of_the_report(rule: verdict.Rule, field: str, below: float, beyond: float) -> None:
    assert rule(with_changes("rewards", **{field: below})) is None
    assert only(rule, with_changes("rewards", **{field: beyond})).severity == "warning"


@pytest.mark.parametrize(
    ("used", "fits", "severity"),
    [(7.1, True, None), (7.2, True, "warning"), (3.0, False, "serious")],
)
def test_memory(used: float, fits: bool, severity: str | None) -> None:
    found = with_changes("cost", memory=int(used * 2**30) + 1, fits=fits)
    finding = verdict.memory(found)
    assert (finding and finding.severity) == severity


@pytest.mark.parametrize(("steps", "speaks"), [(43_199, False), (43_200, True), (None, False)])
def test_a_long_run(steps: int | None, speaks: bool) -> None:
    """A day of 2 s steps."""
    assert (verdict.long_run(with_changes("cost", steps=steps)) is not None) == speaks


def test_a_step_that_does_not_fit_says_so_and_breaks_nothing() -> None:
    found = dataclasses.replace(
        with_changes("signal", ebft=scale(900.0, 700.0)),
        cost=dataclasses.replace(healthy().cost, seconds=math.nan, fits=False),
    )
    titles = [finding.title for finding in verdict.judge(found)]
    assert titles[:2] == ["Steps are mostly noise", "A step does not fit into memory"]
    assert "nan" not in only(verdict.mostly_noise, found).advice
