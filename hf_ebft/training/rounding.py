"""Weights of low precision that the steps of an optimizer do not move.

An Adam step changes a weight by about the learning rate, whatever its gradient. A weight in
bfloat16 has 8 significant bits: around 0.02 its neighbours are 1.2e-4 apart, and a step of 1e-6
is rounded away, every time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

logger = logging.getLogger(__name__)

LOW_PRECISION = (torch.bfloat16, torch.float16)
# A run in which no more than this share of weights stand still is not warned of.
TOLERATED_SHARE = 0.1
# Optimizers whose step is about the learning rate, by transformers' names and by their classes'.
STEP_OF_LEARNING_RATE = ("adam", "lion")


def still_weights(weight: Tensor, step: float) -> Tensor:
    """How many entries a step cannot move: it is below half a unit in their last place.

    A unit in the last place of `m * 2^e`, 1/2 <= m < 1, is `2^e` times half the type's epsilon;
    below the smallest normal number units stay what they are there.

    Args:
        weight: in a floating dtype.
        step: at least 0.

    Returns:
        A scalar, int64.
    """
    info = torch.finfo(weight.dtype)
    _, exponent = torch.frexp(weight.detach().float().abs().clamp(min=info.smallest_normal))
    half_unit = torch.ldexp(torch.tensor(info.eps / 4, device=weight.device), exponent)
    return (half_unit > step).sum()


def share_that_stands_still(weights: Iterable[Tensor], step: float) -> float:
    """Share of the entries of trained weights that a step cannot move, those of any precision."""
    still = total = 0
    for weight in weights:
        total += weight.numel()
        if weight.dtype in LOW_PRECISION:
            still += int(still_weights(weight, step))
    return still / total if total else 0.0


def warn_of_still_weights(
    model: nn.Module, args: TrainingArguments, optimizer: object | None, *, upcast: bool
) -> None:
    """Warn where rounding would keep many weights from being trained.

    Args:
        model: the policy, with its weights.
        args: of the run.
        optimizer: the user's own, if any.
        upcast: whether weights will be held in float32 beside the model's, as FSDP2 does with mixed
            precision.
    """
    name = str(args.optim if optimizer is None else type(optimizer).__name__).lower()
    if upcast or not any(known in name for known in STEP_OF_LEARNING_RATE):
        return
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    low = {weight.dtype for weight in trained} & set(LOW_PRECISION)
    if not low or any(weight.is_meta for weight in trained):
        return
    share = share_that_stands_still(trained, args.learning_rate)
    if share <= TOLERATED_SHARE:
        return
    logger.warning(
        "The policy's weights are in %s, and for %.1f %% of them a step of learning_rate=%g is "
        "below half a unit in the last place: rounding undoes it, and they are not trained. Load "
        "the model in float32 (dtype='float32') and set bf16=True, which computes in bfloat16 and "
        "keeps float32 weights; or take an optimizer that keeps float32 master weights, which "
        "this check does not know of; or train adapters (peft_config), which PEFT keeps in "
        "float32.",
        ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in low)),
        100 * share,
        args.learning_rate,
    )
