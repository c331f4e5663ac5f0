"""Weights of the loss's parts that move over the optimizer steps of a run.

A weight depends on the number of the optimizer step and on how many there are, and on nothing else:
the micro-batches of a step, all processes and a resumed run have the same one.
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
        rl, ce, kl: their values.
        scheduled: which of them move in the course of the run, as `"ce_coef"`.
    """

    rl: float
    ce: float
    kl: float
    scheduled: tuple[Coefficient, ...] = ()

    def moving(self) -> dict[str, float]:
        """The values of those that move, by the name of their setting."""
        values = {"rl_coef": self.rl, "ce_coef": self.ce, "kl_coef": self.kl}
        return {name: values[name] for name in self.scheduled}


def coefficients_at(settings: EBFTSettings, step: int, total: int) -> Coefficients:
    """The coefficients of an optimizer step of strided mode.

    Args:
        settings: with `rl_coef`, `rl_coef_schedule`, `rl_coef_final` and so on.
        step: optimizer steps that were made before this one (`state.global_step`).
        total: optimizer steps of the run (`state.max_steps`); 0 where there is no run.
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
    """Whether a coefficient moves in the course of a run."""
    return bool(getattr(settings, f"{name}_schedule") != "constant")


def scheduled_value(
    schedule: CoefficientSchedule, start: float, final: float | None, step: int, total: int
) -> float:
    """A weight at an optimizer step.

    With p = step / (total - 1), so that p is 0 at the first step and 1 at the last one:
    linear is `start + (final - start) * p`, cosine `start + (final - start) * (1 - cos(pi p)) / 2`.
    A run of one step has the weight `start`. After the last step the weight stays `final`.

    Args:
        schedule: the course.
        start, final: the weight at the first and at the last step; no `final` if constant.
        step: steps made before this one.
        total: steps of the run; 0 where there is none.
    """
    if schedule == "constant":
        return start
    assert final is not None  # the configuration has checked it
    progress = min(1.0, step / max(1, total - 1))
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    # The last step has `final` itself, without the rounding of the difference.
    return final if progress == 1.0 else start + (final - start) * progress
