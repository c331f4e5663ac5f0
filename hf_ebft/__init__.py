"""Energy-Based Fine-Tuning of language models on transformers, accelerate and PEFT."""

import importlib
from typing import TYPE_CHECKING, Any

from hf_ebft.version import __version__

if TYPE_CHECKING:
    from hf_ebft.config import EBFTConfig
    from hf_ebft.packed.sampling import Rollouts
    from hf_ebft.trainer import EBFTTrainer

__all__ = ["EBFTConfig", "EBFTTrainer", "Rollouts", "__version__"]

# Imported when they are asked for: `hf-ebft --help` must not wait for torch.
_HOMES = {
    "EBFTConfig": "hf_ebft.config",
    "EBFTTrainer": "hf_ebft.trainer",
    "Rollouts": "hf_ebft.packed.sampling",
}


def __getattr__(name: str) -> Any:
    """One of the names above, from the module that it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """What there is, imported or not."""
    return sorted({*globals(), *__all__})
