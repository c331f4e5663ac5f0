"""Log-probabilities whose forward pass waits for the backward pass, some rollouts at a time.

The activations of the rollouts' tokens are most of the memory of a training step. But what the
tokens' log-probabilities are is known from sampling them; a forward pass over them serves the
gradient alone. So only the documents go through the model at first, with gradient. When the
backward pass comes, the rollouts follow, chunk by chunk: forward against the documents' keys and
values, and at once backward again, adding up the gradients of weights, keys and values. Then the
backward pass goes on through the documents. Nothing is computed that a pass over the whole row
would not compute, and the activations of one chunk exist at a time.

Dimension letters: B rows, S document tokens, K blocks, n samples, G rollout length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from hf_ebft.log_probs import TokenLogProbs, packed_log_probs
from hf_ebft.policy import PackedForward, states_in
from hf_ebft.rollouts import Rollouts
from hf_ebft.sharding import is_sharded
from hf_ebft.support import checkpoints_activations

# Rollout tokens that go through the model together: enough for efficient matrix products.
CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}


def training_log_probs(
    model: nn.Module,
    forward: PackedForward,
    rollouts: Rollouts,
    *,
    temperature: float,
    with_document: bool,
    chunk_size: int,
    training_chunk_size: int | None,
) -> TokenLogProbs:
    """`packed_log_probs` with gradient, in as many chunks of rollouts as keep memory in bounds.

    Where one chunk is enough, or the model cannot be called in parts (see :func:`can_defer`), in
    one pass over the whole row. Tokens that the policy has not sampled itself, as it is now, cost
    one more forward pass.

    Args:
        model, forward, rollouts, temperature, with_document, chunk_size: as in `packed_log_probs`.
        training_chunk_size: rollout tokens whose activations exist at once, at least those of one
            block; None: by the device.
    """
    scoring: dict[str, Any] = {"temperature": temperature, "chunk_size": chunk_size}
    chunks = _chunks(rollouts, training_chunk_size)
    if len(chunks) == 1 or not can_defer(model, forward):
        return packed_log_probs(model, forward, rollouts, with_document=with_document, **scoring)
    cache = forward.new_cache()
    documents = packed_log_probs(
        model,
        forward,
        rollouts,
        part=rollouts.layout.document_part,
        cache=cache,
        with_document=with_document,
        **scoring,
    )
    passes = _RolloutPasses(_inside(model), forward, rollouts, chunks, scoring)
    states = states_in(cache)
    known = rollouts.log_probs_under(model)
    later = passes.values(states) if known is None else known[..., 1:]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    later = _Deferred.apply(later, passes, len(states), *states, *weights)
    return TokenLogProbs(torch.cat([documents.rollout, later], dim=-1), documents.document)


def can_defer(model: nn.Module, forward: PackedForward) -> bool:
    """Whether a model may make forward passes during the backward pass, against a cache.

    Not where FSDP2 gathers parameters around each pass or another wrapper than DDP stands between,
    with gradient checkpointing (which drops caches), or with block masks (compiled by shape).
    """
    inner = _inside(model)
    return (
        torch.is_grad_enabled()
        and not is_sharded(model)
        and (isinstance(inner, PreTrainedModel) or hasattr(type(inner), "get_base_model"))
        and not (model.training and checkpoints_activations(inner))
        and forward.recipe.implementation != "flex_attention"
        and forward.keeps_every_key
    )


def _inside(model: nn.Module) -> nn.Module:
    """The model that DDP wraps; DDP itself must not be called while it adds up gradients."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _chunks(rollouts: Rollouts, size: int | None) -> tuple[slice, ...]:
    """The K blocks in chunks of about equally many."""
    rows, n_samples, n_blocks, length = rollouts.tokens.shape
    if size is None:
        size = CHUNK_TOKENS["cpu" if rollouts.tokens.device.type == "cpu" else "cuda"]
    tokens = rows * n_samples * n_blocks * (length - 1)
    n_chunks = min(n_blocks, max(1, -(-tokens // size)))
    bounds = [index * n_blocks // n_chunks for index in range(n_chunks + 1)]
    return tuple(slice(*pair) for pair in pairwise(bounds))


@dataclass(frozen=True)
class _RolloutPasses:
    """Forward passes over some of the rollouts, against the documents' keys and values.

    Attributes:
        model: the policy, not wrapped by DDP.
        forward: how it runs packed rows.
        rollouts: the batch and its sampled tokens.
        chunks: of the blocks.
        scoring: settings of `packed_log_probs`.
    """

    model: nn.Module
    forward: PackedForward
    rollouts: Rollouts
    chunks: tuple[slice, ...]
    scoring: Mapping[str, Any]

    def log_probs(self, chunk: slice, states: Sequence[Tensor]) -> Tensor:
        """(B, n, k, G - 1) of the tokens after the first, of the k blocks of a chunk.

        Args:
            chunk: one of ``chunks``.
            states: keys and values of every layer, (B, H, S, E) each.
        """
        layout = self.rollouts.layout.of_blocks(chunk)
        some = Rollouts(self.rollouts.tokens[:, :, chunk], layout.blocks.exists, layout)
        return packed_log_probs(
            self.model,
            self.forward,
            some,
            part=layout.rollouts_part,
            cache=self.forward.new_cache(states),
            with_document=False,
            **self.scoring,
        ).rollout

    def values(self, states: Sequence[Tensor]) -> Tensor:
        """(B, n, K, G - 1), without gradient."""
        with torch.no_grad():
            return torch.cat([self.log_probs(chunk, states) for chunk in self.chunks], dim=2)


class _Deferred(torch.autograd.Function):
    """Known log-probabilities as a function of the states and weights that they came from."""

    @staticmethod
    def forward(
        ctx: Any, known: Tensor, passes: _RolloutPasses, n_states: int, *tensors: Tensor
    ) -> Tensor:
        ctx.passes, ctx.n_states = passes, n_states
        ctx.save_for_backward(*tensors)
        return known.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_log_probs, passes = gradients[0], ctx.passes
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[-len(ctx.saved_tensors) :]
        states = [
            state.detach().requires_grad_(wants)
            for state, wants in zip(saved[: ctx.n_states], wanted, strict=False)
        ]
        tensors = [*states, *saved[ctx.n_states :]]
        inputs = [tensor for tensor, wants in zip(tensors, wanted, strict=True) if wants]
        totals: list[Tensor | None] = [None] * len(inputs)
        for chunk in passes.chunks:
            with torch.enable_grad():
                log_probs = passes.log_probs(chunk, states)
            found = torch.autograd.grad(
                log_probs, inputs, d_log_probs[:, :, chunk], allow_unused=True
            )
            totals = [_sum(total, new) for total, new in zip(totals, found, strict=True)]
        of_inputs = iter(totals)
        return None, None, None, *(next(of_inputs) if wants else None for wants in wanted)


def _sum(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    # Not in place: autograd may hand out one tensor as the gradient of two inputs.
    return new if total is None else total if new is None else total + new
