"""Seconds by phase, with a clock that the tests move."""

import pytest
import torch

from hf_ebft.training.stopwatch import Stopwatch


class Clock:
    """Stands for the wall clock."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("hf_ebft.training.stopwatch.time.perf_counter", clock)
    return clock


def test_an_inner_phase_does_not_count_for_the_outer_one(clock: Clock) -> None:
    """A step of 10 s, of which 3 s and 1 s of sampling, 1 s of these with features inside."""
    stopwatch = Stopwatch(torch.device("cpu"))
    with stopwatch.phase("training"):
        clock.now += 2
        with stopwatch.phase("rollout"):
            clock.now += 2
            with stopwatch.phase("features"):
                clock.now += 1
        clock.now += 4
        with stopwatch.phase("rollout"):
            clock.now += 1
    assert stopwatch.take() == {"training": 6.0, "rollout": 3.0, "features": 1.0}
    assert stopwatch.take() == {}


def test_a_phase_that_fails_still_ends(clock: Clock) -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    with pytest.raises(KeyError), stopwatch.phase("training"), stopwatch.phase("rollout"):
        clock.now += 2
        raise KeyError
    with stopwatch.phase("training"):
        clock.now += 1
    assert stopwatch.take() == {"training": 1.0, "rollout": 2.0}
