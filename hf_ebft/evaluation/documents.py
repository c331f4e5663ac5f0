"""Measures a policy on held-out text, document by document, so that two policies can be compared.

The trainer logs means over its batches. Here every measurement belongs to a document, and seeds and
the feature network are fixed. So "before" and "after" differ only by the policy, and their
differences can be computed for each document.

Dimension letters: B rows of a batch, S tokens of a row, K blocks, n samples, G rollout length,
W most documents in a row, N documents in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_ebft.config import EBFTSettings
from hf_ebft.data.collator import EBFTDataCollator
from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.objective.rewards import Rewards
from hf_ebft.objective.whitening import CorpusWhitening
from hf_ebft.packed.forward import evaluation_mode
from hf_ebft.packed.sampling import make_generator
from hf_ebft.rows.anchors import find_blocks_for
from hf_ebft.rows.documents import Documents, predicted_targets
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training.measuring import Measurer
from hf_ebft.training.metric_table import HELD_OUT_METRICS
from hf_ebft.training.random_streams import Stream

#: The measurements of every document.
DOCUMENT_METRICS = {
    name: HELD_OUT_METRICS[name]
    for name in (
        "cross_entropy",
        "cfm_loss",
        "energy_score",
        "excess_over_spread",
        "cosine_alignment",
        "dot_diversity",
        "alignment",
        "diversity",
        "entropy",
    )
}

Collator = Callable[[list[Any]], Mapping[str, Any]]


class Rows(Protocol):
    """Tokenized rows: a list, a `datasets.Dataset`, a map-style dataset of torch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class DocumentMeasurements:
    """Measurements of N documents, in the order of the rows.

    Attributes:
        row: (N,) int64, the row of each document.
        values: name in `DOCUMENT_METRICS` -> (N,) float64, NaN for a document without this
            measurement, which has no block or no target token.

            - `cross_entropy`: teacher-forced, mean over the targets, at temperature 1.
            - `cfm_loss`: mean over the blocks (paper, eq. 2), unwhitened features.
            - `energy_score`, `excess_over_spread`: the same, see `hf_ebft.objective.scoring`.
            - `cosine_alignment`, `dot_diversity`: unwhitened, so that they can be compared
              between settings.
            - `alignment`, `diversity`: whitened if the settings say so; they then depend on
              `n_samples`.
            - `entropy`: of the rollouts, at the sampling temperature.
    """

    row: NDArray[np.int64]
    values: dict[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.row)


def evaluate_documents(
    model: nn.Module,
    feature_network: FeatureNetwork,
    rows: Rows,
    settings: EBFTSettings,
    *,
    data_collator: Collator | None = None,
    batch_size: int = 8,
    stride: int | None = None,
    n_samples: int | None = None,
    n_draws: int = 1,
    eos_token_id: int | None = None,
    seed: int = 0,
    corpus_whitening: CorpusWhitening | None = None,
) -> DocumentMeasurements:
    """Measure a policy on every document of `rows`.

    For a fair comparison, call this for each policy with the same feature network, rows, settings,
    `batch_size` and `seed`. The model, its mode and torch's global random state are not changed.

    Args:
        model: the policy, not wrapped by DDP; it may be a PEFT model.
        feature_network: phi, the same for all policies.
        rows: tokenized rows, as for training.
        settings: settings of blocks, sampling, features and whitening.
        data_collator: default: `EBFTDataCollator`.
        batch_size: number of rows measured at once.
        stride: tokens between block starts. Default: that of the settings.
        n_samples: rollouts per group. Default: that of the settings. With 1 the CFM loss is biased.
        n_draws: number of independent groups per block, averaged; more draws give less noise.
        eos_token_id: the token that ends documents if `document_masking` is True and rows mark no
            boundaries.
        seed: seed of the rollouts.
        corpus_whitening: the whitening of `whitening_space="corpus"`, such as
            `trainer.corpus_whitening()`; the same for all policies.

    Raises:
        ValueError: there are no rows, a number is below 1, or the corpus whitening is missing.
    """
    numbers = {"batch_size": batch_size, "n_draws": n_draws, "rows": len(rows)}
    numbers["stride"] = stride = settings.stride if stride is None else stride
    n_samples = settings.n_samples_per_prompt if n_samples is None else n_samples
    numbers["n_samples"] = n_samples
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1 to measure anything.")
    collate = data_collator or EBFTDataCollator()
    measurer = Measurer.for_model(
        model,
        settings,
        feature_network,
        corpus_whitening=corpus_whitening,
        eos_token_id=eos_token_id,
    )
    found_rows: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in DOCUMENT_METRICS}
    with evaluation_mode(model):
        for first in range(0, len(rows), batch_size):
            batch = collate([rows[i] for i in range(first, min(first + batch_size, len(rows)))])
            documents = measurer.read(batch)
            blocks = find_blocks_for(settings, documents, stride=stride)
            layout = PackedLayout(documents, blocks, n_samples, settings.generate_max_len)
            draws = [
                _measure(
                    measurer,
                    layout,
                    make_generator(measurer.device, seed, Stream.DOCUMENTS, draw, first),
                )
                for draw in range(n_draws)
            ]
            present = document_slots(documents)
            found_rows.append(present.nonzero()[:, 0].cpu() + first)
            for name, values in found.items():
                mean_over_draws = torch.stack([draw[name] for draw in draws]).mean(dim=0)
                values.append(mean_over_draws[present].cpu())
    return DocumentMeasurements(
        row=torch.cat(found_rows).numpy(),
        values={name: torch.cat(values).numpy() for name, values in found.items()},
    )


def _measure(
    measurer: Measurer, layout: PackedLayout, generator: torch.Generator
) -> dict[str, Tensor]:
    """One draw of rollouts: each measurement as (B, W), NaN for documents without it."""
    rollouts = measurer.sample(layout, generator)
    rewarded, plain = measurer.rewards(rollouts)
    log_probs = measurer.log_probs(rollouts, with_document=True)
    assert log_probs.document is not None
    documents, blocks = layout.documents, layout.blocks
    width = document_slots(documents).shape[1]
    per_block = unwhitened_metrics(plain) | {
        "alignment": rewarded.alignment.mean(dim=1),
        "diversity": rewarded.diversity.mean(dim=1),
        "entropy": -log_probs.rollout.mean(dim=(1, 3)),
    }
    measurements = {
        name: _mean_by_document(values, blocks.exists, blocks.document, width)
        for name, values in per_block.items()
    }
    measurements["cross_entropy"] = _mean_by_document(
        -log_probs.document, predicted_targets(documents), documents.document, width
    )
    return measurements


def unwhitened_metrics(plain: Rewards) -> dict[str, Tensor]:
    """Measurements (B, K) of rewards without whitening, by block."""
    return {
        "cfm_loss": plain.cfm_loss,
        "energy_score": plain.energy_score,
        "excess_over_spread": plain.excess_over_spread,
        "cosine_alignment": plain.alignment.mean(dim=1),
        "dot_diversity": plain.diversity.mean(dim=1),
    }


def document_slots(documents: Documents) -> Tensor:
    """(B, W) bool: whether each document slot of a row is used."""
    count = documents.document.amax(dim=1) + 1
    return torch.arange(int(count.max()), device=count.device) < count[:, None]


def _mean_by_document(values: Tensor, counted: Tensor, document: Tensor, width: int) -> Tensor:
    """Means over the values of each document.

    Args:
        values: (B, M).
        counted: (B, M) bool, whether each value counts.
        document: (B, M) int64, the document of each counted value, in [0, width).
        width: W.

    Returns:
        (B, W) float64, NaN for documents without a value.
    """
    sums, counts = sums_by_document(values, counted, document, width)
    return sums / counts


def sums_by_document(
    values: Tensor, counted: Tensor, document: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Sums and numbers of the values of each document, (B, W) float64; see _mean_by_document."""
    sums = torch.zeros(values.shape[0], width, dtype=torch.float64, device=values.device)
    counts = torch.zeros_like(sums)
    slot = document.clamp(min=0)
    sums.scatter_add_(1, slot, torch.where(counted, values.double(), 0.0))
    counts.scatter_add_(1, slot, counted.double())
    return sums, counts
