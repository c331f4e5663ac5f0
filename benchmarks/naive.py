"""The step in the order of work of the paper's released code: the baseline for measurements of the
library.

- Each sample is a separate row, `[document][block 0][block 1]...`, with a dense mask.
- The whole row is computed again for each of the G tokens that are sampled.
- The head runs over the whole row.
- The feature pass runs all layers and keeps all their states.
- Log-probabilities are a float32 log-softmax over the vocabulary for the whole row.

The results are those of the library: log-probabilities, rewards and gradients agree for the same
rollouts (tests/benchmarks/test_benchmarks.py).

Where this order of work leaves a choice, the cheaper one is used: a row holds only the tokens that
have been drawn, no document is padded, the samples of a document share one mask, and the feature
pass has no head. Attention is the model's own: the released code loads its models with eager
attention (github.com/sjelassi/ebft_openrlhf, openrlhf/models/actor.py: "flash_attention_2", which
takes no such mask, or else "eager"). With sdpa, no matrix of scores is kept. Nothing here uses the
library's layout; anchors and visibility follow from their definition.

Dimension letters: S document tokens, K blocks, n samples, G rollout length, t tokens drawn so far,
r rows computed at once, T = S + K * t tokens of a row, V vocabulary, D feature width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_ebft.config import EBFTSettings
from hf_ebft.feature_network.shared_base import adapters_off
from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.features import normalize_layers, pool, token_positions
from hf_ebft.objective.rewards import Rewards, feature_matching_rewards
from hf_ebft.packed.model_parts import bare_model
from hf_ebft.training.stopwatch import Stopwatch


@dataclass(frozen=True)
class Document:
    """One document and where its blocks start.

    Attributes:
        tokens: (S,) int64.
        ends: (K,) int64, length of each block's prefix.
    """

    tokens: Tensor
    ends: Tensor

    def predictors(self, length: int) -> Tensor:
        """(K, G) int64: which token of a whole row predicts each rollout token."""
        n_blocks, width = self.ends.shape[0], self.tokens.shape[0]
        place = torch.arange(n_blocks * length, device=self.ends.device).view(n_blocks, length)
        predictor = width + place - 1
        predictor[:, 0] = self.ends - 1
        return predictor


@dataclass(frozen=True)
class Sampled:
    """A document with its rollouts: `tokens` (n, K, G) int64."""

    document: Document
    tokens: Tensor


def read_documents(inputs: Mapping[str, Tensor], settings: EBFTSettings) -> list[Document]:
    """The documents of a batch, padding dropped.

    Args:
        inputs: `input_ids` and, if padded, `attention_mask` (B, S); one document a row.

    Raises:
        ValueError: other columns, which this baseline does not know.
    """
    unknown = sorted(inputs.keys() - {"input_ids", "attention_mask"})
    if unknown:
        raise ValueError(f"The naive step reads input_ids and attention_mask, not {unknown}.")
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    documents = []
    for row, real in zip(inputs["input_ids"], mask.bool(), strict=True):
        tokens = row[real]
        stop = tokens.shape[0] - settings.generate_max_len + 1
        ends = range(settings.context_length, stop, settings.stride)
        documents.append(
            Document(tokens, torch.tensor(list(ends), dtype=torch.int64, device=row.device))
        )
    return documents


def dense_visibility(document: Document, drawn: int) -> Tensor:
    """(T, T) bool: who sees whom in a row that holds `drawn` tokens of each block.

    A document token sees the document up to itself; the rollout of block k sees `ends[k]` tokens
    of the document, and itself up to the token.
    """
    width, n_blocks = document.tokens.shape[0], document.ends.shape[0]
    device = document.tokens.device
    place = torch.arange(width, device=device)
    visible = torch.zeros(
        width + n_blocks * drawn, width + n_blocks * drawn, dtype=torch.bool, device=device
    )
    visible[:width, :width] = place[None, :] <= place[:, None]
    prefixes = place[None, :] < document.ends[:, None]
    visible[width:, :width] = prefixes.repeat_interleave(drawn, dim=0)
    within = torch.ones(drawn, drawn, dtype=torch.bool, device=device).tril()
    own = torch.eye(n_blocks, dtype=torch.bool, device=device)
    visible[width:, width:] = torch.kron(own, within)
    return visible


class NaiveStep:
    """Sampling, features, training forward and backward of one batch.

    Args:
        policy: a transformers causal language model, or a PEFT model of one. Not the model that a
            trainer holds: a trainer may set its attention.
        feature_network: phi; None: the PEFT policy with its adapters off.
        settings: those of the trainer that it is compared with.
        rows_at_once: rows that a forward pass holds; None: all n samples of a document. Fewer need
            less memory; the gradient is the same.
        seed: of the sampling.
    """

    def __init__(
        self,
        policy: nn.Module,
        feature_network: nn.Module | None,
        settings: EBFTSettings,
        *,
        rows_at_once: int | None = None,
        seed: int = 0,
    ) -> None:
        self.policy = policy
        self.feature_network = feature_network
        self.settings = settings
        self.rows_at_once = rows_at_once or settings.n_samples_per_prompt
        device = next(policy.parameters()).device
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.stopwatch = Stopwatch(device)

    def step(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Sample, reward and leave the gradient in the policy's weights; returns the loss."""
        with self.stopwatch.phase("sampling"):
            batch = [self.sample(document) for document in read_documents(inputs, self.settings)]
        return self.learn(batch)

    def learn(self, batch: Sequence[Sampled]) -> Tensor:
        """The step after sampling."""
        with self.stopwatch.phase("features"):
            advantages = [
                compute_advantages(self.rewards(sampled), self.settings.advantage_estimator)[0]
                for sampled in batch
            ]
        total = torch.zeros((), device=self.generator.device)
        for sampled, advantage in zip(batch, advantages, strict=True):
            for rows in self._row_chunks():
                with self.stopwatch.phase("training_forward"):
                    loss = self._loss(sampled, advantage, rows) / len(batch)
                with self.stopwatch.phase("backward"):
                    loss.backward()
                total += loss.detach()
        return total

    def sample(self, document: Document) -> Sampled:
        """Draw G tokens after each prefix, n times, recomputing the rows for each of them."""
        settings = self.settings
        shape = (settings.n_samples_per_prompt, document.ends.shape[0])
        tokens = torch.zeros((*shape, 0), dtype=torch.int64, device=document.tokens.device)
        if document.ends.shape[0] == 0:
            return Sampled(document, tokens.new_zeros((*shape, settings.generate_max_len)))
        for _ in range(settings.generate_max_len):
            step = self.next_token_probabilities(document, tokens)
            drawn = torch.multinomial(step.flatten(0, 1), 1, generator=self.generator)
            tokens = torch.cat([tokens, drawn.view(*shape, 1)], dim=2)
        return Sampled(document, tokens)

    def next_token_probabilities(self, document: Document, tokens: Tensor) -> Tensor:
        """(n, K, V) float32: the distribution that each rollout's next token is drawn from.

        Args:
            tokens: (n, K, t), those drawn so far.
        """
        drawn = tokens.shape[2]
        # The last token of the prefix, then the newest of the rollout.
        newest = (
            document.tokens.shape[0]
            - 1
            + drawn * torch.arange(1, document.ends.shape[0] + 1, device=tokens.device)
        )
        predictors = document.ends - 1 if drawn == 0 else newest
        probabilities = []
        with _evaluating(self.policy):
            for rows in self._row_chunks():
                logits = self.policy(**self._inputs(document, tokens[rows])).logits
                scaled = logits[:, predictors].float() / self.settings.temperature
                probabilities.append(torch.softmax(scaled, dim=-1))
        return torch.cat(probabilities)

    def rewards(self, sampled: Sampled) -> Rewards:
        """Rewards (1, n, K) of a document's rollouts."""
        settings, document = self.settings, sampled.document
        n_blocks, width = document.ends.shape[0], document.tokens.shape[0]
        pooled = torch.tensor(token_positions(settings.embed_method, settings.generate_max_len))
        pooled = pooled.to(document.tokens.device)
        first = torch.arange(n_blocks, device=pooled.device) * settings.generate_max_len
        rollout_places = width + first[:, None] + pooled
        window_places = document.ends[:, None] + pooled
        generated, ground_truth = [], None
        for rows in self._row_chunks():
            states = self._feature_states(document, sampled.tokens[rows])
            features = normalize_layers(states, settings.feature_normalization)
            generated.append(pool(features[:, rollout_places], settings.embed_method))
            ground_truth = pool(features[:1, window_places], settings.embed_method)
        assert ground_truth is not None
        return feature_matching_rewards(
            torch.cat(generated)[None],
            ground_truth,
            alignment_coef=settings.alignment_coef,
            diversity_coef=settings.diversity_coef,
            use_whitening=settings.use_whitening,
            whitening_space=settings.whitening_space,
            whitening_tolerance=settings.whitening_tolerance,
        )

    def log_probs(self, sampled: Sampled, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Log-probabilities of some rows, with gradient.

        Returns:
            (r, K, G) of the rollout tokens at the sampling temperature, and (r, S - 1) of the
            document's tokens at temperature 1 (empty where no cross-entropy is wanted).
        """
        document, tokens, settings = sampled.document, sampled.tokens[rows], self.settings
        logits = self.policy(**self._inputs(document, tokens)).logits
        scores = torch.log_softmax(logits.float() / settings.temperature, dim=-1)
        predictors = document.predictors(settings.generate_max_len)
        row = torch.arange(tokens.shape[0], device=tokens.device)[:, None, None]
        rollout = scores[row, predictors, tokens]
        if settings.ce_coef == 0:
            return rollout, scores.new_zeros(tokens.shape[0], 0)
        width = document.tokens.shape[0]
        scores = torch.log_softmax(logits[:, : width - 1].float(), dim=-1)
        targets = document.tokens[1:, None].expand(tokens.shape[0], -1, -1)
        return rollout, scores.gather(2, targets)[..., 0]

    def _loss(self, sampled: Sampled, advantage: Tensor, rows: slice) -> Tensor:
        """What some of a document's rows contribute to its loss; `advantage` (n, K)."""
        settings = self.settings
        rollout, document = self.log_probs(sampled, rows)
        rl_loss = -(advantage[rows, :, None] * rollout).sum() / max(1, sampled.tokens.numel())
        loss = settings.rl_coef * rl_loss
        if settings.ce_coef > 0:
            share = rollout.shape[0] / settings.n_samples_per_prompt
            loss = loss - settings.ce_coef * share * document.mean()
        return loss

    def _feature_states(self, document: Document, tokens: Tensor) -> Sequence[Tensor]:
        """The feature layers' hidden states (r, T, H), out of those of all layers."""
        phi = self.policy if self.feature_network is None else self.feature_network
        off = adapters_off(phi) if phi is self.policy else contextlib.nullcontext()
        with _evaluating(phi), off:
            backbone = bare_model(phi).base_model
            inputs = self._inputs(document, tokens)
            states = backbone(**inputs, output_hidden_states=True).hidden_states
        n_layers = len(states) - 1
        return [states[int(fraction * n_layers)] for fraction in self.settings.feature_layers]

    def _inputs(self, document: Document, tokens: Tensor) -> dict[str, Any]:
        """Model inputs of rows that hold `tokens` (r, K, t) after the document."""
        n_rows, _, drawn = tokens.shape
        steps = torch.arange(drawn, device=tokens.device)
        places = torch.arange(document.tokens.shape[0], device=tokens.device)
        position = torch.cat([places, (document.ends[:, None] + steps).flatten()])
        mask = dense_visibility(document, drawn)[None, None]
        if bare_model(self.policy).config._attn_implementation == "eager":
            dtype = bare_model(self.policy).dtype
            lowest = torch.finfo(dtype).min
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
        return {
            "input_ids": torch.cat([document.tokens.expand(n_rows, -1), tokens.flatten(1)], dim=1),
            "position_ids": position.expand(n_rows, -1),
            "attention_mask": mask.expand(n_rows, -1, -1, -1),
            "use_cache": False,
        }

    def _row_chunks(self) -> Iterator[slice]:
        for start in range(0, self.settings.n_samples_per_prompt, self.rows_at_once):
            yield slice(start, min(start + self.rows_at_once, self.settings.n_samples_per_prompt))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
