"""Measures several models on the same text: cross-entropy, and rollouts of several lengths.

Every model continues the same prefixes of the same documents, with the same seeds, and one frozen
feature network embeds all rollouts. A model's rollouts are sampled once, at the greatest length;
shorter ones are their beginnings. So a curve over lengths follows the same rollouts.

Dimension letters: B rows of a batch, S tokens of a row, K blocks, n samples, G rollout length,
W most documents in a row, N documents in all, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_ebft.config import EBFTSettings
from hf_ebft.data.collator import EBFTDataCollator
from hf_ebft.evaluation.documents import (
    Collator,
    Rows,
    document_slots,
    sums_by_document,
    unwhitened_metrics,
)
from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.objective.rewards import Rewards
from hf_ebft.objective.whitening import CorpusWhitening
from hf_ebft.packed.forward import evaluation_mode
from hf_ebft.packed.heads import ToLogits
from hf_ebft.packed.sampling import make_generator
from hf_ebft.packed.targets import target_log_probs
from hf_ebft.rows.anchors import Blocks, find_blocks_for
from hf_ebft.rows.documents import Documents, predicted_targets
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training.measuring import Measurer
from hf_ebft.training.metric_table import (
    ROLLOUT_METRICS,
    SECOND_NETWORK,
    SECOND_NETWORK_METRICS,
    TEXT_METRICS,
)
from hf_ebft.training.random_streams import Stream

LENGTHS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class ModelMeasurements:
    """Measurements of one model on N documents, in the order of the rows.

    Attributes:
        row: (N,) int64, the row of each document.
        document: (N,) a digest of each document's tokens: equal for equal documents.
        blocks: (N,) int64, number of continued prefixes in each document; 0 without room.
        text: name in `TEXT_METRICS` -> (N,) float64, NaN for a document without it.
        tokens: the same names -> (N,) float64, number of tokens that each is a mean over.
        rollouts: length -> name in `ROLLOUT_METRICS` (and in `SECOND_NETWORK_METRICS`, if there was
            a second feature network) -> (N,) float64, NaN without blocks.
    """

    row: NDArray[np.int64]
    document: NDArray[np.str_]
    blocks: NDArray[np.int64]
    text: dict[str, NDArray[np.float64]]
    tokens: dict[str, NDArray[np.float64]]
    rollouts: dict[int, dict[str, NDArray[np.float64]]]

    def __len__(self) -> int:
        return len(self.row)


def measure_model(
    model: nn.Module,
    feature_network: FeatureNetwork,
    rows: Rows,
    settings: EBFTSettings,
    *,
    lengths: Sequence[int] = LENGTHS,
    n_draws: int = 1,
    seed: int = 0,
    tokens_at_once: int = 4096,
    data_collator: Collator | None = None,
    corpus_whitening: CorpusWhitening | None = None,
    eos_token_id: int | None = None,
    second_network: FeatureNetwork | None = None,
    tempered: float = 1.0,
) -> ModelMeasurements:
    """Measure one model; call it once for each, with the same other arguments.

    Two controls distinguish learning from effects that look like it: `tempered` measures the
    effect of sharpening alone, and `second_network` measures features that gave no reward.

    Only prefixes with room for the greatest length are used, so that all lengths continue the same
    prefixes. Documents without such a prefix have no measurements of rollouts (`blocks` is 0).

    Args:
        model: a causal language model, unwrapped; it may be a PEFT model. Its mode is not changed.
        feature_network: phi, the same for all models.
        rows: tokenized rows, as for training.
        settings: `stride`, `context_length`, `n_samples_per_prompt`, `temperature`,
            features, whitening and coefficients; `generate_max_len` is not used.
        lengths: lengths of rollouts, ascending.
        n_draws: number of independent groups per prefix, averaged.
        seed: seed of the rollouts.
        tokens_at_once: bounds the memory: number of rollout tokens (of a few prefixes), or of
            tokens of text, in one forward pass. At least one prefix, or one row, is processed.
        data_collator: default: `EBFTDataCollator`.
        corpus_whitening: the whitening of `whitening_space="corpus"`.
        eos_token_id: the token that ends documents if `document_masking` is True and rows mark no
            boundaries.
        second_network: also embeds the rollouts, for measurements named `second_...`: another
            model, or other layers of the same one (`FeatureNetwork(phi.model, ...)`).
        tempered: measure the model with all logits divided by this; below 1 it is sharper. Text is
            measured at this temperature; rollouts are sampled at this times the settings'
            temperature.

    Raises:
        ValueError: there are no rows, lengths do not ascend, a number is below 1, `tempered` is not
            above 0, or no document has room for the greatest length.
    """
    _check(rows, lengths, n_draws, tokens_at_once)
    if not tempered > 0:
        raise ValueError(
            f"tempered={tempered} must be above 0: logits are divided by it (0.8 sharpens, 1 "
            "does not change the model)."
        )
    # Not with `replace`: a new EBFTConfig would reset the state of an existing accelerator.
    settings = copy(settings)
    settings.temperature *= tempered
    collate = data_collator or EBFTDataCollator()
    measurer = Measurer.for_model(
        model,
        settings,
        feature_network,
        corpus_whitening=corpus_whitening,
        eos_token_id=eos_token_id,
    )
    by_row = _RowMeasurer(measurer, lengths, n_draws, tokens_at_once, second_network, tempered)
    parts: list[_Part] = []
    with evaluation_mode(model):
        for row in range(len(rows)):
            # One row at a time, so that a row's random numbers do not depend on other rows.
            parts.append(by_row.measure(measurer.read(collate([rows[row]])), row, seed))
    whole = _join(parts, lengths)
    if not whole.blocks.any():
        raise ValueError(
            f"None of the {len(whole)} documents has room for a prefix of {settings.context_length}"
            f" and a rollout of {max(lengths)} tokens, so nothing could be compared over lengths: "
            "take longer rows, or leave out the greatest lengths."
        )
    return whole


@dataclass(frozen=True)
class _Part:
    """`ModelMeasurements` of one row, measurements as (W,) tensors."""

    row: int
    document: list[str]
    blocks: Tensor
    text: dict[str, Tensor]
    tokens: dict[str, Tensor]
    rollouts: dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class _RowMeasurer:
    """Measures one row after the other, with the arguments of `measure_model`."""

    measurer: Measurer
    lengths: Sequence[int]
    n_draws: int
    tokens_at_once: int
    second_network: FeatureNetwork | None
    tempered: float

    @property
    def settings(self) -> EBFTSettings:
        return self.measurer.settings

    @property
    def rollout_metrics(self) -> list[str]:
        """Names of the measurements of rollouts."""
        second = () if self.second_network is None else SECOND_NETWORK_METRICS
        return [*ROLLOUT_METRICS, *second]

    def measure(self, documents: Documents, row: int, seed: int) -> _Part:
        """All measurements of the documents of one row."""
        settings, longest = self.settings, max(self.lengths)
        width = document_slots(documents).shape[1]
        text, tokens = self._text_metrics(documents, width)
        blocks = find_blocks_for(settings, documents, generate_max_len=longest)
        empty = torch.zeros(1, width, dtype=torch.float64, device=documents.input_ids.device)
        sums = {g: dict.fromkeys(self.rollout_metrics, empty) for g in self.lengths}
        count = empty
        for draw in range(self.n_draws):
            for part, some in enumerate(self._portions(blocks)):
                if not some.exists.any():
                    continue
                generator = make_generator(some.column.device, seed, Stream.MODELS, draw, row, part)
                for g, measurements in self._rollout_metrics(documents, some, generator).items():
                    for name, values in measurements.items():
                        total, n = sums_by_document(values, some.exists, some.document, width)
                        sums[g][name] = sums[g][name] + total
                count = count + n
        return _Part(
            row=row,
            document=_digests(documents, width),
            blocks=(count[0] / self.n_draws).round(),
            text=text,
            tokens=tokens,
            rollouts={
                g: {name: (total / count)[0] for name, total in measurements.items()}
                for g, measurements in sums.items()
            },
        )

    def _portions(self, blocks: Blocks) -> Iterator[Blocks]:
        """The blocks, in portions that fit into memory."""
        tokens = self.settings.n_samples_per_prompt * max(self.lengths)
        size = max(1, self.tokens_at_once // tokens)
        for first in range(0, blocks.exists.shape[1], size):
            yield blocks[first : first + size]

    def _rollout_metrics(
        self, documents: Documents, blocks: Blocks, generator: torch.Generator
    ) -> dict[int, dict[str, Tensor]]:
        """Length -> measurement -> (1, K)."""
        settings = self.settings
        n_samples, longest = settings.n_samples_per_prompt, max(self.lengths)
        layout = PackedLayout(documents, blocks, n_samples, longest)
        sampled = self.measurer.sample(layout, generator)
        scored = self.measurer.log_probs(sampled, with_document=False)
        surprise = -scored.rollout.double().cumsum(dim=-1)
        rewards = self.measurer.rewards_of_beginnings(sampled, self.lengths)
        found = {g: _reward_metrics(*rewards[g]) for g in self.lengths}
        for g in self.lengths:
            found[g]["entropy"] = surprise[..., g - 1].mean(dim=1) / g
            found[g]["duplicates"] = _duplicates(sampled.tokens[..., :g])
        if self.second_network is not None:
            second = replace(self.measurer, feature_network=self.second_network)
            for g, (_, plain) in second.rewards_of_beginnings(sampled, self.lengths).items():
                found[g] |= {
                    SECOND_NETWORK + name: values
                    for name, values in unwhitened_metrics(plain).items()
                }
        return found

    def _text_metrics(
        self, documents: Documents, width: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Mean -log p of the tokens of each document, and the number of these tokens."""
        input_ids = documents.input_ids
        # The last token has no target.
        places = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)

        def log_probs(states: Tensor, to_logits: ToLogits) -> list[Tensor]:
            found = target_log_probs(
                states.flatten(0, 1),
                torch.arange(states.shape[:2].numel(), device=states.device),
                input_ids[:, 1:].reshape(-1, 1),
                to_logits,
                temperature=self.tempered,
                chunk_size=self.tokens_at_once,
            )
            return [found.view(states.shape[:2])]

        part = PackedLayout.without_rollouts(documents).document_part
        (scored,) = self.measurer.forward.through_head(
            self.measurer.model, input_ids, part, places, log_probs
        )
        surprise = nn.functional.pad(-scored, (1, 0))
        predicted = (documents.document >= 0) & (documents.position > 0)
        # A completion follows a prompt; if no prompt is masked, there is no completion.
        completion = predicted_targets(documents) & (documents.completion_start > 0)
        measurements, tokens = {}, {}
        for name, counted in zip(TEXT_METRICS, (predicted, completion), strict=True):
            sums, counts = sums_by_document(surprise, counted, documents.document, width)
            measurements[name], tokens[name] = (sums / counts)[0], counts[0]
        return measurements, tokens


def _reward_metrics(rewarded: Rewards, plain: Rewards) -> dict[str, Tensor]:
    """Measurements (B, K) of rewards as trained and without whitening."""
    return unwhitened_metrics(plain) | {
        "cosine_alignment_best": plain.alignment.amax(dim=1),
        "reward": rewarded.reward.mean(dim=1),
        "reward_best": rewarded.reward.amax(dim=1),
        "alignment": rewarded.alignment.mean(dim=1),
        "diversity": rewarded.diversity.mean(dim=1),
    }


def _duplicates(tokens: Tensor) -> Tensor:
    """(B, n, K, G) -> (B, K): share of a group's rollouts that repeat an earlier one."""
    same = (tokens[:, :, None] == tokens[:, None, :]).all(dim=-1)  # (B, n, n, K)
    earlier = torch.ones(same.shape[1:3], dtype=torch.bool, device=same.device).tril(-1)
    return (same & earlier[None, :, :, None]).any(dim=2).double().mean(dim=1)


def _digests(documents: Documents, width: int) -> list[str]:
    """A digest of the tokens of each document of a row."""
    ids, document = documents.input_ids[0].cpu().numpy(), documents.document[0].cpu().numpy()
    return [
        hashlib.sha256(ids[document == slot].astype("<i8").tobytes()).hexdigest()[:16]
        for slot in range(width)
    ]


def _join(parts: list[_Part], lengths: Sequence[int]) -> ModelMeasurements:
    def joined(tensors: list[Tensor]) -> NDArray[np.float64]:
        return torch.cat(tensors).double().cpu().numpy()

    return ModelMeasurements(
        row=np.concatenate([np.full(len(part.document), part.row) for part in parts]),
        document=np.array([digest for part in parts for digest in part.document]),
        blocks=joined([part.blocks for part in parts]).astype(np.int64),
        text={name: joined([part.text[name] for part in parts]) for name in TEXT_METRICS},
        tokens={name: joined([part.tokens[name] for part in parts]) for name in TEXT_METRICS},
        rollouts={
            g: {
                name: joined([part.rollouts[g][name] for part in parts])
                for name in parts[0].rollouts[g]
            }
            for g in lengths
        },
    )


def _check(rows: Rows, lengths: Sequence[int], n_draws: int, tokens_at_once: int) -> None:
    numbers = {"n_draws": n_draws, "tokens_at_once": tokens_at_once, "rows": len(rows)}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1 to measure anything.")
    ascending = list(lengths) == sorted(set(lengths))
    if not lengths or not ascending or min(lengths) < 1:
        raise ValueError(
            f"lengths={list(lengths)} must be whole numbers of tokens in ascending order, such as "
            "8 16 32."
        )


def same_documents(measured: Mapping[str, ModelMeasurements]) -> None:
    """Raise for models that were measured on different documents or lengths.

    Raises:
        ValueError: naming the models.
    """
    first_name, first = next(iter(measured.items()))
    for name, other in measured.items():
        same = (other.document.tolist(), other.row.tolist()) == (
            first.document.tolist(),
            first.row.tolist(),
        )
        if not same or other.rollouts.keys() != first.rollouts.keys():
            raise ValueError(
                f"{name!r} and {first_name!r} were measured on different documents or lengths, so "
                "their differences mean nothing: pass the same rows and lengths to measure_model."
            )
        if any(other.rollouts[g].keys() != by_name.keys() for g, by_name in first.rollouts.items()):
            raise ValueError(
                f"Only one of {name!r} and {first_name!r} was measured with a second feature "
                "network: pass the same second_network to measure_model for both, or none."
            )
