"""Everything about a model that a probe could change and forget to restore."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_ebft.packed.model_parts import bare_model, checkpoints_activations

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state_of(model: nn.Module) -> dict[str, Any]:
    """A comparable snapshot of a model and of the global random generators."""
    base, modules = bare_model(model), dict(model.named_modules())
    adapted = {name: part for name, part in modules.items() if isinstance(part, BaseTunerLayer)}
    text = base.config.get_text_config(decoder=True)
    return {
        "weights": {
            name: (id(weight), weight._version, weight.data_ptr())
            for name, weight in model.named_parameters()
        },
        "requires_grad": {name: w.requires_grad for name, w in model.named_parameters()},
        "gradients": {name: w.grad is not None for name, w in model.named_parameters()},
        "training": {name: part.training for name, part in modules.items()},
        "hooks": {
            (name, kind): len(getattr(part, kind))
            for name, part in modules.items()
            for kind in HOOKS
        },
        "replaced forwards": [name for name, part in modules.items() if "forward" in vars(part)],
        "config": {**base.config.to_dict(), "use_cache": text.use_cache},
        "text config": text.to_dict(),
        "attention": (base.config._attn_implementation, text._attn_implementation),
        "gradient checkpointing": checkpoints_activations(model),
        "active adapters": model.active_adapters if isinstance(model, PeftModel) else None,
        "adapters of layers": {name: part.active_adapters for name, part in adapted.items()},
        "adapters off": {name: part.disable_adapters for name, part in adapted.items()},
        "random numbers": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]
        ),
    }
