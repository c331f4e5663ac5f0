"""Structured mode: prompts with ground-truth completions, on top of TRL's trainers."""

try:
    import trl as _trl  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "hf_ebft.structured builds on TRL, which is not installed: pip install "
        "'hf_ebft[structured]'."
    ) from error

from hf_ebft.structured.config import EBFTGRPOConfig
from hf_ebft.structured.multi_turn import MultiTurnRollouts
from hf_ebft.structured.reward import FeatureMatchingReward
from hf_ebft.structured.sequence_features import SequenceFeatureNetwork
from hf_ebft.structured.trainer import EBFTGRPOTrainer
from hf_ebft.structured.vllm.rollouts import VLLMRollouts

__all__ = [
    "EBFTGRPOConfig",
    "EBFTGRPOTrainer",
    "FeatureMatchingReward",
    "MultiTurnRollouts",
    "SequenceFeatureNetwork",
    "VLLMRollouts",
]
