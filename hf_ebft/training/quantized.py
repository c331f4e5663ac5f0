"""Policies whose weights bitsandbytes holds in few bits: what keeps their gradients right."""

from __future__ import annotations

from torch import nn


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with AVX512-BF16 a 4-bit layer repacks its weights the first time that it runs in
    evaluation mode, and from then on multiplies by a kernel without a backward pass: the gradient
    through the layer is lost, with no more than a warning. Sampling and features run in evaluation
    mode before the first step, so every run would be affected.

    Args:
        model: the policy; left alone where it has no such layers.

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
                "ran in evaluation mode on this CPU, and they have no gradient any more. Load the "
                "model anew and hand it to the trainer before it is run."
            )
        module.support_avx512bf16_for_cpu = False
