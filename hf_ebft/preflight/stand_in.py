"""A trainer to measure with, and everything that it shares with the user's put back afterwards.

What is measured is the user's trainer with the user's settings, subclass and data. Measuring it
must not change the run that follows: not its weights, gradients, modes and optimizer, and not the
random numbers that its data and its dropout will draw.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from hf_ebft.config import EBFTSettings
from hf_ebft.trainer import EBFTTrainer
from hf_ebft.training.fitted_baseline import FittedBaseline
from hf_ebft.training.random_streams import RolloutStreams
from hf_ebft.training.step_log import StepLog

# Settings under which a trainer writes nothing, measures nothing held-out, and stops by itself.
_QUIET: dict[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "logging_strategy": "no",
    "auto_find_batch_size": False,
}
# What accelerate writes into a model that it prepares, mixed precision above all.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")


@contextmanager
def stand_in(trainer: EBFTTrainer) -> Iterator[EBFTTrainer]:
    """A copy of a trainer with its networks and data, but no callback, no log and no files.

    Settings of the copy can be changed: `args` and `ebft` are its own. After the block the
    trainer's modes, gradients, optimizer and random numbers are as they were, to the bit. Weights
    are not copied here: see `weights_kept`.

    Raises:
        ValueError: a trainer that is training, one of several processes, or without training data.
    """
    _check(trainer)
    with ExitStack() as stack:
        stack.enter_context(_random_numbers_kept())
        stack.enter_context(_model_kept(trainer.model))
        stack.enter_context(_optimizer_kept(trainer))
        try:
            yield _copy(trainer)
        finally:
            # The optimizer of the copy, which accelerate would keep alive.
            trainer.accelerator.free_memory()


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[int]:
    """Put trainable weights and all buffers back after the block; yields the bytes of the copies.

    The copies are in the host's memory.
    """
    changing: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
    changing += list(model.buffers())
    copies = [tensor.detach().to("cpu", copy=True) for tensor in changing]
    try:
        yield sum(copied.numel() * copied.element_size() for copied in copies)
    finally:
        with torch.no_grad():
            for tensor, copied in zip(changing, copies, strict=True):
                tensor.copy_(copied)


def _check(trainer: EBFTTrainer) -> None:
    if not isinstance(trainer, EBFTTrainer):
        raise ValueError(
            f"preflight measures strided mode, the rollouts of an EBFTTrainer; it cannot read a "
            f"{type(trainer).__name__}. For prompts with ground truths, measure the same text in "
            "strided mode (--mode strided): signal, headroom and reward are those of the same "
            "features."
        )
    if trainer.is_in_train:
        raise ValueError("preflight looks at a run before it starts; call it before train().")
    if trainer.accelerator.num_processes > 1:
        raise ValueError(
            f"preflight measures on one process, and this is one of "
            f"{trainer.accelerator.num_processes}. Start it without accelerate launch or torchrun, "
            "and say by `processes` how many the run will have."
        )
    if trainer.train_dataset is None:
        raise ValueError("preflight measures on training text: pass the trainer a train_dataset.")


def _copy(trainer: EBFTTrainer) -> EBFTTrainer:
    other = copy.copy(trainer)
    other.args = copy.copy(trainer.args)
    for name, value in _QUIET.items():
        setattr(other.args, name, type(getattr(other.args, name))(value))
    # An EBFTConfig is both; else the settings stand beside plain TrainingArguments.
    own: Any = other.args if isinstance(other.args, EBFTSettings) else copy.copy(trainer.ebft)
    other.ebft = own
    other.__dict__["model_init"] = None  # measure the model that there is
    other.callback_handler = CallbackHandler(
        [DefaultFlowCallback()],
        other.model,
        other.processing_class,
        other.optimizer,
        other.lr_scheduler,
    )
    other.state, other.control = TrainerState(), TrainerControl()
    other.random_streams = RolloutStreams(other.args)
    other.step_log = StepLog(other, other.ebft)
    other.averaging = None
    if other.fitted is not None:
        other.fitted = FittedBaseline(other)  # that of the trainer must not see these rollouts
        other.callback_handler.add_callback(other.fitted)
    return other


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


@contextmanager
def _model_kept(model: nn.Module) -> Iterator[None]:
    """Modes and gradients, and the wrappers that accelerate puts around a forward pass."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(weight, weight.grad) for weight in model.parameters()]
    prepared = {name: model.__dict__[name] for name in _PREPARED if name in model.__dict__}
    for weight, _ in gradients:
        weight.grad = None
    try:
        yield
    finally:
        for weight, gradient in gradients:
            weight.grad = gradient
        for module, training in modes:
            module.training = training
        for name in _PREPARED:
            model.__dict__.pop(name, None)
        model.__dict__.update(prepared)


@contextmanager
def _optimizer_kept(trainer: EBFTTrainer) -> Iterator[None]:
    """The states of an optimizer, scheduler and scaler that the trainer already has."""
    holders: list[Any] = [trainer.optimizer, trainer.lr_scheduler, trainer.accelerator.scaler]
    states = [None if holder is None else copy.deepcopy(holder.state_dict()) for holder in holders]
    try:
        yield
    finally:
        for holder, state in zip(holders, states, strict=True):
            if holder is not None:
                holder.load_state_dict(state)
