"""Structured mode: prompts with ground-truth completions, on top of TRL's trainers."""

try:
    import trl as _trl  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "hf_ebft.structured builds on TRL, which is not installed: pip install 'hf_ebft[structured]'."
    ) from error

from hf_ebft.structured.config import EBFTGRPOConfig
from hf_ebft.structured.reward import FeatureMatchingReward
from hf_ebft.structured.trainer import EBFTGRPOTrainer

__all__ = ["EBFTGRPOConfig", "EBFTGRPOTrainer", "FeatureMatchingReward"]
