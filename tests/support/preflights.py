"""Results of a preflight made by hand."""

import dataclasses
from typing import Any

from hf_ebft.evaluation.bootstrap import Interval, PairedDifference
from hf_ebft.objective.noise_scale import Estimate, NoiseScale
from hf_ebft.preflight.cost import Cost
from hf_ebft.preflight.headroom import AtLength, Headroom
from hf_ebft.preflight.ladder import RUNGS, Order, RewardCheck
from hf_ebft.preflight.result import Preflight, Settings
from hf_ebft.preflight.signal import Signal


def scale(documents: float, low: float | None = None, high: float | None = None) -> NoiseScale:
    low = documents / 2 if low is None else low
    high = 2 * documents if high is None else high
    return NoiseScale(1.0, documents, documents, low, high, 64)


def interval(mean: float, margin: float = 0.01) -> Interval:
    return Interval(mean, mean - margin, mean + margin, 64, 64)


def change(before: float, difference: float, margin: float = 0.001) -> PairedDifference:
    low, high = difference - margin, difference + margin
    return PairedDifference(before, before + difference, difference, low, high, 64, 64)


def at_length(length: int, excess: float = 0.2, sharpened: float = 0.0) -> AtLength:
    changes = {
        "cfm_loss": change(0.7, sharpened),
        "excess_over_spread": change(excess, 0.1),
        "energy_score": change(0.6, 0.01),
    }
    return AtLength(length, interval(0.7), interval(excess), interval(0.6), changes)


def healthy() -> Preflight:
    """Nothing to say but that it is fine: 64 documents a step where 20 are enough."""
    orders = [
        Order(better, worse, interval(0.9))
        for place, better in enumerate(RUNGS)
        for worse in RUNGS[place + 1 :]
    ]
    return Preflight(
        Settings(16, 4, 4, 1.0, 8, 0.1, False, 10_000),
        Signal(64, scale(20.0), scale(15.0), Estimate(0.5, 0.2, 0.8), 10**6, 10**6),
        Headroom(64, 1.0, 0.7, [at_length(8), at_length(16)]),
        RewardCheck(
            64,
            900,
            {name: interval(0.5) for name in RUNGS},
            {name: interval(0.5) for name in RUNGS},
            orders,
            0.1,
            0.1,
            0.0,
        ),
        Cost(2.0, {}, 2**30, "resident set", 8 * 2**30, 64, 1000, 1),
        "cpu",
        {"signal": 10.0},
    )


def with_changes(part: str, **changes: Any) -> Preflight:
    found = healthy()
    return dataclasses.replace(
        found, **{part: dataclasses.replace(getattr(found, part), **changes)}
    )
