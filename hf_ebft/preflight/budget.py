"""Time limits for the parts of a preflight."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Clock = Callable[[], float]


@dataclass(frozen=True)
class Deadline:
    """A moment after which no new document is begun.

    Attributes:
        moment: time of the clock; infinite if there is no limit.
        clock: returns the time in seconds.
    """

    moment: float = math.inf
    clock: Clock = field(default=time.perf_counter, repr=False)

    @classmethod
    def after(cls, seconds: float | None, clock: Clock = time.perf_counter) -> Deadline:
        """A deadline this many seconds from now; None means no limit."""
        return cls(math.inf if seconds is None else clock() + seconds, clock)

    @property
    def passed(self) -> bool:
        """Whether the deadline has passed."""
        return self.clock() >= self.moment

    def part(self, share: float) -> Deadline:
        """A deadline at which this share of the remaining time has passed."""
        now = self.clock()
        return Deadline(now + share * max(0.0, self.moment - now), self.clock)
