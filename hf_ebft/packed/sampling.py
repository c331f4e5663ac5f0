"""Sampling: one prefill of the documents, then G - 1 decoding steps for all blocks at once.

Dimension letters: B rows of the batch, S document tokens, K blocks, n samples, G rollout length, V
vocabulary, Q tokens of a row that are continued, N rows of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_ebft.packed.decoding import decode
from hf_ebft.packed.drawing import Sampler, uniform_numbers
from hf_ebft.packed.forward import PackedForward, evaluation_mode, states_in
from hf_ebft.packed.heads import ToLogits
from hf_ebft.packed.targets import KeptPlaces, Targets, TokenLogProbs
from hf_ebft.rows.layout import PackedLayout, PackedPart, beyond


@dataclass(frozen=True)
class DocumentPass:
    """A forward pass over the documents, with gradient or without.

    Attributes:
        log_probs: of the rollouts' first tokens, (B, n, K, 1), and of the documents if asked for.
        states: keys and values of every layer, (B, H, S, E) each.
    """

    log_probs: TokenLogProbs
    states: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All of it, in a fixed order."""
        document = self.log_probs.document
        return [self.log_probs.rollout, *([] if document is None else [document]), *self.states]

    def with_tensors(self, tensors: Sequence[Tensor]) -> DocumentPass:
        """The same pass with other `tensors`."""
        first, *others = tensors
        document = None if self.log_probs.document is None else others.pop(0)
        return DocumentPass(TokenLogProbs(first, document), others)


@dataclass(frozen=True)
class Rollouts:
    """Sampled continuations of the prefixes of a batch.

    Attributes:
        tokens: (B, n, K, G) int64; arbitrary where the block does not exist.
        exists: (B, K) bool.
        layout: where prefixes, windows and rollouts lie in the packed row.
    """

    tokens: Tensor
    exists: Tensor
    layout: PackedLayout

    def with_tokens(self, tokens: Tensor) -> Rollouts:
        """The same blocks with other tokens.

        Args:
            tokens: (B, n, K, G) int64, on any device.

        Raises:
            ValueError: tokens of another shape or type.
        """
        self.layout.check_tokens(tokens)
        return Rollouts(tokens.to(self.tokens.device), self.exists, self.layout)

    def select_blocks(self, chunk: slice) -> Rollouts:
        """The rollouts of some blocks, see `PackedLayout.select_blocks`."""
        layout, tokens = self.layout.select_blocks(chunk), self.tokens[:, :, chunk]
        missing = beyond(chunk, self.tokens.shape[2])
        if missing > 0:
            tokens = torch.nn.functional.pad(tokens, (0, 0, 0, missing))
        return Rollouts(tokens, layout.blocks.exists, layout)

    def input_ids(self, part: PackedPart) -> Tensor:
        """(B, Q) token ids of what a part of the row feeds."""
        return self.layout.input_ids(self.tokens)[:, part.queries.slot[0]]


@dataclass(frozen=True)
class SamplingRecord:
    """What sampling computed beside the tokens. Training on these very rollouts can use it.

    It is handed on beside the rollouts and not inside them: rollouts may get other tokens, or be
    trained on a second time, when none of this is true any longer.

    Attributes:
        rollouts: as they were sampled; nobody else holds their tokens.
        log_probs: (B, n, K, G) float32, of the tokens, at the temperature, before any truncation.
        temperature: of the sampling.
        policy: the model that sampled.
        weight_versions: of the policy's weights, see `weight_versions`.
        document_pass: the pass over the documents, if it was to be kept. Its graph, if it has one,
            serves one backward pass.
    """

    rollouts: Rollouts
    log_probs: Tensor
    temperature: float
    policy: nn.Module
    weight_versions: tuple[int, ...]
    document_pass: DocumentPass | None = None

    def describes(self, rollouts: Rollouts, policy: nn.Module, temperature: float) -> bool:
        """Whether this policy, as it is now, has sampled these tokens at this temperature."""
        return (
            rollouts.layout is self.rollouts.layout
            and policy is self.policy
            and temperature == self.temperature
            and weight_versions(policy) == self.weight_versions
            and torch.equal(rollouts.tokens, self.rollouts.tokens)
        )


def weight_versions(policy: nn.Module) -> tuple[int, ...]:
    """How often each weight was changed in place, as autograd counts it for tensors that it saves.

    A subclass may sample with other weights than it trains, averaged ones for example.
    """
    return tuple(parameter._version for parameter in policy.parameters())


def make_generator(device: torch.device, *entropy: int) -> torch.Generator:
    """A generator seeded from several numbers, e.g. (seed, step, process).

    Being a function of the step, it needs no place in checkpoints: a resumed run draws what an
    uninterrupted one would have drawn.
    """
    sequence = np.random.SeedSequence([number % 2**64 for number in entropy])
    seed = int(sequence.generate_state(1, np.uint64)[0]) % 2**63
    return torch.Generator(device=device).manual_seed(seed)


def sample_rollouts(
    model: nn.Module,
    forward: PackedForward,
    layout: PackedLayout,
    *,
    temperature: float,
    top_p: float,
    chunk_size: int,
    generator: torch.Generator,
) -> Rollouts:
    """Sample G tokens after every prefix of the batch, n times.

    Args:
        model, forward, layout, temperature, top_p, chunk_size, generator: see `sample_with_record`,
            whose errors it raises, too.
    """
    rollouts, _ = sample_with_record(
        model,
        forward,
        layout,
        temperature=temperature,
        top_p=top_p,
        chunk_size=chunk_size,
        generator=generator,
    )
    return rollouts


def sample_with_record(
    model: nn.Module,
    forward: PackedForward,
    layout: PackedLayout,
    *,
    temperature: float,
    top_p: float,
    chunk_size: int,
    generator: torch.Generator,
    targets: Targets | None = None,
) -> tuple[Rollouts, SamplingRecord]:
    """Sample G tokens after every prefix of the batch, n times, and say what was computed.

    The number of forward passes is G whatever the batch holds, so that all processes of a
    distributed run gather parameters equally often.

    Args:
        model: the wrapped policy, in any mode; sampled in evaluation mode, without gradient.
        forward: how this policy runs packed rows.
        layout: the batch.
        temperature: > 0, divides the logits.
        top_p: nucleus mass; 1.0 keeps the whole distribution.
        chunk_size: rows of logits that exist at once.
        generator: source of randomness, on the model's device.
        targets: of the documents, to be scored in the pass over them that sampling makes anyway;
            the pass is kept. In evaluation mode, like all of it.

    Returns:
        The rollouts, and what can serve a training pass over them.

    Raises:
        FloatingPointError: the policy's logits are not finite.
        ValueError: a document or the packed row is too long for the model.
    """
    forward.limits.check(layout)
    sampler = Sampler(temperature, top_p, chunk_size)
    rows, n_samples, n_blocks, length = layout.rollout_shape
    uniform = uniform_numbers((length, rows, n_blocks * n_samples), generator)
    with evaluation_mode(model):
        cache = forward.new_cache()
        first, document_pass = _first_tokens(
            model, forward, layout, sampler, cache, targets, uniform[0]
        )
        tokens, log_probs = decode(model, forward, layout, sampler, cache, first, uniform[1:])
    _refuse_not_finite(log_probs)
    rollouts = Rollouts(tokens, layout.blocks.exists, layout)
    record = SamplingRecord(
        rollouts.with_tokens(tokens.clone()),
        log_probs,
        temperature,
        model,
        weight_versions(model),
        document_pass,
    )
    return rollouts, record


def _first_tokens(
    model: nn.Module,
    forward: PackedForward,
    layout: PackedLayout,
    sampler: Sampler,
    cache: DynamicCache,
    targets: Targets | None,
    uniform: Tensor,
) -> tuple[list[Tensor], DocumentPass | None]:
    """The pass over the documents, which fills the cache.

    Returns:
        Tokens (B, K * n) and their log-probabilities, and the pass itself if there are targets.
    """
    _, n_samples, n_blocks, _ = layout.rollout_shape
    uniform = uniform.unflatten(1, (n_blocks, n_samples))
    part, text = layout.document_part, layout.documents.input_ids
    if targets is None:
        kept = KeptPlaces.for_layout(layout, whole_document=False, part=part)
    else:
        kept = targets.kept
    # The first token is predicted by the prefix's last one, for all samples alike.
    index = kept.index_of[layout.predictor[:, 0, :, 0]]

    def first_tokens(states: Tensor, to_logits: ToLogits) -> list[Tensor]:
        with torch.no_grad():
            last = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
            found = sampler(last, to_logits, uniform)
        if targets is not None:
            tokens = found[0].view(-1, n_blocks, n_samples, 1).transpose(1, 2)
            found += targets.score(tokens, states, to_logits)
        return found

    with torch.set_grad_enabled(targets is not None and targets.with_gradient):
        found = forward.through_head(
            model, text, part, part.index_of[kept.places], first_tokens, cache=cache
        )
        if targets is None:
            return found, None
        return found[:2], DocumentPass(targets.join(found[2:]), states_in(cache))


def _refuse_not_finite(log_probs: Tensor) -> None:
    # Once, after the last step: a look at every step would make the host wait for the device.
    if bool(torch.isnan(log_probs).any()):
        raise FloatingPointError(
            "The policy's logits are not finite, so no rollout can be sampled. Its weights have "
            "probably diverged: lower learning_rate, raise warmup_steps or set max_grad_norm; with "
            "fp16, train in bf16."
        )
