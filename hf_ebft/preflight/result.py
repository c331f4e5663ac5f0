"""The result of a preflight, and its JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ebft.preflight.cost import Cost
from hf_ebft.preflight.headroom import Headroom
from hf_ebft.preflight.ladder import RewardCheck
from hf_ebft.preflight.signal import Signal
from hf_ebft.report.health import Finding
from hf_ebft.version import __version__


@dataclass(frozen=True)
class Settings:
    """The settings of the run that the verdict uses.

    Attributes:
        per_device_train_batch_size, gradient_accumulation_steps, n_samples_per_prompt, temperature,
        generate_max_len, ce_coef: as configured.
        packed: whether a row may contain several documents; noise scales then count rows.
        one_epoch: number of rows of the training data; None if it is unknown.
    """

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    n_samples_per_prompt: int
    temperature: float
    generate_max_len: int
    ce_coef: float
    packed: bool
    one_epoch: int | None

    @property
    def unit(self) -> str:
        """The unit of noise scales."""
        return "rows" if self.packed else "documents"


@dataclass(frozen=True)
class Preflight:
    """The result of a preflight.

    Attributes:
        settings: the settings of the run.
        signal, headroom, rewards, cost: the measurements.
        machine: device and number of threads.
        seconds: duration of each part of the preflight.
        findings: the verdict, the most serious first.
    """

    settings: Settings
    signal: Signal
    headroom: Headroom
    rewards: RewardCheck
    cost: Cost
    machine: str
    seconds: dict[str, float]
    findings: list[Finding] = dataclasses.field(default_factory=list)

    @property
    def nothing_against(self) -> str | None:
        """The verdict in one sentence if nothing serious was found, else None."""
        severities = {finding.severity for finding in self.findings}
        if "serious" in severities:
            return None
        if "warning" in severities:
            return "Nothing forbids the run; see the warnings first."
        return "Nothing speaks against the run."

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values; infinity and NaN, which JSON lacks, become null."""
        plain = dataclasses.asdict(self) | {"version": __version__}
        plain["cost"] |= {"hours": self.cost.hours, "rows": self.cost.rows}
        finite: dict[str, Any] = _finite(plain)
        return finite

    def write_json(self, path: str | Path) -> None:
        """Write the result to a JSON file."""
        text = json.dumps(self.as_dict(), indent=2, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
