"""Checks TRL's trainers: the baseline that they subtract, and settings that change advantages."""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

logger = logging.getLogger(__name__)

Baseline = Literal["group_mean", "leave_one_out"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)

_OF_EQUATION = "the advantages are then not those of the paper (eq. 94)"


def check_trainer(trainer: Any, baseline: Baseline) -> None:
    """Check the trainer that calls a reward function.

    Settings that change the advantages are logged as a warning, since they may be intended.

    Args:
        trainer: one of TRL's trainers; other objects, and None, are not checked.
        baseline: the baseline that the reward function assumes.

    Raises:
        ValueError: the trainer subtracts another baseline.
    """
    from trl import GRPOConfig, RLOOConfig  # type: ignore[attr-defined]  # re-exported lazily

    args = getattr(trainer, "args", None)
    name = type(trainer).__name__
    if isinstance(args, RLOOConfig):
        _require(baseline, "leave_one_out", name)
        for reason in _changes_of_rloo(args):
            logger.warning("%s: %s; %s.", name, reason, _OF_EQUATION)
    elif isinstance(args, GRPOConfig):
        _require(baseline, "group_mean", name)
        for reason in _changes_of_grpo(args):
            logger.warning("%s: %s; %s.", name, reason, _OF_EQUATION)


def _require(given: Baseline, own: Baseline, name: str) -> None:
    if given != own:
        raise ValueError(
            f"trainer_baseline={given!r} does not fit {name}, which subtracts {own}, so its "
            f"advantages would be scaled. Give FeatureMatchingReward trainer_baseline={own!r}."
        )


def _changes_of_grpo(args: Any) -> list[str]:
    reasons = []
    if args.scale_rewards != "none":
        reasons.append(
            f"scale_rewards={args.scale_rewards!r} divides finished advantages by a standard "
            "deviation (set scale_rewards='none'; for advantages over the group's standard "
            "deviation give FeatureMatchingReward advantage_estimator='group_norm' as well)"
        )
    if args.multi_objective_aggregation != "sum_then_normalize":
        reasons.append(
            f"multi_objective_aggregation={args.multi_objective_aggregation!r} divides finished "
            "advantages by standard deviations (set 'sum_then_normalize')"
        )
    return reasons


def _changes_of_rloo(args: Any) -> list[str]:
    reasons = []
    if args.beta != 0:
        reasons.append(
            f"beta={args.beta} takes a KL penalty from every reward (set beta=0 for feature "
            "matching alone)"
        )
    if args.normalize_advantages:
        reasons.append(
            "normalize_advantages=True divides finished advantages by their standard deviation "
            "(set it to False)"
        )
    if args.reward_clip_range:
        reasons.append(
            f"reward_clip_range={args.reward_clip_range} clips finished advantages (unset it)"
        )
    return reasons
