"""What the code of a transformers model does with its logits and masks, and how to find out.

No configuration says it, and a table by model type would be true of one release, and not of a
subclass or of remote code. So the model in hand is asked: its own forward is run on known values.
Everything here rests on how transformers writes its models; the tests hold it against every type of
the installed release.

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

# How transformers' models make their masks (transformers.masking_utils).
MASK_FUNCTIONS = frozenset(
    {
        "create_bidirectional_mask",
        "create_causal_mask",
        "create_chunked_causal_mask",
        "create_masks_for_generate",
        "create_sliding_window_causal_mask",
    }
)
# Tokens of the trial of a head, and the spread of the values that take the place of its output:
# wide enough to tell a bound on the logits from none.
TRIAL_TOKENS, TRIAL_SPREAD = 3, 100.0


def mask_functions(model: PreTrainedModel) -> set[str]:
    """Which of transformers' mask functions the model's own code uses; empty if it makes its own.

    A configuration may name a window that the model never looks at. The code does not lie.
    """
    return _names_in_code(model) & MASK_FUNCTIONS


def looks_at_block_masks(model: PreTrainedModel) -> bool:
    """Whether the model's own code tells block masks from others, as Doge's does to leave them out.

    A model that hands masks on to its attention function has no need to.
    """
    return "BlockMask" in _names_in_code(model)


def _names_in_code(model: PreTrainedModel) -> set[str]:
    """Names that the modules with the model's classes define or import."""
    sources = {
        ancestor.__module__
        for part in model.modules()
        for ancestor in type(part).__mro__
        if issubclass(ancestor, PreTrainedModel) and ancestor is not PreTrainedModel
    }
    code = (sys.modules[source] for source in sources & sys.modules.keys())
    return {name for module in code for name in vars(module)}


def calls_chosen_attention(model: nn.Module) -> bool:
    """Whether a model's code leaves attention to the function that its configuration names."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return any(part._can_set_attn_implementation() for part in parts)


def why_not_split(model: PreTrainedModel) -> str | None:
    """Why split attention cannot take the place of a model's attention; None if it can."""
    # transformers would only warn when it is told to switch the attention of such a model.
    if not calls_chosen_attention(model):
        return "its code does not leave attention to the chosen function"
    # It knows what sdpa knows, and takes it where it has to: no bound on the scores, no sinks.
    if reason := why_not_sdpa(model):
        return reason
    if not model._supports_sdpa:
        return "it does not support sdpa, whose place split attention takes"
    return None


def why_not_sdpa(model: PreTrainedModel) -> str | None:
    """Why sdpa must not take the place of a model's attention, whatever the model's class says.

    In transformers 5.17, Gemma 2 and VaultGemma hand the bound on their scores to sdpa, which
    leaves it out; newer releases have no sdpa for them.
    """
    bound = getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if bound is not None:
        return f"sdpa leaves out the bound on its scores (attn_logit_softcapping={bound:g})"
    return None


def find_head(model: nn.Module) -> Head | None:
    """The head of a causal language model, or None if it is not recognised.

    The model's forward runs once with its backbone and its head replaced, so that no weight is
    read: what it makes of known values in the place of the head's output is compared with what a
    `Head` would make of them, for every scale and bound on the logits in its configuration.

    Args:
        model: bare or wrapped by PEFT, on any device, the meta device too.
    """
    base = bare_model(model)
    module = base.get_output_embeddings()
    names = [name for name, child in base.named_children() if child is module]
    reason = "its output embeddings are no part of it by name"
    if module is not None and len(names) == 1:
        try:
            values, logits = _try_head(base, names[0])
            for head in _possible_heads(base, names[0]):
                if logits.shape == values.shape and torch.allclose(
                    head.finish(values), logits.float(), rtol=1e-5, atol=1e-5
                ):
                    return head
            reason = "it changes its logits in a way that is not known"
        # Whatever foreign code raises when its backbone returns hidden states and nothing else.
        except Exception as error:
            reason = f"its forward cannot be tried ({type(error).__name__}: {error})"
    logger.warning(
        "The head of %s cannot be applied in chunks, since %s: logits of all kept tokens are made "
        "at once, which takes more memory.",
        type(base).__name__,
        reason,
    )
    return None


def _possible_heads(base: PreTrainedModel, name: str) -> Iterator[Head]:
    """Heads with every scale and bound that the configuration has a number for."""
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
    """Values in place of the head's output, and the logits (1, Q, V) that the model makes of them.

    Raises:
        Exception: the model's code cannot be run so.
        RuntimeError: it does not call the head exactly once.
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
    """Last hidden states (1, Q, H), and None for whatever else a backbone may return."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


@contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Another forward, without the hooks that somebody may have put around it."""
    given = module.__dict__.get("forward")  # of a library that hooks modules this way
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
