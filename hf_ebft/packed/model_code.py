"""Finds out what the code of a transformers model does with its logits and masks.

No configuration says it. A table by model type would hold for one release only, and not for
subclasses or remote code. So this module inspects the model itself: it runs the model's own forward
on known values and reads the names in its code. All of this relies on how transformers writes its
models. The tests check it for every model type of the installed release.

Dimension letters: Q tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ebft.packed.heads import Head
from hf_ebft.packed.model_parts import bare_model

logger = logging.getLogger(__name__)

# The functions with which transformers' models make their masks (transformers.masking_utils).
MASK_FUNCTIONS = frozenset(
    {
        "create_bidirectional_mask",
        "create_causal_mask",
        "create_chunked_causal_mask",
        "create_masks_for_generate",
        "create_sliding_window_causal_mask",
    }
)
# For trying out a head: number of tokens, and the standard deviation of the values that replace its
# output. It is large enough to tell whether the logits are bounded.
TRIAL_TOKENS, TRIAL_SPREAD = 3, 100.0


def mask_functions(model: PreTrainedModel) -> set[str]:
    """Which of transformers' mask functions the model's own code uses; empty if it uses none.

    The code is more reliable than the configuration, which may name a window that the model does
    not use.
    """
    return _names_in_code(model) & MASK_FUNCTIONS


def looks_at_block_masks(model: PreTrainedModel) -> bool:
    """Whether the model's own code treats block masks unlike other masks (Doge's drops them).

    A model that only passes masks to its attention function does not mention `BlockMask`.
    """
    return "BlockMask" in _names_in_code(model)


def _names_in_code(model: PreTrainedModel) -> set[str]:
    """Names defined or imported in the Python modules that contain the model's classes."""
    sources = {
        ancestor.__module__
        for part in model.modules()
        for ancestor in type(part).__mro__
        if issubclass(ancestor, PreTrainedModel) and ancestor is not PreTrainedModel
    }
    code = (sys.modules[source] for source in sources & sys.modules.keys())
    return {name for module in code for name in vars(module)}


def calls_chosen_attention(model: nn.Module) -> bool:
    """Whether a model calls the attention function that its configuration names."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return any(part._can_set_attn_implementation() for part in parts)


def why_not_split(model: PreTrainedModel) -> str | None:
    """Why a model cannot use split attention; None if it can."""
    # For such a model, transformers only warns when its attention is switched.
    if not calls_chosen_attention(model):
        return "its code does not call the attention function that its configuration names"
    # Split attention falls back to sdpa and, like it, supports neither soft caps nor sinks.
    if reason := why_not_sdpa(model):
        return reason
    if not model._supports_sdpa:
        return "it does not support sdpa, which split attention replaces"
    return None


def why_not_sdpa(model: PreTrainedModel) -> str | None:
    """Why a model must not use sdpa, even if its class says that it supports sdpa; None if it may.

    In transformers 5.17, Gemma 2 and VaultGemma pass their soft cap on the scores to sdpa, which
    ignores it. Newer releases do not support sdpa for them.
    """
    bound = getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if bound is not None:
        return f"sdpa ignores the soft cap on its scores (attn_logit_softcapping={bound:g})"
    return None


def find_head(model: nn.Module) -> Head | None:
    """Find the head of a causal language model; None if it is not recognised.

    The model's forward runs once with its backbone and head replaced, so that no weight is read.
    The replaced head returns known values. The logits that the model makes of them are compared
    with those of each possible `Head`: every scale and soft cap for which the configuration has a
    number.

    Args:
        model: bare or wrapped by PEFT, on any device, including the meta device.
    """
    base = bare_model(model)
    module = base.get_output_embeddings()
    names = [name for name, child in base.named_children() if child is module]
    reason = "its output embeddings are not one of its named child modules"
    if module is not None and len(names) == 1:
        try:
            values, logits = _try_head(base, names[0])
            for head in _possible_heads(base, names[0]):
                if logits.shape == values.shape and torch.allclose(
                    head.finish(values), logits.float(), rtol=1e-5, atol=1e-5
                ):
                    return head
            reason = "it post-processes its logits in a way that is not recognised"
        # A model's code may raise anything if its backbone returns only hidden states.
        except Exception as error:
            reason = f"its forward cannot be tried ({type(error).__name__}: {error})"
    logger.warning(
        "The head of %s cannot be applied in chunks, because %s. The logits of all kept tokens are "
        "computed at once, which takes more memory.",
        type(base).__name__,
        reason,
    )
    return None


def _possible_heads(base: PreTrainedModel, name: str) -> Iterator[Head]:
    """Heads with every scale and soft cap for which the configuration has a number."""
    config = vars(base.config.get_text_config(decoder=True))
    numbers = [
        float(value)
        for field, value in config.items()
        if "logit" in field and isinstance(value, int | float) and value > 0
    ]
    scales = [1.0, *numbers, *(1.0 / number for number in numbers)]
    for softcap, scale in itertools.product([None, *numbers], scales):
        yield Head(name, scale=scale, softcap=softcap)


def _try_head(base: PreTrainedModel, name: str) -> tuple[Tensor, Tensor]:
    """Run the model's forward with its head's output replaced by known values.

    Returns:
        The known values, and the logits that the model makes of them, (1, Q, V) each.

    Raises:
        Exception: the model's code cannot run with replaced parts.
        RuntimeError: the model does not call its head exactly once.
    """
    weight = next(base.get_input_embeddings().parameters())
    values_device = torch.device("cpu") if weight.is_meta else weight.device
    config = base.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    shape = (1, TRIAL_TOKENS)
    hidden = torch.randn((*shape, config.hidden_size), generator=generator)
    values = torch.randn((*shape, config.vocab_size), generator=generator) * TRIAL_SPREAD
    hidden, values = hidden.to(weight.device, base.dtype), values.to(values_device)
    calls = 0

    def replaced_head(*_: Any, **__: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return values

    input_ids = torch.ones(shape, dtype=torch.long, device=weight.device)
    arguments: dict[str, Any] = {"input_ids": input_ids}
    if "use_cache" in inspect.signature(base.forward).parameters:
        arguments["use_cache"] = False
    with torch.no_grad(), ExitStack() as stack:
        for child_name, child in base.named_children():
            if child_name == name:
                stack.enter_context(_replaced_forward(child, replaced_head))
            elif isinstance(child, PreTrainedModel):
                stack.enter_context(
                    _replaced_forward(child, lambda *_, **__: _BackboneOutput(hidden))
                )
        logits = base.forward(**arguments).logits
    if calls != 1:
        raise RuntimeError(f"{name} is called {calls} times")
    return values, logits


class _BackboneOutput:
    """Last hidden states (1, Q, H), and None for all other outputs of a backbone."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


@contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Replace a module's forward and remove its hooks, within the context."""
    given = module.__dict__.get("forward")  # set by a library that hooks modules this way
    hooks = {name: getattr(module, name) for name in ("_forward_pre_hooks", "_forward_hooks")}
    module.forward = forward
    for name in hooks:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for name, own in hooks.items():
            setattr(module, name, own)
        if given is None:
            del module.forward
        else:
            module.forward = given
