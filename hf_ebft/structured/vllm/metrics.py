"""Metrics of the rollouts, logged under `vllm/`."""

from __future__ import annotations

COUNTED = ("vllm/retries", "vllm/restarts", "vllm/prefetch_missed")
"""Metrics that are summed; the others are means."""


class RolloutMetrics:
    """Values since the last log."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """Record one value."""
        self._values.setdefault(name, []).append(float(value))

    def take(self) -> dict[str, float]:
        """The sum or the mean of each metric's values since the last call."""
        found = {
            name: sum(values) / (1 if name in COUNTED else len(values))
            for name, values in self._values.items()
        }
        self._values.clear()
        return found
