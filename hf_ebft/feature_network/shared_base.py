"""Decides whether a PEFT policy's own base weights can serve as its feature network.

They can if the policy with its adapters switched off is the policy that training starts from, and
stays so during training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from hf_ebft.packed.forward import evaluation_mode
from hf_ebft.packed.model_parts import (
    active_adapter_configs,
    tokens_with_adapters,
    vocabulary_size,
)

if TYPE_CHECKING:
    from peft import PeftModel

# A forward pass over this many tokens compares the policy with and without its adapters. Adapters
# that start at zero change logits by rounding only, far less than the tolerance.
PROBE_LENGTH = 8
RELATIVE_TOLERANCE = 1e-3
# At most this many of the tokens whose embeddings have adapters are probed as well.
MOST_SPECIAL = 64


def why_not_shareable(policy: nn.Module) -> str | None:
    """The reason why the base without adapters cannot serve as feature network; None if it can.

    Args:
        policy: the unwrapped policy, a PEFT model or not.
    """
    from peft import PeftModel

    if not isinstance(policy, PeftModel):
        return "the policy has no adapters, so all its weights change"
    configs = active_adapter_configs(policy)
    for config in configs:
        if getattr(config, "modules_to_save", None):
            return f"modules_to_save={config.modules_to_save} trains copies of base modules"
        if config.is_adaption_prompt:
            return "the adapters are attention modules, not weights added to the base's"
    prefix = str(policy.base_model.prefix)  # part of every adapter parameter's name
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and prefix not in name:
            return f"the base weight {name} is trainable"
    if any(getattr(module, "merged", False) for module in policy.modules()):
        return "an adapter is merged into the base"
    if any(parameter.is_meta for parameter in policy.parameters()):
        # No forward pass is possible on the meta device, so the configuration decides.
        initial = {getattr(config, "init_lora_weights", True) for config in configs}
        others = initial - {True, "gaussian"}
        return f"init_lora_weights={others.pop()!r}" if others else None
    if not _adapters_have_no_effect(policy):
        return "the adapters do not start at zero, so the base alone is not the initial policy"
    return None


@contextmanager
def adapters_off(policy: nn.Module) -> Iterator[None]:
    """Switch off the adapters of a PEFT policy within the context; restore its state afterwards.

    PEFT's own context manager switches every adapter layer on when it ends, and makes all
    parameters of the active adapters trainable, also those that the user froze.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    off = [
        module
        for module in policy.modules()
        if isinstance(module, BaseTunerLayer) and module.disable_adapters
    ]
    with trainable_kept(policy):
        try:
            with cast("PeftModel", policy).disable_adapter():
                yield
        finally:
            for module in off:
                module.enable_adapters(False)


@contextmanager
def trainable_kept(policy: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` of all parameters after the context, in which PEFT may change it.

    Parameters that did not exist before are not changed.
    """
    before = dict(policy.named_parameters())
    trainable = {name: weight.requires_grad for name, weight in before.items()}
    try:
        yield
    finally:
        # Under FSDP2, `parameters` may return shards before and whole parameters afterwards.
        for name, weight in [*before.items(), *policy.named_parameters()]:
            if weight.requires_grad != trainable.get(name, weight.requires_grad):
                weight.requires_grad_(trainable[name])


def _adapters_have_no_effect(policy: nn.Module) -> bool:
    device = next(policy.parameters()).device
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(vocabulary_size(policy), (1, PROBE_LENGTH), generator=generator)
    special = torch.tensor([tokens_with_adapters(policy)[:MOST_SPECIAL]], dtype=torch.long)
    ids = torch.cat([special, drawn], dim=1).to(device)
    with evaluation_mode(policy):
        with_adapters = policy(input_ids=ids, use_cache=False).logits.float()
        with adapters_off(policy):
            without = policy(input_ids=ids, use_cache=False).logits.float()
    scale = without.abs().amax().clamp(min=1e-6)
    return bool((with_adapters - without).abs().amax() <= RELATIVE_TOLERANCE * scale)
