"""Headroom by length: what `measure_model` says, row by row, and lengths that text has room for."""

import copy
from pathlib import Path

import numpy as np
import pytest

from hf_ebft import EBFTTrainer
from hf_ebft.evaluation import measure_model
from hf_ebft.preflight.budget import Deadline
from hf_ebft.preflight.documents import choose_batches
from hf_ebft.preflight.headroom import CONTROL, METRICS, measure_headroom, rollout_lengths
from hf_ebft.preflight.stand_in import stand_in
from tests.support.tiny import config, texts, tiny_llama

ROWS = (40, 30, 44, 36, 8)


def make_trainer(folder: Path) -> EBFTTrainer:
    return EBFTTrainer(
        model=tiny_llama(),
        args=config(folder),
        train_dataset=texts(*ROWS),
        feature_network=tiny_llama(seed=1),
    )


def test_figures_are_those_of_the_evaluation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with stand_in(trainer) as own:
        found = measure_headroom(own, choose_batches(own, len(ROWS)), Deadline())
    lengths = [at.length for at in found.lengths]
    assert lengths == [3, 6, 12]
    assert found.rows == 4, "one is too short"
    assert found.control_temperature == pytest.approx(CONTROL * 0.8)
    settings = copy.copy(trainer.ebft)
    settings.stride = 12
    measured = {
        tempered: [
            measure_model(
                trainer.model,
                trainer.feature_network,
                [row],
                settings,
                lengths=lengths,
                seed=number,
                tempered=tempered,
            )
            for number, row in enumerate(texts(*ROWS)[:4])
        ]
        for tempered in (1.0, CONTROL)
    }
    for at in found.lengths:
        intervals = dict(zip(METRICS, (at.cfm_loss, at.excess, at.energy_score), strict=True))
        for name in METRICS:
            plain, sharp = (
                np.mean([one.rollouts[at.length][name][0] for one in measured[tempered]])
                for tempered in (1.0, CONTROL)
            )
            assert intervals[name].mean == pytest.approx(plain, abs=1e-6)
            assert at.sharpened[name].difference == pytest.approx(sharp - plain, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "lengths"),
    [((7,) * 4, [3]), ((16,) * 4, [3, 6]), ((16, 16, 7, 7), [3]), ((80,) * 4, [3, 6, 12, 24])],
)
def test_most_rows_have_room_for_all_lengths(
    tmp_path: Path, rows: tuple[int, ...], lengths: list[int]
) -> None:
    trainer = EBFTTrainer(model=tiny_llama(), args=config(tmp_path), train_dataset=texts(*rows))
    with stand_in(trainer) as own:
        assert rollout_lengths(own, choose_batches(own, len(rows))) == lengths
