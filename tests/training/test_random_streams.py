"""Which random numbers a place in a run gets: those of earlier releases, and each its own."""

from pathlib import Path

import torch

from hf_ebft.training.random_streams import RolloutStreams, Stream, corpus_rows
from tests.support.tiny import config

CPU = torch.device("cpu")
RECORDED = [
    0.10514410842464339,
    0.7440395251356675,
    0.6626034381888509,
    0.7776493866990125,
    0.8297204406509162,
]


def drawn(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def test_the_numbers_of_the_streams_are_fixed() -> None:
    """Another number would change the rollouts of every seeded run."""
    assert {stream.name: stream.value for stream in Stream} == {
        "TRAINING": 0,
        "EVALUATION": 1,
        "DOCUMENTS": 2,
        "CORPUS_ROWS": 3,
        "MODELS": 4,
        "COMPLETIONS": 5,
        "PREFLIGHT": 10,
        "SKETCH": 11,
    }


def test_the_random_numbers_of_a_micro_batch_are_fixed(tmp_path: Path) -> None:
    """Recorded when the trainer itself still numbered the streams: resumed runs rely on it."""
    streams = RolloutStreams(config(tmp_path, seed=3))
    places = [streams.next(CPU, step) for step in (0, 0, 1)]
    with streams.evaluation():
        places.append(streams.next(CPU, 1))
    places.append(corpus_rows(3))
    assert [drawn(place) for place in places] == RECORDED


def test_every_place_in_a_run_has_different_random_numbers(tmp_path: Path) -> None:
    streams = RolloutStreams(config(tmp_path, seed=3))
    generators = [streams.next(CPU, step) for step in (0, 0, 0, 1, 1, 2)]
    with streams.evaluation():
        generators += [streams.next(CPU, 2) for _ in range(4)]
    assert len({drawn(generator) for generator in generators}) == len(generators)


def test_a_restart_draws_the_same_again(tmp_path: Path) -> None:
    streams = RolloutStreams(config(tmp_path, seed=3))
    first = [drawn(streams.next(CPU, 5)) for _ in range(2)]
    streams.restart()
    assert [drawn(streams.next(CPU, 5)) for _ in range(2)] == first


def test_evaluations_draw_the_same_and_leave_training_alone(tmp_path: Path) -> None:
    streams, undisturbed = (RolloutStreams(config(tmp_path, seed=3)) for _ in range(2))
    evaluations = []
    for _ in range(2):
        assert drawn(streams.next(CPU, 0)) == drawn(undisturbed.next(CPU, 0))
        with streams.evaluation():
            assert streams.evaluating
            evaluations.append([drawn(streams.next(CPU, 0)) for _ in range(2)])
        assert not streams.evaluating
    assert evaluations[0] == evaluations[1]
