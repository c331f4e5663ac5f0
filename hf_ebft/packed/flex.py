"""flex_attention over packed rows, as an attention function for transformers' models.

It differs from transformers' own in two ways. First, it is compiled once per shape and never with
dynamic shapes. (By default torch would try dynamic shapes at the second shape, and give up.)
Second, passes without a block mask (plain rows, for example) use sdpa, which is not compiled.

Dimension letters: B rows of the batch, H heads of keys and values, r query heads per key head, Q
queries and C keys of a pass, E and F widths of a head (keys, values).
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_ebft.packed.attention_functions import (
    HIDDEN,
    attend_plainly,
    beside_sinks,
    bound_on_scores,
    changes_of_scores,
    in_autocast_dtype,
)
from hf_ebft.packed.block_masks import TILE

# The name under which it is registered in transformers.
FLEX = "ebft_flex"
# How often torch may compile one function: shapes, times with or without gradient, times kinds of
# layers. Beyond this number torch falls back to unfused attention, which may exhaust the memory.
COMPILED_AT_MOST = 64


def fuses_kernels(device_type: str) -> bool:
    """Whether small functions are compiled on a type of device: on CUDA, if Triton is installed."""
    return device_type == "cuda" and importlib.util.find_spec("triton") is not None


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function once per shape, never with dynamic shapes.

    Args:
        function: the function to compile.
        options: options of `torch.compile`.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = COMPILED_AT_MOST
        return torch.compile(function, dynamic=False, **options)
    run = torch.compile(function, dynamic=False, **options)

    # torch below 2.13 has one limit for all that is compiled, and in 2.12 each thread has its own
    # one: the backward pass on a GPU runs in another thread.
    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        config: Any = torch._dynamo.config
        if not torch.compiler.is_compiling() and config.recompile_limit < COMPILED_AT_MOST:
            config.recompile_limit = COMPILED_AT_MOST
        return run(*args, **kwargs)

    return limited


@cache
def _compiled_flex_attention(device_type: str) -> Callable[..., Any]:
    """The compiled function, one per process, so that networks of one shape share it.

    On a CPU, flex_attention serves as a reference for tests: it is traced as on a GPU but computed
    unfused.
    """
    return compiled(flex_attention, backend="aot_eager" if device_type == "cpu" else "inductor")


def flex_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention by flex_attention if the mask is a block mask, otherwise by other functions.

    Args:
        module: the layer's attention.
        query: (B, H * r, Q, E).
        key, value: (B, H, C, E), (B, H, C, F).
        attention_mask: a block mask; or boolean (B, 1, Q, C); or None for a causal row.
        dropout: dropout rate of the weights; it must be 0 with a block mask.
        scaling: multiplies the scores; default 1 / sqrt(E).
        softcap: soft cap on the scores.
        s_aux: (H * r,) sinks: an additional score per head whose value is 0.
        kwargs: further arguments for sdpa.

    Returns:
        (B, Q, H * r, F), and None in place of the attention weights.

    Raises:
        ValueError: dropout or a position bias is given with a block mask.
    """
    query, key, value = in_autocast_dtype(query, key, value)
    if not isinstance(attention_mask, BlockMask):
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
        return _attention(
            module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux
        )
    unknown = changes_of_scores(kwargs)
    if dropout > 0.0:
        unknown.append("dropout")
    if unknown:
        raise ValueError(
            f"{type(module).__name__} uses {' and '.join(unknown)} in its attention, which "
            "flex_attention does not support. Set packed_attention='sdpa'."
        )
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": True, "block_mask": attention_mask}
    if softcap is not None:
        options["score_mod"] = bound_on_scores(softcap)
    if query.shape[2] < TILE and query.device.type != "cpu":
        # For few queries torch would choose its decoding kernel, which supports fewer shapes and
        # dtypes.
        options["kernel_options"] = {"FORCE_USE_FLEX_ATTENTION": True}
    if s_aux is not None:
        options["return_aux"] = AuxRequest(lse=True)
    # Inside a compiled layer, flex_attention is compiled with the layer.
    attend: Callable[..., Any] = flex_attention
    if not torch.compiler.is_compiling():
        attend = _compiled_flex_attention(query.device.type)
    found = attend(query, key, value, **options)
    if s_aux is None:
        return found.transpose(1, 2).contiguous(), None
    output, aux = found[0].transpose(1, 2), found[1]
    output = beside_sinks(output, aux.lse.transpose(1, 2), s_aux).to(output.dtype)
    return output.contiguous(), None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, None]:
    """Attention with a soft cap or sinks, which sdpa does not support, in plain operators.

    Arguments and result: see `flex_attention_forward`.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    n_queries, n_keys = query.shape[2], key.shape[2]
    if mask is None:
        seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device)
        mask = seen.tril(n_keys - n_queries)[None, None]
    bias = (~mask).float() * HIDDEN if mask.dtype == torch.bool else mask
    dropout = dropout if module.training else 0.0
    output, lse = attend_plainly(query, key, value, bias, scaling, softcap, dropout)
    if sinks is not None:
        output = beside_sinks(output, lse, sinks).to(output.dtype)
    return output.contiguous(), None


AttentionInterface.register(FLEX, flex_attention_forward)
AttentionMaskInterface.register(FLEX, sdpa_mask)
