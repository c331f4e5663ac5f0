"""Stand-ins for fused attention and `torch.compile` on a pretended device.

Their kernels cannot run there. A stand-in allocates the same memory as the kernel, keeps the same
tensors for the backward pass, and counts the kernel's arithmetic. For flex_attention that is the
arithmetic of the tiles that its block mask lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from compiled_stand_ins import CompiledFunctions
from launched import Cost, LaunchedWork
from pretended import PretendedGPU
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, BlockMask, flex_attention


@dataclass(frozen=True)
class Kernel:
    """A fused attention.

    Attributes:
        name: of the kernel.
        work: is told what it costs.
        pairs: of query and key that it computes, of all rows and heads together.
        speed, backward_speed: multiply-adds a second.
    """

    name: str
    work: LaunchedWork
    pairs: int
    speed: float
    backward_speed: float

    def run(self, products: int, kernels: int, width: int, speed: float, *tensors: Tensor) -> None:
        """Tell what a pass costs: so many products, each over heads of a width."""
        multiply_adds = products * self.pairs * width
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        machine = self.work.machine
        seconds = max(kernels * machine.kernel, n_bytes / machine.bandwidth, multiply_adds / speed)
        way = "forward" if products == 2 else "backward"
        cost = Cost(kernels, kernels, n_bytes, multiply_adds, seconds)
        self.work.launched(f"{self.name}, {way}", cost)


class _Attention(torch.autograd.Function):
    """Keeps queries, keys, values, a bias, the output and its log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kernel: Kernel
    ) -> tuple[Tensor, Tensor]:
        output = torch.empty_like(query)
        if query.shape[-1] != value.shape[-1]:
            output = query.new_empty(*query.shape[:-1], value.shape[-1])
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, lse, *(() if bias is None else (bias,)))
        ctx.kernel = kernel
        read = (query, key, value, output, *(() if bias is None else (bias,)))
        kernel.run(2, 1, query.shape[-1], kernel.speed, *read)
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors[:5]
        kernel: Kernel = ctx.kernel
        # The products of the output with its gradient; cuDNN and flex_attention keep them apart.
        delta = torch.empty_like(lse)
        found = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        read = (query, key, value, output, gradients[0], delta, *found)
        kernel.run(5, 2, query.shape[-1], kernel.backward_speed, *read)
        return *found, None, None


class StandIns:
    """What stands in for sdpa, flex_attention and torch.compile.

    Args:
        gpu: the pretended device.
        work: is told what they cost.
    """

    def __init__(self, gpu: PretendedGPU, work: LaunchedWork) -> None:
        self._gpu, self._work = gpu, work
        self._compiled = CompiledFunctions(work)
        gpu.observers.append(self._compiled)

    def sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`scaled_dot_product_attention` by a fused kernel that takes a mask (cuDNN's)."""
        pairs = query.shape[:-1].numel() * key.shape[2]
        machine = self._work.machine
        masked = attn_mask is not None
        kernel = Kernel(
            "sdpa with a mask" if masked else "sdpa",
            self._work,
            pairs // 2 if is_causal else pairs,
            machine.masked if masked else machine.attention,
            machine.masked if masked else machine.attention_backward,
        )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # The kernel wants what is added to scores, once for each call.
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask, 0.0)
        output: Tensor = _Attention.apply(query, key, value, attn_mask, kernel)[0]
        return output

    def flex_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Any = None,
        block_mask: BlockMask | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        kernel_options: Any = None,
        *,
        return_aux: Any = None,
    ) -> Any:
        """`flex_attention`, compiled."""
        machine = self._work.machine
        kernel = Kernel(
            "flex_attention",
            self._work,
            self._pairs(query, key, block_mask),
            machine.attention,
            machine.attention_backward,
        )
        output, lse = _Attention.apply(query, key, value, None, kernel)
        self._compiled.keep(query, key, value, output, lse)
        if return_aux is not None:
            return output, AuxOutput(lse=lse, max_scores=None)
        return (output, lse) if return_lse else output

    def _pairs(self, query: Tensor, key: Tensor, block_mask: BlockMask | None) -> int:
        """Pairs of query and key in the tiles that are computed."""
        if block_mask is None:
            return query.shape[:-1].numel() * key.shape[2]
        tiles = 0
        for listed in (block_mask.kv_num_blocks, block_mask.full_kv_num_blocks):
            if listed is None:
                continue
            known = self._gpu.known.of(listed)
            if known is None:  # made on the device: count all
                return query.shape[:-1].numel() * key.shape[2]
            tiles += int(known.expand(query.shape[0], -1, -1).sum())
        rows, columns = block_mask.BLOCK_SIZE
        return tiles * rows * columns * query.shape[1]

    def compile(self, function: Any = None, **options: Any) -> Any:
        """`torch.compile`: flex_attention by its stand-in, anything else as one fused region."""
        if function is None:
            return lambda later: self.compile(later, **options)
        if function is flex_attention:
            return self.flex_attention
        return self._compiled.stand_in(function)
