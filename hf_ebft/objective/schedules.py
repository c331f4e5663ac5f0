"""Schedules of the weights of policy gradient, cross-entropy and KL penalty in the loss.

A weight depends only on the number of the optimizer step and on the total number of steps. So it is
the same for all micro-batches of a step, on all processes and in a resumed run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hf_ebft.config import CoefficientSchedule, EBFTSettings, FeatureMatchingArguments

Coefficient = Literal["rl_coef", "ce_coef", "kl_coef"]


@dataclass(frozen=True)
class Coefficients:
    """Weights of policy gradient, cross-entropy and KL penalty in the loss of one step.

    Attributes:
        rl, ce, kl: the values of `rl_coef`, `ce_coef` and `kl_coef`.
        scheduled: names of those that change during the run.
    """

    rl: float
    ce: float
    kl: float
    scheduled: tuple[Coefficient, ...] = ()

    def scheduled_values(self) -> dict[str, float]:
        """The coefficients that change during the run, by the name of their setting."""
        values = {"rl_coef": self.rl, "ce_coef": self.ce, "kl_coef": self.kl}
        return {name: values[name] for name in self.scheduled}


def coefficients_at(settings: EBFTSettings, step: int, total: int) -> Coefficients:
    """The coefficients of an optimizer step of strided mode.

    Args:
        settings: settings with `rl_coef`, `rl_coef_schedule`, `rl_coef_final` and so on.
        step: number of optimizer steps before this one (`state.global_step`).
        total: number of optimizer steps of the run (`state.max_steps`); 0 if there is no run.
    """
    names: tuple[Coefficient, ...] = ("rl_coef", "ce_coef", "kl_coef")
    rl, ce, kl = (coefficient_at(settings, name, step, total) for name in names)
    return Coefficients(rl, ce, kl, tuple(n for n in names if is_scheduled(settings, n)))


def coefficient_at(
    settings: FeatureMatchingArguments, name: Coefficient, step: int, total: int
) -> float:
    """One coefficient at an optimizer step; arguments as in `coefficients_at`."""
    return scheduled_value(
        getattr(settings, f"{name}_schedule"),
        getattr(settings, name),
        getattr(settings, f"{name}_final"),
        step,
        total,
    )


def is_scheduled(settings: FeatureMatchingArguments, name: Coefficient) -> bool:
    """Whether a coefficient changes during a run."""
    return bool(getattr(settings, f"{name}_schedule") != "constant")


def scheduled_value(
    schedule: CoefficientSchedule, start: float, final: float | None, step: int, total: int
) -> float:
    """A weight at an optimizer step.

    With p = step / (total - 1), so that p is 0 at the first step and 1 at the last one:
    linear is `start + (final - start) * p`, cosine `start + (final - start) * (1 - cos(pi p)) / 2`.
    A run of one step has the weight `start`. After the last step the weight stays `final`.

    Args:
        schedule: how the weight changes.
        start, final: the weight at the first and at the last step; `final` is None if constant.
        step: number of steps before this one.
        total: number of steps of the run; 0 if there is no run.
    """
    if schedule == "constant":
        return start
    assert final is not None  # checked when the settings were made
    progress = min(1.0, step / max(1, total - 1))
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    # At the last step, return `final` itself, without rounding errors.
    return final if progress == 1.0 else start + (final - start) * progress
