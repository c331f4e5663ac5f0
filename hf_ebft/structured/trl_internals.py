"""The private interfaces of TRL that structured mode uses, in one place.

Each function here uses one private or undocumented part of TRL's trainers. They were read in TRL
1.16, and `setup.cfg` bounds the version for this reason: tests/structured/test_trl_internals.py
fails for each part that has changed.

Two more are only names: the column that TRL does not pass to rewards
(`hf_ebft.structured.columns.WITHHELD_COLUMN`), and the entries of a batch that
`hf_ebft.structured.vllm.trainer` replaces.
"""

from __future__ import annotations

import inspect
import math
from types import MethodType
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_ebft.packed.model_parts import CACHE_ARGUMENTS, bare_model
from hf_ebft.watching.model_card import CITATION, PAPER, TAGS, TITLE

# Names of embeddings of absolute positions, learned or sinusoidal, in transformers.
ABSOLUTE_POSITIONS = ("wpe", "position_embeddings", "embed_positions", "position_embedding")


class CardNames:
    """The method in TRL's model card and in the model's tags: EBFT, and its paper."""

    _tag_names: ClassVar[list[str]] = ["trl", *TAGS]
    _name = "EBFT"
    _paper: ClassVar[dict[str, str]] = {
        "title": TITLE,
        "id": PAPER.rsplit("/", 1)[1],
        "citation": CITATION,
    }


def take_metrics(trainer: Any, mode: str) -> dict[str, float | None]:
    """The means that TRL's next `log` would add, by name without a prefix; they are then cleared.

    Args:
        trainer: a `GRPOTrainer`.
        mode: `train` or `eval`.

    Returns:
        Means over the values that are numbers; None if there is none. TRL computes them so, too.
    """
    means: dict[str, float | None] = {}
    for name, values in trainer._metrics[mode].items():
        numbers = [value for value in values if not math.isnan(value)]
        means[name] = sum(numbers) / len(numbers) if numbers else None
    trainer._metrics[mode].clear()
    return means


def sample_replies(
    trainer: Any, prompt_ids: list[list[int]]
) -> tuple[list[list[int]], list[list[float]] | None]:
    """Sample one reply for each context with the trainer's sampler; a collective call.

    TRL's own loop over tool calls uses the same method, since there is no public way to continue
    token ids.

    Args:
        trainer: a `GRPOTrainer`.
        prompt_ids: token ids of each context.

    Returns:
        Token ids of the replies, and their log-probs if the sampler returns them.
    """
    # One completion per context, since every chat has its own history.
    sampled: tuple[list[list[int]], list[list[float]] | None] = trainer._generate_single_turn(
        prompt_ids, images=None, multimodal_fields={}, num_generations=1
    )
    return sampled


def set_most_tokens(trainer: Any, tokens: int) -> None:
    """Limit the completions that a `GRPOTrainer` samples from now on."""
    if trainer.use_vllm:
        trainer.vllm_generation.max_completion_length = tokens
    else:
        trainer.generation_config.max_new_tokens = tokens


def trainer_of(log_metric: Any) -> Any:
    """The trainer that calls a reward function, found from its `log_metric`; None if unknown.

    TRL passes reward functions no other reference to the trainer, which subtracts a baseline.
    """
    return getattr(log_metric, "__self__", None)


def count_positions_from_mask(model: nn.Module) -> None:
    """Let a model with absolute positions count them from the first token of each row, in place.

    TRL pads prompts on the left and passes no position ids to the forward pass of its loss. Rotary
    positions are relative, so this does not matter. Absolute ones (GPT-2's) would be those of the
    padded row, so log-probs would depend on the batch and differ from those of sampling.

    Args:
        model: a policy or reference model, bare or wrapped by PEFT; models without absolute
            positions are not changed.
    """
    bare = bare_model(model)
    takes_positions = "position_ids" in inspect.signature(type(bare).forward).parameters
    learned = any(name.rpartition(".")[2] in ABSOLUTE_POSITIONS for name, _ in bare.named_modules())
    # RoBERTa and similar models count from their padding id, and compute positions from the ids.
    by_ids = any(hasattr(part, "create_position_ids_from_input_ids") for part in bare.modules())
    if takes_positions and learned and not by_ids:
        bare.register_forward_pre_hook(_add_positions, with_kwargs=True)


def _add_positions(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = kwargs.get("attention_mask")
    known = ("position_ids", *CACHE_ARGUMENTS)
    if (
        any(kwargs.get(name) is not None for name in known)
        or not isinstance(mask, Tensor)
        or mask.dim() != 2
    ):
        return args, kwargs
    positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    return args, {**kwargs, "position_ids": positions}


def restore_forward(duplicate: nn.Module) -> None:
    """Restore the class's forward of a copied model if it had TRL's, in place.

    TRL replaces the forward of a policy by a closure over the policy's own forward. A deep copy
    keeps the closure, and would run the weights that are being trained.
    """
    bare = bare_model(duplicate)
    forward = vars(bare).get("forward")
    if isinstance(forward, MethodType) and "fused_lm_head" in forward.__func__.__code__.co_varnames:
        del bare.forward
