"""Attention of one decoding step: attention to the document, combined with attention to own keys.

In a decoding step every rollout has one query. It sees a range of document columns, whose keys are
shared by all rollouts of a row, and at most G keys of its own. Attention is computed separately for
the two parts, each with its log-sum-exp (the logarithm of the sum of the exponentials of the
scores). The log-sum-exps give the weights with which the two results are combined, as in
FlashAttention with split keys. Only the values of tensors depend on the step, so one CUDA graph
serves all steps.

Dimension letters: B rows of the batch, S document tokens, m rollouts of a row (block after block,
the samples of a block together), H heads of keys and values, A query heads, E and F widths of a
head (keys, values), O slots for own keys, C keys of any kind, Q queries of any kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from hf_ebft.packed.attention_functions import (
    HIDDEN,
    attend_plainly,
    beside_sinks,
    bound_on_scores,
    in_autocast_dtype,
)
from hf_ebft.packed.flex import compiled, fuses_kernels

# Keyword arguments of an attention function that change the scores and are supported here.
KNOWN_CHANGES = ("softcap", "s_aux")


@dataclass(frozen=True)
class DocumentTile:
    """Rollouts whose attention to the document is computed together.

    Attributes:
        rollouts: slice of the m rollouts.
        columns: the document columns that at least one of them sees in some step.
        bias: (B, 1, rollouts, columns) float32, 0 or `HIDDEN`.
    """

    rollouts: slice
    columns: slice
    bias: Tensor


@dataclass(frozen=True)
class StepView:
    """Which keys the queries of a decoding step see, in layers of one kind.

    Attributes:
        tiles: together they cover every rollout once; empty if there is a block mask.
        own_bias: (B * m or 1, 1, 1, O) float32, bias of the own keys: 0 or `HIDDEN`.
        block_mask: mask of the document columns for flex_attention; None: `tiles` are used.
        fused: whether to use PyTorch's fused attention for CPUs, see `fused_attention_works`.
    """

    tiles: tuple[DocumentTile, ...]
    own_bias: Tensor
    block_mask: BlockMask | None = None
    fused: bool = False


@dataclass(frozen=True)
class Fed:
    """Keys and values of the tokens that a step feeds, to be written into their slot.

    Attributes:
        key, value: (B, H, m, E) and (B, H, m, F).
        slot: number of the slot: (1,) int64 on the device, or an int if the host knows it.
    """

    key: Tensor
    value: Tensor
    slot: Tensor | int


def step_attention(
    query: Tensor,
    document: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    view: StepView,
    scaling: float,
    *,
    fed: Fed | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every rollout's newest token, in autocast's dtype if autocast is on.

    Args:
        query: (B, A, m, E).
        document: keys (B, H, S, E) and values (B, H, S, F).
        own: keys (B, m, H, O, E) and values (B, m, H, O, F). Slots that are not filled yet may
            contain any finite values.
        view: which keys each query sees.
        scaling: multiplies the scores.
        fed: keys and values to write into `own` first; None: they are already there.
        softcap: soft cap on the scores, `softcap * tanh(scores / softcap)`.
        sinks: (A,), an additional score per head whose value is 0.

    Returns:
        (B, m, A, F) in the query's dtype.
    """
    query, key, value = in_autocast_dtype(query, *document)
    device = query.device.type
    with torch.autocast(device, enabled=False):
        if view.block_mask is not None:
            output, lse = _by_blocks(query, key, value, view.block_mask, scaling, softcap)
        else:
            attend = _in_few_kernels(_by_tiles, device)
            output, lse = attend(query, key, value, view, scaling, softcap)
        slots = None if fed is None else (fed.key, fed.value, fed.slot)
        biased = (view.own_bias, view.fused)
        finish = _in_few_kernels(_with_own, device)
        return finish(query, own, slots, *biased, output, lse, scaling, softcap, sinks)


def _in_few_kernels(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The function, compiled if small functions are compiled on the device.

    On a CPU it is not compiled, because compiling takes minutes. Inside a compiled layer it is not
    compiled separately, because it is compiled with the layer.
    """
    alone = fuses_kernels(device) and not torch.compiler.is_compiling()
    return _compiled(function) if alone else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function)


def _by_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    view: StepView,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention to the document columns, (B, m, A, F), and its log-sum-exp, (B, m, A)."""
    parts = [
        _attend(
            query[:, :, tile.rollouts],
            key[:, :, tile.columns],
            value[:, :, tile.columns],
            tile.bias,
            view.fused,
            scaling,
            softcap,
        )
        for tile in view.tiles
    ]
    if len(parts) == 1:
        return parts[0]
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)


def _by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The result of `_by_tiles`, computed by flex_attention."""
    attend = _in_few_kernels(flex_attention, query.device.type)
    output, aux = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else bound_on_scores(softcap),
        block_mask=block_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return output.transpose(1, 2), aux.lse.transpose(1, 2)


def _with_own(
    query: Tensor,
    own: tuple[Tensor, Tensor],
    fed: tuple[Tensor, Tensor, Tensor | int] | None,
    own_bias: Tensor,
    fused: bool,
    output: Tensor,
    lse: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Write the fed keys and values, attend to own keys, and combine with the documents' part."""
    if fed is not None:
        put_into_slots(own, *fed)
    rows, heads, rollouts, _ = query.shape
    alone = query.transpose(1, 2).reshape(rows * rollouts, heads, 1, -1)
    keys, values = (part.flatten(0, 1).to(query.dtype) for part in own)
    biased = (own_bias, fused, scaling, softcap)
    attend = _attend if fused or not torch.compiler.is_compiling() else _attend_by_sums
    own_output, own_lse = attend(alone, keys, values, *biased)
    own_output, own_lse = own_output.view(output.shape), own_lse.view(lse.shape)
    weight = torch.sigmoid(lse - own_lse)[..., None]
    if query.dtype == torch.float32:
        joined = torch.lerp(own_output, output, weight)
    else:
        joined = torch.lerp(own_output.float(), output.float(), weight)
    if sinks is not None:
        joined = beside_sinks(joined, torch.logaddexp(lse, own_lse), sinks)
    return joined.to(query.dtype)


def put_into_slots(
    own: tuple[Tensor, Tensor], key: Tensor, value: Tensor, slot: Tensor | int
) -> None:
    """Write the fed keys and values into their slot.

    Args:
        own: keys and values of all slots, (B, m, H, O, E) and (B, m, H, O, F).
        key, value, slot: see `Fed`.
    """
    states = [key.transpose(1, 2), value.transpose(1, 2)]
    if isinstance(slot, int):
        # One operator copies both keys and values.
        torch._foreach_copy_([slots.select(3, slot) for slots in own], states)
        return
    for slots, state in zip(own, states, strict=True):
        slots.index_copy_(3, slot, state.unsqueeze(3).to(slots.dtype))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    fused: bool,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention with its log-sum-exp.

    Args:
        query: (B, A, Q, E).
        key, value: (B, H, C, E) and (B, H, C, F).
        bias: (B or 1, 1, Q or 1, C) float32, added to the scores.
        fused: see `StepView`.

    Returns:
        (B, Q, A, F) in the query's dtype and (B, Q, A) float32.
    """
    if fused and softcap is None and query.shape[-1] == value.shape[-1]:
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], -1)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scaling
        )
        return output.transpose(1, 2), lse.transpose(1, 2)
    return attend_plainly(query, key, value, bias, scaling, softcap)


def _attend_by_sums(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    fused: bool,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`_attend`, written for a compiler with sums instead of matrix products.

    Products of one query and a few keys are too small for a GPU's matrix kernels. A compiler can
    fuse sums with the operators before and after them.
    """
    query = query.unflatten(1, (key.shape[1], -1))
    # The products (B, H, r, Q, C, E) and (B, H, r, Q, C, F) exist only inside a fused kernel.
    scores = (query.float().unsqueeze(4) * key.float()[:, :, None, None]).sum(dim=-1) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias[:, :, None]
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    output = (weights.unsqueeze(-1) * value.float()[:, :, None, None]).sum(dim=-2)
    output = output.to(value.dtype).flatten(1, 2)
    return output.transpose(1, 2), lse.flatten(1, 2).transpose(1, 2)


@cache
def fused_attention_works() -> bool:
    """Whether PyTorch's fused attention for CPUs returns the log-sum-exp and supports shared keys.

    The operator is not part of PyTorch's public interface, so it is tried on an example.
    """
    with torch.autocast("cpu", enabled=False):
        return _fused_as_plain()


def _fused_as_plain() -> bool:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, tokens, 8, generator=generator)
        for heads, tokens in ((4, 3), (2, 5), (2, 5))
    )
    bias = torch.zeros(2, 1, 3, 5)
    bias[:, :, 0, 2:], bias[:, :, 2] = HIDDEN, HIDDEN
    try:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias.expand(-1, 4, -1, -1), scale=0.3
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    found = output.transpose(1, 2), lse.transpose(1, 2)
    expected = attend_plainly(query, key, value, bias, 0.3)
    # The last query sees nothing, so its output need only be finite.
    return bool(found[0].isfinite().all()) and all(
        torch.allclose(ours[:, :2], theirs[:, :2], rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(found, expected, strict=True)
    )
