"""Energy-Based Fine-Tuning of language models on transformers, accelerate and PEFT."""

import importlib
import importlib.util
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
    """One of the names above, from the module that it lives in, or a module: `hf_ebft.objective`.

    Raises:
        AttributeError: there is neither.
    """
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What there is, imported or not."""
    return sorted({*globals(), *__all__})
