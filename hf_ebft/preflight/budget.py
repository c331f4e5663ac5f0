"""How long the parts of a preflight may take."""

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
        moment: of the clock; infinite where there is no limit.
        clock: in seconds.
    """

    moment: float = math.inf
    clock: Clock = field(default=time.perf_counter, repr=False)

    @classmethod
    def after(cls, seconds: float | None, clock: Clock = time.perf_counter) -> Deadline:
        """So many seconds from now; None: never."""
        return cls(math.inf if seconds is None else clock() + seconds, clock)

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return self.clock() >= self.moment

    def part(self, share: float) -> Deadline:
        """The moment at which this share of what is left is used up."""
        now = self.clock()
        return Deadline(now + share * max(0.0, self.moment - now), self.clock)
