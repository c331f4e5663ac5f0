"""Measures how much of the CFM loss training can remove, for several lengths of rollouts.

Even a policy whose rollouts have the distribution of the text has a CFM loss, since both vary. Its
excess over the policy's own spread (`hf_ebft.objective.scoring`) is zero. A control is measured,
too: the same untrained policy at a lower temperature. A fall of the CFM loss that sharpening alone
achieves is no evidence of learning.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_ebft.evaluation.bootstrap import (
    Interval,
    PairedDifference,
    mean_bootstrap,
    paired_bootstrap,
)
from hf_ebft.evaluation.models import ModelMeasurements, measure_model
from hf_ebft.packed.model_parts import end_of_text_id
from hf_ebft.preflight.budget import Deadline
from hf_ebft.preflight.documents import FEWEST_ROWS, Batch
from hf_ebft.rows.anchors import find_blocks_for
from hf_ebft.trainer import EBFTTrainer

# Temperature of the control, relative to the sampling temperature.
CONTROL = 0.7
METRICS = ("cfm_loss", "excess_over_spread", "energy_score")


@dataclass(frozen=True)
class AtLength:
    """Scores at one length of the rollouts: means over rows, with intervals.

    Attributes:
        length: tokens of a rollout.
        cfm_loss: ||E x - y||^2, with x the feature of a rollout and y the feature of the text.
        excess: CFM loss minus the policy's own spread.
        energy_score: E||x - y|| - 1/2 E||x - x'||.
        sharpened: differences of the control's CFM loss, excess and energy score.
    """

    length: int
    cfm_loss: Interval
    excess: Interval
    energy_score: Interval
    sharpened: dict[str, PairedDifference]

    @property
    def share(self) -> float:
        """Excess as a share of the CFM loss."""
        return self.excess.mean / self.cfm_loss.mean if self.cfm_loss.mean > 0 else 0.0


@dataclass(frozen=True)
class Headroom:
    """Scores at all lengths.

    Attributes:
        rows: number of measured rows.
        temperature, control_temperature: sampling temperatures of the policy and of the control.
        lengths: scores at each length, the shortest first.
    """

    rows: int
    temperature: float
    control_temperature: float
    lengths: list[AtLength]


def measure_headroom(
    trainer: EBFTTrainer, batches: Sequence[Batch], deadline: Deadline
) -> Headroom:
    """Measure policy and control on as many rows as there is time for, at least `FEWEST_ROWS`.

    Args:
        trainer: a stand-in.
        batches: batches of one row each.
        deadline: no further row is begun after it.
    """
    lengths = rollout_lengths(trainer, batches)
    settings: Any = copy.copy(trainer.ebft)
    settings.stride = max(settings.stride, lengths[-1])
    settings.n_samples_per_prompt = max(2, settings.n_samples_per_prompt)
    plain: list[ModelMeasurements] = []
    sharp: list[ModelMeasurements] = []
    for row, batch in enumerate(batches):
        if len(plain) >= FEWEST_ROWS and deadline.passed:
            break
        if not _has_room(trainer, batch, lengths[-1]):
            continue
        with trainer.accelerator.autocast():
            for measured, tempered in ((plain, 1.0), (sharp, CONTROL)):
                measured.append(_measure(trainer, batch, settings, lengths, row, tempered))
    return Headroom(
        rows=len(plain),
        temperature=settings.temperature,
        control_temperature=CONTROL * settings.temperature,
        lengths=[_scores_at(length, plain, sharp) for length in lengths],
    )


def rollout_lengths(trainer: EBFTTrainer, batches: Sequence[Batch]) -> list[int]:
    """The length of training, and up to three doublings of it for which most rows have room."""
    room = sorted(_longest(trainer, batch) - trainer.ebft.context_length for batch in batches)
    enough = room[len(room) // 4]  # three quarters of the rows have this much room
    lengths = [trainer.ebft.generate_max_len]
    while len(lengths) < 4 and 4 * lengths[-1] <= enough:
        lengths.append(2 * lengths[-1])
    return lengths


def _longest(trainer: EBFTTrainer, batch: Batch) -> int:
    return int(trainer.document_reader.read(batch).length.max())


def _has_room(trainer: EBFTTrainer, batch: Batch, length: int) -> bool:
    documents = trainer.document_reader.read(batch)
    blocks = find_blocks_for(trainer.ebft, documents, generate_max_len=length)
    return bool(blocks.exists.any())


def _measure(
    trainer: EBFTTrainer,
    batch: Batch,
    settings: Any,
    lengths: Sequence[int],
    seed: int,
    tempered: float,
) -> ModelMeasurements:
    return measure_model(
        trainer.model,
        trainer.feature_network,
        [batch],
        settings,
        lengths=lengths,
        seed=seed,
        tempered=tempered,
        data_collator=lambda rows: rows[0],
        corpus_whitening=trainer.corpus_whitening(),
        eos_token_id=end_of_text_id(trainer.model, trainer.processing_class),
    )


def _scores_at(
    length: int, plain: Sequence[ModelMeasurements], sharp: Sequence[ModelMeasurements]
) -> AtLength:
    def row_means(measured: Sequence[ModelMeasurements], name: str) -> NDArray[np.float64]:
        """(rows,) means over the documents of each row."""
        return np.array([np.nanmean(one.rollouts[length][name]) for one in measured])

    values = {name: row_means(plain, name) for name in METRICS}
    cfm_loss, excess, energy_score = (mean_bootstrap(values[name]) for name in METRICS)
    sharpened = {name: paired_bootstrap(values[name], row_means(sharp, name)) for name in METRICS}
    return AtLength(length, cfm_loss, excess, energy_score, sharpened)
