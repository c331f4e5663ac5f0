"""Sampling: one prefill of the documents, then G - 1 decoding steps for all blocks together.

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
    """Results of a forward pass over the documents, with or without gradient.

    Attributes:
        log_probs: log-probabilities of the rollouts' first tokens, (B, n, K, 1), and of the
            documents if they were requested.
        states: keys and values of every layer, (B, H, S, E) each.
    """

    log_probs: TokenLogProbs
    states: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the pass, in a fixed order."""
        document = self.log_probs.document
        return [self.log_probs.rollout, *([] if document is None else [document]), *self.states]

    def with_tensors(self, tensors: Sequence[Tensor]) -> DocumentPass:
        """The same pass with its tensors replaced, in the order of `tensors`."""
        first, *others = tensors
        document = None if self.log_probs.document is None else others.pop(0)
        return DocumentPass(TokenLogProbs(first, document), others)


@dataclass(frozen=True)
class Rollouts:
    """Sampled continuations of the prefixes of a batch.

    Attributes:
        tokens: (B, n, K, G) int64; arbitrary if the block does not exist.
        exists: (B, K) bool, whether the block exists.
        layout: where prefixes, windows and rollouts are in the packed row.
    """

    tokens: Tensor
    exists: Tensor
    layout: PackedLayout

    def with_tokens(self, tokens: Tensor) -> Rollouts:
        """The same blocks with other tokens.

        Args:
            tokens: (B, n, K, G) int64, on any device.

        Raises:
            ValueError: the tokens have another shape or dtype.
        """
        self.layout.check_tokens(tokens)
        return Rollouts(tokens.to(self.tokens.device), self.exists, self.layout)

    def select_blocks(self, chunk: slice) -> Rollouts:
        """The rollouts of a slice of the blocks, see `PackedLayout.select_blocks`."""
        layout, tokens = self.layout.select_blocks(chunk), self.tokens[:, :, chunk]
        missing = beyond(chunk, self.tokens.shape[2])
        if missing > 0:
            tokens = torch.nn.functional.pad(tokens, (0, 0, 0, missing))
        return Rollouts(tokens, layout.blocks.exists, layout)

    def input_ids(self, part: PackedPart) -> Tensor:
        """(B, Q) token ids of the tokens that a part of the row feeds."""
        return self.layout.input_ids(self.tokens)[:, part.queries.slot[0]]


@dataclass(frozen=True)
class SamplingRecord:
    """Results of sampling besides the tokens, which training on the same rollouts can use.

    It is separate from the rollouts, because it becomes invalid when their tokens are replaced or
    when they are trained on a second time.

    Attributes:
        rollouts: the rollouts as sampled. No other code has a reference to their tokens.
        log_probs: (B, n, K, G) float32, log-probabilities of the tokens at the temperature, before
            top-p truncation.
        temperature: sampling temperature.
        policy: the model that sampled.
        weight_versions: versions of the policy's weights, see `weight_versions`.
        document_pass: the pass over the documents; None if it was not kept. Its autograd graph, if
            it has one, can be used in one backward pass.
    """

    rollouts: Rollouts
    log_probs: Tensor
    temperature: float
    policy: nn.Module
    weight_versions: tuple[int, ...]
    document_pass: DocumentPass | None = None

    def describes(self, rollouts: Rollouts, policy: nn.Module, temperature: float) -> bool:
        """Whether this policy, with its current weights, sampled these tokens.

        The temperature must be the same, too.
        """
        return (
            rollouts.layout is self.rollouts.layout
            and policy is self.policy
            and temperature == self.temperature
            and weight_versions(policy) == self.weight_versions
            and torch.equal(rollouts.tokens, self.rollouts.tokens)
        )


def weight_versions(policy: nn.Module) -> tuple[int, ...]:
    """How often each weight was changed in place, by autograd's version counters.

    They show whether weights changed after sampling: a subclass may, for example, sample with
    averaged weights and train other ones.
    """
    return tuple(parameter._version for parameter in policy.parameters())


def make_generator(device: torch.device, *entropy: int) -> torch.Generator:
    """Make a generator seeded from several numbers, e.g. (seed, step, process).

    The seed is a function of the step, so checkpoints need not store the generator: a resumed run
    draws the same numbers as an uninterrupted one.
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
            which also lists the errors.
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
    """Sample G tokens after every prefix of the batch, n times, and return a record of it.

    The number of forward passes is always G, whatever the batch contains, so that all processes of
    a distributed run gather parameters equally often.

    Args:
        model: the wrapped policy, in any mode. It samples in evaluation mode, without gradient.
        forward: how this policy runs packed rows.
        layout: the batch.
        temperature: > 0, divides the logits.
        top_p: nucleus mass; 1.0 keeps the whole distribution.
        chunk_size: rows of logits that exist at once.
        generator: source of randomness, on the model's device.
        targets: targets of the documents, to be scored in sampling's own pass over the documents
            (in evaluation mode). That pass is then kept in the record. None: the pass is not kept.

    Returns:
        The rollouts, and the results that a training pass over them can use.

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
    """Make the pass over the documents, which fills the cache, and draw each rollout's first token.

    Returns:
        Tokens (B, K * n) and their log-probabilities; and the pass, or None without targets.
    """
    _, n_samples, n_blocks, _ = layout.rollout_shape
    uniform = uniform.unflatten(1, (n_blocks, n_samples))
    part, text = layout.document_part, layout.documents.input_ids
    if targets is None:
        kept = KeptPlaces.for_layout(layout, whole_document=False, part=part)
    else:
        kept = targets.kept
    # The last token of the prefix predicts the first token of all samples.
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
    # Only once, after the last step: a check in every step would make the host wait for the device.
    if bool(torch.isnan(log_probs).any()):
        raise FloatingPointError(
            "The policy's logits are not finite, so no rollout can be sampled. Its weights have "
            "probably diverged: lower learning_rate, raise warmup_steps or set max_grad_norm; with "
            "fp16, train in bf16."
        )
