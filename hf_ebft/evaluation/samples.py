"""Samples rollouts after a few prefixes, for people to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_ebft.config import EBFTSettings
from hf_ebft.data.collator import EBFTDataCollator
from hf_ebft.evaluation.documents import Collator, Rows
from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.objective.whitening import CorpusWhitening
from hf_ebft.packed.sampling import Rollouts, make_generator
from hf_ebft.rows.anchors import Blocks, find_blocks_for
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training.measuring import Measurer
from hf_ebft.training.random_streams import Stream


@dataclass(frozen=True)
class Continuation:
    """Token ids of a prefix, of the policy's rollout, and of the ground truth."""

    prefix: list[int]
    rollout: list[int]
    ground_truth: list[int]


@dataclass(frozen=True)
class RolloutGroup:
    """The rollouts of one prefix as token ids, with their rewards.

    Attributes:
        row: index of the row of the prefix.
        prefix, ground_truth: tokens of the document.
        rollouts: n continuations.
        rewards, alignments, diversities: one for each rollout.
        cfm_loss: that of the group.
    """

    row: int
    prefix: list[int]
    ground_truth: list[int]
    rollouts: list[list[int]]
    rewards: list[float]
    alignments: list[float]
    diversities: list[float]
    cfm_loss: float

    def to_dict(self, decode: Callable[[list[int]], str] | None = None) -> dict[str, Any]:
        """Plain data.

        Args:
            decode: converts token ids to text; None keeps the ids.
        """
        show: Callable[[list[int]], Any] = decode or list
        numbers = zip(self.rollouts, self.rewards, self.alignments, self.diversities, strict=True)
        return {
            "row": self.row,
            "prefix": show(self.prefix),
            "ground_truth": show(self.ground_truth),
            "cfm_loss": self.cfm_loss,
            "rollouts": [
                {"text": show(ids), "reward": reward, "alignment": a, "diversity": d}
                for ids, reward, a, d in numbers
            ],
        }


def sample_continuations(
    model: nn.Module,
    rows: Rows,
    settings: EBFTSettings,
    *,
    length: int | None = None,
    data_collator: Collator | None = None,
    eos_token_id: int | None = None,
    seed: int = 0,
) -> list[Continuation]:
    """Sample one rollout after a prefix in the middle of each row.

    Args:
        model: the policy.
        rows: tokenized rows, sampled in one batch; rows without room for a block are skipped.
        settings: settings of blocks and sampling.
        length: tokens of a rollout. Default: `generate_max_len`.
        data_collator: default: `EBFTDataCollator`.
        eos_token_id: the token that ends documents if `document_masking` is True and rows mark no
            boundaries.
        seed: seed of the rollouts; two policies get the same random numbers from the same seed.
    """
    measurer = Measurer.for_model(model, settings, eos_token_id=eos_token_id)
    rollouts = _continue_rows(measurer, rows, 1, length, data_collator, seed)
    return [
        Continuation(
            prefix=_prefix(rollouts, row),
            rollout=rollouts.tokens[row, 0, 0].tolist(),
            ground_truth=_ground_truth(rollouts, row),
        )
        for row in _continued(rollouts)
    ]


def sample_groups(
    model: nn.Module,
    feature_network: FeatureNetwork,
    rows: Rows,
    settings: EBFTSettings,
    *,
    n_samples: int | None = None,
    length: int | None = None,
    data_collator: Collator | None = None,
    corpus_whitening: CorpusWhitening | None = None,
    eos_token_id: int | None = None,
    seed: int = 0,
) -> list[RolloutGroup]:
    """Sample several rollouts after a prefix in the middle of each row, with their rewards.

    Args:
        model: the policy.
        feature_network: phi.
        rows: tokenized rows, sampled in one batch; rows without room for a block are skipped.
        settings: settings of blocks, sampling, features and rewards.
        n_samples: rollouts of each group. Default: `n_samples_per_prompt`.
        length: tokens of a rollout. Default: `generate_max_len`.
        data_collator: default: `EBFTDataCollator`.
        corpus_whitening: the whitening of `whitening_space="corpus"`.
        eos_token_id: the token that ends documents if `document_masking` is True and rows mark no
            boundaries.
        seed: seed of the rollouts.
    """
    measurer = Measurer.for_model(
        model,
        settings,
        feature_network,
        corpus_whitening=corpus_whitening,
        eos_token_id=eos_token_id,
    )
    n_samples = settings.n_samples_per_prompt if n_samples is None else n_samples
    rollouts = _continue_rows(measurer, rows, n_samples, length, data_collator, seed)
    rewards, _ = measurer.rewards(rollouts)
    return [
        RolloutGroup(
            row=row,
            prefix=_prefix(rollouts, row),
            ground_truth=_ground_truth(rollouts, row),
            rollouts=rollouts.tokens[row, :, 0].tolist(),
            rewards=rewards.reward[row, :, 0].tolist(),
            alignments=rewards.alignment[row, :, 0].tolist(),
            diversities=rewards.diversity[row, :, 0].tolist(),
            cfm_loss=float(rewards.cfm_loss[row, 0]),
        )
        for row in _continued(rollouts)
    ]


def _continue_rows(
    measurer: Measurer,
    rows: Rows,
    n_samples: int,
    length: int | None,
    data_collator: Collator | None,
    seed: int,
) -> Rollouts:
    """Rollouts of the middle block of each row, K = 1."""
    settings = measurer.settings
    length = settings.generate_max_len if length is None else length
    collate = data_collator or EBFTDataCollator()
    documents = measurer.read(collate([rows[i] for i in range(len(rows))]))
    blocks = _middle_block(find_blocks_for(settings, documents, generate_max_len=length))
    layout = PackedLayout(documents, blocks, n_samples=n_samples, length=length)
    return measurer.sample(layout, make_generator(measurer.device, seed, Stream.DOCUMENTS))


def _continued(rollouts: Rollouts) -> list[int]:
    """Rows that had room for a block."""
    return rollouts.exists[:, 0].nonzero()[:, 0].tolist()


def _prefix(rollouts: Rollouts, row: int) -> list[int]:
    blocks = rollouts.layout.blocks
    end, length = int(blocks.column[row, 0]), int(blocks.position[row, 0])
    return rollouts.layout.documents.input_ids[row, end - length : end].tolist()


def _ground_truth(rollouts: Rollouts, row: int) -> list[int]:
    start = int(rollouts.layout.blocks.column[row, 0])
    return rollouts.layout.documents.input_ids[row, start : start + rollouts.layout.length].tolist()


def _middle_block(blocks: Blocks) -> Blocks:
    """The block in the middle of each row: fields (B, 1)."""
    middle = (blocks.exists.sum(dim=1, keepdim=True) // 2).clamp(max=blocks.exists.shape[1] - 1)
    return Blocks(
        column=blocks.column.gather(1, middle),
        position=blocks.position.gather(1, middle),
        document=blocks.document.gather(1, middle),
        exists=torch.gather(blocks.exists, 1, middle),
    )
