"""Measures one policy under fixed settings: read a batch, sample after its prefixes, reward.

Everything that samples from a policy outside of the training step uses a `Measurer`: the evaluation
by document, the comparison of models, and the samples that people read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_ebft.config import EBFTSettings
from hf_ebft.feature_network.network import FeatureNetwork, FeaturePass
from hf_ebft.objective.rewards import Rewards, rewards_from_settings
from hf_ebft.objective.whitening import CorpusWhitening
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.packed.sampling import Rollouts, sample_rollouts
from hf_ebft.packed.targets import TokenLogProbs
from hf_ebft.rows.documents import DocumentReader, Documents
from hf_ebft.rows.layout import PackedLayout


@dataclass(frozen=True)
class Measurer:
    """A policy and everything that is the same for all batches.

    Attributes:
        model: the policy, not wrapped by DDP; it may be a PEFT model.
        forward: its forward pass over packed rows.
        settings: how rollouts are sampled, embedded and rewarded.
        reader: reads batches.
        feature_network: phi; None if no rewards are needed.
        corpus_whitening: the whitening of `whitening_space="corpus"`.
    """

    model: nn.Module
    forward: PackedForward
    settings: EBFTSettings
    reader: DocumentReader
    feature_network: FeatureNetwork | None = None
    corpus_whitening: CorpusWhitening | None = None

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        settings: EBFTSettings,
        feature_network: FeatureNetwork | None = None,
        *,
        corpus_whitening: CorpusWhitening | None = None,
        eos_token_id: int | None = None,
    ) -> Measurer:
        """A measurer of a model without a trainer.

        Args:
            model, settings, feature_network, corpus_whitening: see the class.
            eos_token_id: the token that ends documents if `document_masking` is True and rows mark
                no boundaries.

        Raises:
            ValueError: the model cannot be exact on packed rows.
        """
        reader = DocumentReader(
            document_masking=settings.document_masking, eos_token_id=eos_token_id
        )
        forward = PackedForward.for_model(model, settings.packed_attention)
        return cls(model, forward, settings, reader, feature_network, corpus_whitening)

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return next(self.model.parameters()).device

    def read(self, batch: Mapping[str, Any]) -> Documents:
        """The documents of a batch, on the policy's device."""
        return self.reader.read(batch, self.device)

    def sample(self, layout: PackedLayout, generator: torch.Generator) -> Rollouts:
        """Rollouts after every prefix of a layout."""
        return sample_rollouts(
            self.model,
            self.forward,
            layout,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            chunk_size=self.settings.log_prob_chunk_size,
            generator=generator,
        )

    def log_probs(self, rollouts: Rollouts, *, with_document: bool) -> TokenLogProbs:
        """Log-probabilities of rollouts at the sampling temperature, of the documents at 1."""
        return packed_log_probs(
            self.model,
            self.forward,
            rollouts,
            temperature=self.settings.temperature,
            with_document=with_document,
            chunk_size=self.settings.log_prob_chunk_size,
        )

    def rewards(self, rollouts: Rollouts) -> tuple[Rewards, Rewards]:
        """Rewards (B, n, K) as in training with these settings, and rewards without whitening."""
        length = rollouts.layout.length
        return self.rewards_of_beginnings(rollouts, (length,))[length]

    def rewards_of_beginnings(
        self, rollouts: Rollouts, lengths: Sequence[int]
    ) -> dict[int, tuple[Rewards, Rewards]]:
        """`rewards` of the first tokens of rollouts and windows, for several lengths at once."""
        assert self.feature_network is not None, "nothing to embed rollouts with"
        by_length = self.feature_network.embed_beginnings(rollouts, lengths)
        return {
            length: (
                self._rewards(features, self.settings.use_whitening),
                self._rewards(features, False),
            )
            for length, features in by_length.items()
        }

    def _rewards(self, features: FeaturePass, use_whitening: bool) -> Rewards:
        return rewards_from_settings(
            self.settings,
            features.generated,
            features.ground_truth,
            use_whitening=use_whitening,
            corpus_whitening=self.corpus_whitening,
        )
