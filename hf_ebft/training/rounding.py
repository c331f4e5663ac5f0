"""Warns of low-precision weights that are too large to be changed by optimizer steps.

An Adam step changes a weight by about the learning rate, whatever its gradient. A weight in
bfloat16 has 8 significant bits: numbers around 0.02 are 1.2e-4 apart, so every step of 1e-6 is
rounded away.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

logger = logging.getLogger(__name__)

LOW_PRECISION = (torch.bfloat16, torch.float16)
# There is no warning if at most this share of the weights cannot change.
TOLERATED_SHARE = 0.1
# Parts of the names of optimizers whose step is about the learning rate (transformers' names and
# names of classes).
STEP_OF_LEARNING_RATE = ("adam", "lion")


def still_weights(weight: Tensor, step: float) -> Tensor:
    """Number of entries that a step cannot change, since it is below half a unit in the last place.

    A unit in the last place of `m * 2^e`, 1/2 <= m < 1, is `2^e` times half the type's epsilon.
    Numbers below the smallest normal number have that number's unit.

    Args:
        weight: a weight of a floating dtype.
        step: size of the step, at least 0.

    Returns:
        A scalar, int64.
    """
    info = torch.finfo(weight.dtype)
    _, exponent = torch.frexp(weight.detach().float().abs().clamp(min=info.smallest_normal))
    half_unit = torch.ldexp(torch.tensor(info.eps / 4, device=weight.device), exponent)
    return (half_unit > step).sum()


def share_that_stands_still(weights: Iterable[Tensor], step: float) -> float:
    """Share of the entries of all trained weights, of any precision, that a step cannot change."""
    still = total = 0
    for weight in weights:
        total += weight.numel()
        if weight.dtype in LOW_PRECISION:
            still += int(still_weights(weight, step))
    return still / total if total else 0.0


def warn_of_still_weights(
    model: nn.Module, args: TrainingArguments, optimizer: object | None, *, upcast: bool
) -> None:
    """Warn if rounding would keep many weights from being trained.

    Args:
        model: the policy.
        args: the training arguments.
        optimizer: the user's own optimizer, if any.
        upcast: whether training keeps float32 copies of the weights, as FSDP2 does with mixed
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
        "The policy's weights are in %s. For %.1f %% of them, a step of learning_rate=%g is below "
        "half a unit in the last place: rounding undoes the step, and they are not trained. Load "
        "the model in float32 (dtype='float32') and set bf16=True, which computes in bfloat16 and "
        "keeps float32 weights; or use an optimizer that keeps float32 master weights (this check "
        "cannot detect one); or train adapters (peft_config), which PEFT keeps in float32.",
        ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in low)),
        100 * share,
        args.learning_rate,
    )
