"""Whitening by corpus: the second moment of frozen features over training text, measured once.

It is measured on the features of the ground-truth windows of all blocks of a sample of training
rows, since rewards compare rollouts with these. It depends only on the frozen network, the rows and
the seed. So it is not saved in checkpoints: a resumed run measures the same again.

Dimension letters: B rows of the batch, K blocks, D feature width, N features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sized
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor

from hf_ebft.config import EBFTSettings
from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.objective.whitening import CorpusWhitening
from hf_ebft.packed.sampling import Rollouts
from hf_ebft.rows.anchors import find_blocks_for
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout

logger = logging.getLogger(__name__)


def choose_rows(dataset: Any, count: int, generator: torch.Generator) -> list[Any]:
    """Rows of a training dataset to measure on, the same on every process.

    Args:
        dataset: the training rows. A dataset with a length is sampled without replacement; of a
            stream, the first rows are taken.
        count: number of rows to choose; all rows if there are fewer.
        generator: random numbers of the choice, on the CPU; the same on every process.
    """
    if not isinstance(dataset, Sized):
        return list(islice(dataset, count))
    chosen = torch.randperm(len(dataset), generator=generator)[:count].sort().values
    source: Any = dataset
    return [source[i] for i in chosen.tolist()]


def measure_corpus_whitening(
    feature_network: FeatureNetwork,
    batches: Iterable[Documents],
    settings: EBFTSettings,
    *,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda total: total,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> CorpusWhitening:
    """Measure the second moment of ground-truth features, and make a whitening from it.

    All processes of a run must call this together, with equally many batches. The state of torch's
    global generator, which iterating a DataLoader draws from, is restored.

    Args:
        feature_network: phi.
        batches: batches of training rows, those of this process.
        settings: the settings of blocks, and the shrinkage.
        sum_over_processes: sums a tensor over processes.
        autocast: the context in which rewards run the feature network.

    Returns:
        The same `CorpusWhitening` on every process.

    Raises:
        ValueError: none of the documents has a block.
    """
    total: Tensor | None = None
    count = torch.zeros(())
    with torch.random.fork_rng(devices=[]):
        for documents in batches:
            with torch.no_grad(), autocast():
                features_ND = _ground_truth_features(feature_network, documents, settings)
            # MPS has no float64.
            wide = features_ND.cpu() if features_ND.device.type == "mps" else features_ND
            moment = wide.double().T @ wide.double()
            total = moment if total is None else total + moment
            count = count + len(features_ND)
    if total is None:
        raise ValueError(
            "whitening_space='corpus' found no batch of training rows to measure on: with "
            "dataloader_drop_last=True, corpus_whitening_documents="
            f"{settings.corpus_whitening_documents} must fill a batch on every process. Raise it, "
            "or set dataloader_drop_last=False"
        )
    total = sum_over_processes(total)
    n_features = int(sum_over_processes(count.to(total.device)))
    if n_features == 0:
        raise ValueError(
            "whitening_space='corpus' found no block in the sampled training rows: a document "
            f"needs context_length + generate_max_len = "
            f"{settings.context_length + settings.generate_max_len} unmasked tokens. If most "
            "documents are shorter, raise corpus_whitening_documents, or whiten by group with "
            "whitening_space='feature'"
        )
    whitening = CorpusWhitening.from_second_moment(
        total / n_features, settings.corpus_whitening_shrinkage
    )
    if PartialState().is_main_process:
        logger.info(
            "Whitening by corpus: second moment of %d features in %d dimensions, effective rank "
            "%.1f, shrinkage %g.",
            n_features,
            len(total),
            whitening.effective_rank,
            whitening.shrinkage,
        )
    return _from_main_process(whitening)


def _from_main_process(whitening: CorpusWhitening) -> CorpusWhitening:
    """Broadcast the main process's whitening to all processes.

    Every process has decomposed the same matrix, but perhaps on another kind of device, with other
    rounding. The copies must agree to the bit: rewards must not depend on the process that a
    document went to.
    """
    matrix: Tensor = broadcast(whitening.matrix.contiguous())
    return CorpusWhitening(matrix, whitening.shrinkage, whitening.effective_rank)


def _ground_truth_features(
    feature_network: FeatureNetwork, documents: Documents, settings: EBFTSettings
) -> Tensor:
    """(N, D) features of the windows of all blocks of a batch."""
    blocks = find_blocks_for(settings, documents)
    layout = PackedLayout(documents, blocks, n_samples=1, length=settings.generate_max_len)
    # Document tokens do not attend to rollouts, so the rollouts may be any tokens.
    tokens = torch.zeros(layout.rollout_shape, dtype=torch.long, device=blocks.exists.device)
    rollouts = Rollouts(tokens=tokens, exists=blocks.exists, layout=layout)
    return feature_network.embed(rollouts).ground_truth[blocks.exists]
