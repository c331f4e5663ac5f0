"""`EBFTGRPOTrainer`: TRL's `GRPOTrainer` with feature matching as its reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from trl import GRPOTrainer

from hf_ebft.structured.config import EBFTGRPOConfig

if TYPE_CHECKING:
    from peft import PeftConfig


class EBFTGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` that fine-tunes by feature matching. Under construction.

    ``completion_budget`` is the number of tokens that a completion of the current batch may have: a
    ``rollout_func(prompts, trainer)`` reads it instead of ``max_completion_length``.
    """

    completion_budget: int

    def __init__(
        self,
        model: nn.Module | str,
        args: EBFTGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        feature_network: nn.Module | None = None,
        peft_config: PeftConfig | None = None,
        reward_funcs: Any = None,
        rollout_func: Callable[..., dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        raise NotImplementedError
