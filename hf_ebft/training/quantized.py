"""Keeps gradients through layers whose weights bitsandbytes has quantized."""

from __future__ import annotations

from torch import nn


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with AVX512-BF16, a 4-bit layer repacks its weights the first time that it runs in
    evaluation mode. From then on it uses a kernel without a backward pass, so the gradient through
    the layer is lost, with only a warning. Sampling and features run in evaluation mode before the
    first step, so every run would be affected.

    Args:
        model: the policy; models without such layers are not changed.

    Raises:
        ValueError: a layer has been repacked already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has repacked the weights of {name} for inference, since the model "
                "ran in evaluation mode on this CPU, and they cannot pass gradients any more. Load "
                "the model again, and pass it to the trainer before you run it."
            )
        module.support_avx512bf16_for_cpu = False
