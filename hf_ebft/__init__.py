"""Energy-Based Fine-Tuning of language models on transformers, accelerate and PEFT."""

from hf_ebft.config import EBFTConfig
from hf_ebft.packed.sampling import Rollouts
from hf_ebft.trainer import EBFTTrainer
from hf_ebft.version import __version__

__all__ = ["EBFTConfig", "EBFTTrainer", "Rollouts", "__version__"]
