"""Scheduled weights against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from hf_ebft.config import CoefficientSchedule, EBFTSettings
from hf_ebft.objective.schedules import (
    Coefficients,
    coefficient_at,
    coefficients_at,
    is_scheduled,
    scheduled_value,
)

SQRT_HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("schedule", "start", "final", "values"),
    [
        ("constant", 0.3, None, [0.3] * 5),
        ("linear", 0.0, 0.4, [0.0, 0.1, 0.2, 0.3, 0.4]),
        ("linear", 1.0, 0.2, [1.0, 0.8, 0.6, 0.4, 0.2]),
        # cos of 0, 45, 90, 135 and 180 degrees
        ("cosine", 2.0, 0.0, [2.0, 1 + SQRT_HALF, 1.0, 1 - SQRT_HALF, 0.0]),
        ("cosine", 0.0, 0.1, [0.0, (1 - SQRT_HALF) / 20, 0.05, (1 + SQRT_HALF) / 20, 0.1]),
    ],
)
def test_values_of_a_run_of_five_steps(
    schedule: CoefficientSchedule, start: float, final: float | None, values: list[float]
) -> None:
    found = [scheduled_value(schedule, start, final, step, 5) for step in range(5)]
    assert found == pytest.approx(values, abs=1e-15)
    assert found[0] == start
    assert final is None or found[-1] == final


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_values_before_and_after_a_run_and_in_short_runs(
    schedule: CoefficientSchedule,
) -> None:
    def value(step: int, total: int) -> float:
        return scheduled_value(schedule, 0.1, 0.7, step, total)

    assert value(0, 0) == 0.1  # no run yet
    assert value(0, 1) == 0.1
    assert (value(0, 2), value(1, 2)) == (0.1, 0.7)
    assert value(5, 5) == value(50, 5) == 0.7  # evaluations after the last step


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_from_a_value_to_itself_is_that_value(schedule: CoefficientSchedule) -> None:
    """To the bit: a weighted mean of 0.1 and 0.1 may round to another number."""
    assert {scheduled_value(schedule, 0.1, 0.1, step, 1000) for step in range(1000)} == {0.1}


def test_each_coefficient_has_its_own_schedule() -> None:
    settings = EBFTSettings(
        rl_coef=0.0,
        rl_coef_schedule="linear",
        rl_coef_final=1.0,
        ce_coef=0.1,
        kl_coef=0.4,
        kl_coef_schedule="cosine",
        kl_coef_final=0.0,
    )
    middle = coefficients_at(settings, 2, 5)
    assert middle == Coefficients(0.5, 0.1, pytest.approx(0.2), ("rl_coef", "kl_coef"))
    assert middle.scheduled_values() == {"rl_coef": 0.5, "kl_coef": pytest.approx(0.2)}
    assert coefficient_at(settings, "rl_coef", 1, 5) == 0.25
    assert is_scheduled(settings, "rl_coef") and not is_scheduled(settings, "ce_coef")
    assert coefficients_at(EBFTSettings(), 3, 5) == Coefficients(1.0, 0.0, 0.0)
    assert coefficients_at(EBFTSettings(), 3, 5).scheduled_values() == {}
