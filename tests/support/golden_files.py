"""Reads the golden files: reference figures that are described in tests/golden/README.md."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

_FOLDER = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class GoldenFile:
    """One file: its tensors by name, and the configuration they were computed with."""

    name: str
    case: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`, by the rest of their names."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def golden_names(pattern: str) -> list[str]:
    """Names of the golden files that match a glob pattern, in order; never an empty list."""
    names = sorted(path.stem for path in _FOLDER.glob(f"{pattern}.safetensors"))
    if not names:
        raise FileNotFoundError(f"no golden file matches {pattern!r} in {_FOLDER}")
    return names


def load_golden(name: str) -> GoldenFile:
    """Read one golden file, `name` without folder and suffix."""
    with safe_open(_FOLDER / f"{name}.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    return GoldenFile(name, json.loads(metadata["case"]), tensors)
