"""Feature matching as a reward function of TRL's trainers."""

from __future__ import annotations

from typing import Any


class FeatureMatchingReward:
    """Rewards completions for features like the ground truth's and unlike each other's.

    Under construction.
    """

    def __init__(self, model_or_feature_network: Any, processing_class: Any = None) -> None:
        raise NotImplementedError

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        """One number per completion."""
        raise NotImplementedError
