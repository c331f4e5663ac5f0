"""Checks that vLLM applies a LoRA adapter as PEFT does, and collects the adapter's weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch.distributed.tensor import DTensor

UNSUPPORTED_OPTIONS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
"""Options of `peft.LoraConfig` with which an adapter is more than the A and B that vLLM reads."""
INITS_THAT_LEAVE_THE_BASE_ALONE = (True, False, "eva", "gaussian", "orthogonal")


def check_adapter(model: PeftModel, max_rank: int) -> None:
    """Raise for an adapter that vLLM refuses or would silently apply in another way.

    Args:
        model: the policy, unwrapped.
        max_rank: the server's `--max-lora-rank`.

    Raises:
        ValueError: naming the option, what vLLM would do and what to write instead.
    """
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"the policy has {len(active)} active adapters ({', '.join(active)}), but the server "
            "applies one adapter per request; merge them or activate one."
        )
    name = active[0]
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"vllm_lora_sync sends LoRA adapters, but the policy's adapter is {config.peft_type}; "
            "train with peft.LoraConfig."
        )
    for option in UNSUPPORTED_OPTIONS:
        if getattr(config, option):
            raise ValueError(
                f"{option}={getattr(config, option)!r}: vLLM applies only the matrices A and B of "
                f"LoRA, so it would sample from another policy; train without {option}."
            )
    if config.bias != "none":
        raise ValueError(
            f"bias={config.bias!r}: vLLM loads no biases with an adapter; use bias='none'."
        )
    if config.init_lora_weights not in INITS_THAT_LEAVE_THE_BASE_ALONE:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base model's weights, "
            "which the server does not have; use one of "
            f"{', '.join(map(repr, INITS_THAT_LEAVE_THE_BASE_ALONE))}, or save the changed base "
            "model, serve that and train a fresh adapter on it."
        )
    _check_ranks_and_scales(model, name, config, max_rank)


def _check_ranks_and_scales(model: PeftModel, name: str, config: LoraConfig, max_rank: int) -> None:
    """Compare each layer with the single rank and the single scale that vLLM reads."""
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or name not in layer.scaling:
            continue
        if max(layer.r[name], config.r) > max_rank:
            raise ValueError(
                f"the LoRA rank of {path} is {max(layer.r[name], config.r)}, above the server's "
                f"maximum, vllm_max_lora_rank={max_rank}; raise that and restart the server with "
                "it, or train with a lower rank."
            )
        if not math.isclose(layer.scaling[name], scale, rel_tol=1e-6):
            raise ValueError(
                f"{path} scales its adapter by {layer.scaling[name]:g}, but vLLM would silently "
                f"scale it by {scale:g}, from lora_alpha={config.lora_alpha} and r={config.r}: it "
                "ignores rank_pattern and alpha_pattern. Keep alpha / r (with use_rslora "
                "alpha / sqrt(r)) the same in every layer."
            )


def adapter_weights(model: PeftModel, accelerator: Accelerator, wrapped: Any) -> dict[str, Any]:
    """The active adapter's full (unsharded) weights on the CPU, by the names of an adapter file.

    All processes must call this together.

    Args:
        model: the policy, unwrapped.
        accelerator: the accelerator that prepared the policy.
        wrapped: the policy as the accelerator returned it.
    """
    gathered = None
    # FSDP2 shards each tensor separately, so the adapter's few tensors can be gathered alone.
    whole_model = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if whole_model and not accelerator.is_fsdp2:
        gathered = accelerator.get_state_dict(wrapped)
    weights = get_peft_model_state_dict(
        model,
        state_dict=gathered,
        adapter_name=model.active_adapters[0],
        save_embedding_layers=False,
    )
    return {name: _whole(tensor) for name, tensor in weights.items()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous().clone()
