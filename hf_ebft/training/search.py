"""Hyperparameter search: what is minimised, and settings of EBFT as parameters of a trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import BestRun, HPSearchBackend

from hf_ebft.config import EBFTSettings

# Read while the trainer is built, which is before the first trial.
_FIXED = ("ema_decay", "log_pictures_steps", "gather_params_for_sampling", "verify_packing")


class SearchMixin(Trainer):
    """The part of `EBFTTrainer` that searches hyperparameters."""

    model: nn.Module
    ebft: EBFTSettings

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: str | HPSearchBackend | None = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """`Trainer`'s, which minimises `eval_loss` unless `compute_objective` says otherwise.

        transformers' own default adds up all metrics but `eval_loss` where there are any, here
        `eval_ebft/alignment`, the number of blocks, and so on.

        Raises:
            ValueError: a direction other than "minimize" without a `compute_objective`.
        """
        if compute_objective is None:
            if direction != "minimize":
                raise ValueError(
                    f"direction={direction!r} without compute_objective would make eval_loss, the "
                    "default objective, as large as possible. Pass compute_objective=lambda "
                    'metrics: metrics["eval_ebft/alignment"], or whatever is to grow.'
                )
            compute_objective = evaluation_loss
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction, backend, hp_name, **kwargs
        )

    def _hp_search_setup(self, trial: Any) -> None:
        # Private in transformers, and the only place between the setting of a trial's parameters
        # and its training. The networks were built before, from the last trial's settings.
        before = _values(self.ebft)
        super()._hp_search_setup(trial)
        changed = {name for name, value in _values(self.ebft).items() if value != before[name]}
        if not changed:
            return
        fixed = sorted(changed.intersection(_FIXED))
        if fixed:
            raise ValueError(
                f"A trial sets {', '.join(fixed)}, which is read only when the trainer is built. "
                "Leave it out of hp_space, or build one trainer for each value."
            )
        self.ebft.validate()
        self._prepare_networks(self.model)

    def _prepare_networks(self, policy: nn.Module) -> None:
        raise NotImplementedError


def evaluation_loss(metrics: dict[str, float]) -> float:
    """`eval_loss`, the objective of a search unless another is given.

    Raises:
        ValueError: there is none, since there are several evaluation sets.
    """
    if "eval_loss" not in metrics:
        losses = sorted(name for name in metrics if name.endswith("_loss"))
        raise ValueError(
            f"There is no eval_loss to minimise, only {losses}. Pass compute_objective=lambda "
            "metrics: ..., which makes one number of them."
        )
    return metrics["eval_loss"]


def _values(settings: EBFTSettings) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(EBFTSettings)}
