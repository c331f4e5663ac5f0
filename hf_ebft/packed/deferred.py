"""Training on rollouts chunk by chunk: their forward pass is deferred to the backward pass.

The activations of the rollouts' tokens take most of the memory of a training step. The values of
their log-probabilities are known from sampling. So the forward pass over them is needed only for
the gradient, and can be deferred.

1. The documents go through the model with gradient. If sampling's pass over the documents can serve
   training, it is kept and used here.
2. In the backward pass, each chunk of rollouts goes forward against the documents' keys and values,
   and backward immediately after. The gradients of weights, keys and values are summed over chunks.
3. The backward pass continues through the documents.

The result is that of one pass over the whole row, but only the activations of the documents and of
one chunk exist at a time. On a GPU, sampling keeps only the keys, values and log-probabilities of
its pass over the documents. Step 3 makes that pass again, so that activations of the documents and
of a chunk never exist at the same time.

Dimension letters: B rows of the batch, S document tokens, K blocks, n samples, G rollout length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from hf_ebft.packed.forward import (
    PackedForward,
    has_noisy_embeddings,
    is_random_in_training,
    states_in,
)
from hf_ebft.packed.fsdp import is_sharded
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.packed.model_parts import checkpoints_activations
from hf_ebft.packed.sampling import DocumentPass, Rollouts, SamplingRecord
from hf_ebft.packed.targets import Targets, TokenLogProbs
from hf_ebft.rows.chunks import block_chunks, tokens_with_gradient
from hf_ebft.rows.layout import PackedLayout, PackedPart


@dataclass(frozen=True)
class TrainingPass:
    """Computes log-probabilities of a policy's rollouts, and of documents, with gradient.

    Attributes:
        forward: how the policy runs packed rows.
        temperature, with_document, chunk_size: see `Targets`.
        training_chunk_size: rollout tokens whose activations exist at once, see
            `hf_ebft.rows.chunks.block_chunks`; None: chosen by device and model.
        adds_to_grad: True if the backward pass adds gradients to `.grad` of the weights, as that of
            a training step does. Each chunk then adds its gradient to `.grad` directly, unless DDP
            or a hook needs the sum over chunks. Otherwise two more gradients of all weights exist:
            the sum over chunks, and the gradient of the latest chunk.
        makes_documents_again: whether the backward pass makes the pass over the documents again
            instead of using activations kept from sampling. This applies only if the two passes are
            the same. None: True on all devices except a CPU.
    """

    forward: PackedForward
    temperature: float
    with_document: bool
    chunk_size: int
    training_chunk_size: int | None
    adds_to_grad: bool = False
    makes_documents_again: bool | None = None

    def document_targets(self, model: nn.Module, layout: PackedLayout) -> Targets | None:
        """The targets that the documents alone predict; None if training is not chunk by chunk.

        Training is not chunk by chunk if one chunk holds the batch, or if the model cannot be
        called in parts (see `can_defer`).
        """
        if len(self._chunks(layout)) == 1 or not can_defer(model, self.forward):
            return None
        return Targets(layout.document_part, self.temperature, self.with_document, self.chunk_size)

    def targets_in_sampling(self, model: nn.Module, layout: PackedLayout) -> Targets | None:
        """`document_targets`, if sampling's pass over the documents can serve training; else None.

        It cannot if training mode differs from evaluation mode, in which tokens are sampled. It
        cannot under DDP, which broadcasts the model's buffers before every pass.
        """
        targets = self.document_targets(model, layout)
        if targets is None or not _same_in_sampling(model):
            return None
        return replace(targets, with_gradient=not self._documents_again(model, layout))

    def _documents_again(self, model: nn.Module, layout: PackedLayout) -> bool:
        again = self.makes_documents_again
        if again is None:
            again = layout.blocks.exists.device.type != "cpu"
        return again and _same_in_sampling(model)

    def log_probs(
        self, model: nn.Module, rollouts: Rollouts, record: SamplingRecord | None = None
    ) -> TokenLogProbs:
        """`packed_log_probs` with gradient, chunk by chunk, to limit memory.

        If `document_targets` is None, it makes one pass over the whole row. Tokens that the current
        policy did not sample itself cost one more forward pass.

        Args:
            model: the wrapped policy.
            rollouts: the batch and its sampled tokens.
            record: results of the sampling of these rollouts. It is ignored if it describes other
                rollouts. Its pass over the documents can be used in one backward pass only, so pass
                a record once.
        """
        targets = self.document_targets(model, rollouts.layout)
        if targets is None:
            return self._packed(model, rollouts)
        rollouts.layout.check_tokens(rollouts.tokens)
        if record is not None and not record.describes(rollouts, model, self.temperature):
            record = None
        # The backward pass reads the tokens again, so they are copied: they must not change.
        rollouts = record.rollouts if record else rollouts.with_tokens(rollouts.tokens.clone())
        documents = record.document_pass if record else None
        read_documents = partial(self._read_documents, model, rollouts, targets.part)
        if documents is None or (documents.log_probs.document is None) == self.with_document:
            with torch.set_grad_enabled(not self._documents_again(model, rollouts.layout)):
                documents = read_documents()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        adds_to_grad = self.adds_to_grad and not _needs_one_gradient(model, weights)
        if not documents.log_probs.rollout.requires_grad:
            tensors = _PassAgain.apply(read_documents, adds_to_grad, documents.tensors, *weights)
            documents = documents.with_tensors(tensors)
        passes = _RolloutPasses(
            rollouts,
            self._chunks(rollouts.layout),
            partial(self._score_rollouts, _unwrapped(model)),
            adds_to_grad,
        )
        states = documents.states
        later = record.log_probs[..., 1:] if record else passes.values(states)
        later = _Deferred.apply(later, passes, len(states), *states, *weights)
        first = documents.log_probs.rollout
        return TokenLogProbs(torch.cat([first, later], dim=-1), documents.log_probs.document)

    def _read_documents(
        self, model: nn.Module, rollouts: Rollouts, part: PackedPart
    ) -> DocumentPass:
        cache = self.forward.new_cache()
        log_probs = self._packed(model, rollouts, part=part, cache=cache)
        return DocumentPass(log_probs, states_in(cache))

    def _score_rollouts(
        self, model: nn.Module, rollouts: Rollouts, states: Sequence[Tensor]
    ) -> Tensor:
        """Log-probabilities (B, n, K, G - 1) of all tokens but the first.

        Args:
            states: keys and values of the documents.
        """
        part, cache = rollouts.layout.predicting_rollouts_part, self.forward.new_cache(states)
        return self._packed(model, rollouts, part=part, cache=cache).rollout

    def _packed(self, model: nn.Module, rollouts: Rollouts, **part: Any) -> TokenLogProbs:
        return packed_log_probs(
            model,
            self.forward,
            rollouts,
            temperature=self.temperature,
            with_document=self.with_document,
            chunk_size=self.chunk_size,
            **part,
        )

    def _chunks(self, layout: PackedLayout) -> tuple[slice, ...]:
        # The last token of a rollout predicts nothing.
        fed = layout.length - 1
        size = self.training_chunk_size
        if size is None:
            device, config = layout.blocks.exists.device, self.forward.config
            size = tokens_with_gradient(device, config.get_text_config(decoder=True).hidden_size)
        return block_chunks(layout, size, tokens_fed=fed, equal=self.forward.compiles_by_shape)


def can_defer(model: nn.Module, forward: PackedForward) -> bool:
    """Whether a model can run forward passes with a cache during the backward pass.

    It cannot in these cases:

    - FSDP2 gathers parameters around each pass, or a wrapper other than DDP is around the model;
    - gradient checkpointing is on, which drops caches;
    - training mode draws noise once per pass, or noise whose size depends on the number of tokens;
    - the cache holds more than keys and values;
    - hooks change the gradients of weights. They must receive the whole gradient, not a chunk's.
    """
    inner = _unwrapped(model)
    return (
        torch.is_grad_enabled()
        and not is_sharded(model)
        and (isinstance(inner, PreTrainedModel) or hasattr(type(inner), "get_base_model"))
        and not (model.training and checkpoints_activations(inner))
        and not (model.training and has_noisy_embeddings(inner))
        and forward.has_plain_cache
        and not (model.training and forward.noise_per_pass)
        and not any(weight._backward_hooks for weight in model.parameters())
    )


def _same_in_sampling(model: nn.Module) -> bool:
    """Whether a pass in training computes the same as a pass in sampling."""
    return not isinstance(model, DistributedDataParallel) and not is_random_in_training(model)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP. DDP itself must not be called while it accumulates gradients."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _needs_one_gradient(model: nn.Module, weights: Sequence[Tensor]) -> bool:
    """Whether something needs exactly one gradient of each weight per backward pass.

    DDP sends that gradient to other processes. Hooks may even step the optimizer with it.
    """
    # torch itself reads this attribute of parameters by name.
    return isinstance(model, DistributedDataParallel) or any(
        weight._post_accumulate_grad_hooks for weight in weights
    )


@dataclass(frozen=True)
class _RolloutPasses:
    """Forward passes over the rollouts, one chunk at a time.

    Attributes:
        rollouts: the batch and its sampled tokens.
        chunks: slices of the K blocks.
        score: computes log-probabilities (B, n, k, G - 1) of the rollouts of k blocks, given the
            documents' keys and values of every layer, (B, H, S, E) each.
        adds_to_grad: whether each chunk adds the gradients of weights to their `.grad`.
    """

    rollouts: Rollouts
    chunks: tuple[slice, ...]
    score: Callable[[Rollouts, Sequence[Tensor]], Tensor]
    adds_to_grad: bool

    def log_probs(self, chunk: slice, states: Sequence[Tensor]) -> Tensor:
        """Log-probabilities (B, n, k, G - 1) of all tokens but the first, for k blocks of a chunk.

        Args:
            chunk: slice of the K blocks.
            states: keys and values of the documents.
        """
        found = self.score(self.rollouts.select_blocks(chunk), states)
        return found[:, :, : self.rollouts.tokens.shape[2] - chunk.start]

    def values(self, states: Sequence[Tensor]) -> Tensor:
        """Log-probabilities (B, n, K, G - 1) of all tokens but the first, without gradient."""
        with torch.no_grad():
            return torch.cat([self.log_probs(chunk, states) for chunk in self.chunks], dim=2)


class _Deferred(torch.autograd.Function):
    """Known log-probabilities as a differentiable function of the documents' states and weights.

    The forward pass returns the known values. The backward pass makes the deferred passes.
    """

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
        add = _add_to_grad if passes.adds_to_grad else _add_to_totals
        totals: list[Tensor | None] = [None] * len(inputs)
        for chunk in passes.chunks:
            with torch.enable_grad():
                log_probs = passes.log_probs(chunk, states)
            add(totals, [log_probs], [d_log_probs[:, :, chunk]], inputs)
        if passes.adds_to_grad:
            # The weights' gradients are in `.grad` already, so None is returned for them.
            totals = [state.grad for state in states if state.requires_grad]
            totals += [None] * (len(inputs) - len(totals))
        of_inputs = iter(totals)
        return None, None, None, *(next(of_inputs) if wants else None for wants in wanted)


class _PassAgain(torch.autograd.Function):
    """A known pass over the documents as a differentiable function of the weights.

    The forward pass returns the known values. The backward pass makes the pass again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        read_documents: Callable[[], DocumentPass],
        adds_to_grad: bool,
        known: Sequence[Tensor],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.read_documents, ctx.adds_to_grad = read_documents, adds_to_grad
        ctx.save_for_backward(*weights)
        return tuple(tensor.detach() for tensor in known)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights = list(ctx.saved_tensors)
        with torch.enable_grad():
            found = ctx.read_documents().tensors
        pairs = zip(found, gradients, strict=True)
        outputs, d_outputs = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        totals: list[Tensor | None] = [None] * len(weights)
        add = _add_to_grad if ctx.adds_to_grad else _add_to_totals
        add(totals, outputs, d_outputs, weights)
        return None, None, None, *totals


def _add_to_grad(
    _totals: list[Tensor | None],
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    inputs: list[Tensor],
) -> None:
    """Add the inputs' gradients to their `.grad`, each as soon as it is computed."""
    torch.autograd.backward(outputs, gradients, inputs=inputs)


def _add_to_totals(
    totals: list[Tensor | None],
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    inputs: list[Tensor],
) -> None:
    """Add the inputs' gradients to the totals."""
    found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
    # One at a time, so that each old total is freed when the new one replaces it.
    for index, new in enumerate(found):
        totals[index] = _sum(totals[index], new)


def _sum(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    # Not in place: autograd may hand out one tensor as the gradient of two inputs.
    return new if total is None else total if new is None else total + new
