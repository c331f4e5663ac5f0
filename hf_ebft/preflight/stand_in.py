"""A stand-in for the user's trainer to measure with; shared state is restored afterwards.

The stand-in has the settings, the subclass and the data of the user's trainer. Measuring must not
change the run that follows: its weights, gradients, modes, optimizer, and the random numbers of its
data order and dropout.
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
# Attributes that accelerate sets on a model that it prepares, for example for mixed precision.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")


@contextmanager
def stand_in(trainer: EBFTTrainer) -> Iterator[EBFTTrainer]:
    """A copy of a trainer that shares its networks and data, without callbacks, logs and files.

    Settings of the copy can be changed: it has its own `args` and `ebft`. After the block the
    trainer's modes, gradients, optimizer and random numbers are restored, to the bit. Weights are
    not copied here: see `weights_kept`.

    Raises:
        ValueError: the trainer is training, is one of several processes, or has no training data.
    """
    _check(trainer)
    with ExitStack() as stack:
        stack.enter_context(_random_numbers_kept())
        stack.enter_context(_model_kept(trainer.model))
        stack.enter_context(_optimizer_kept(trainer))
        try:
            yield _copy(trainer)
        finally:
            # Else accelerate would keep the optimizer of the copy alive.
            trainer.accelerator.free_memory()


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[int]:
    """Restore trainable weights and all buffers after the block.

    Yields:
        The number of bytes of their copies, which are in the host's memory.
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
            f"preflight needs an EBFTTrainer (strided mode), not a {type(trainer).__name__}. For "
            "prompts with ground truths, measure the same text in strided mode (--mode strided): "
            "signal, headroom and reward are those of the same features."
        )
    if trainer.is_in_train:
        raise ValueError("preflight cannot measure during training; call it before train().")
    if trainer.accelerator.num_processes > 1:
        raise ValueError(
            f"preflight measures on one process, but this is one of "
            f"{trainer.accelerator.num_processes}. Start it without accelerate launch or torchrun, "
            "and pass the number of processes of the run as `processes`."
        )
    if trainer.train_dataset is None:
        raise ValueError(
            "preflight measures on training text, but the trainer has none: give it a "
            "train_dataset."
        )


def _copy(trainer: EBFTTrainer) -> EBFTTrainer:
    other = copy.copy(trainer)
    other.args = copy.copy(trainer.args)
    for name, value in _QUIET.items():
        setattr(other.args, name, type(getattr(other.args, name))(value))
    # An EBFTConfig has both kinds of settings; a plain TrainingArguments has no EBFT settings.
    own: Any = other.args if isinstance(other.args, EBFTSettings) else copy.copy(trainer.ebft)
    other.ebft = own
    other.__dict__["model_init"] = None  # measure the existing model
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
        other.fitted = FittedBaseline(other)  # the trainer's own must not see these rollouts
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
    """Restore modes, gradients, and the wrappers that accelerate puts around a forward pass."""
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
    """Restore the states of an optimizer, scheduler and scaler that the trainer already has."""
    holders: list[Any] = [trainer.optimizer, trainer.lr_scheduler, trainer.accelerator.scaler]
    states = [None if holder is None else copy.deepcopy(holder.state_dict()) for holder in holders]
    try:
        yield
    finally:
        for holder, state in zip(holders, states, strict=True):
            if holder is not None:
                holder.load_state_dict(state)
