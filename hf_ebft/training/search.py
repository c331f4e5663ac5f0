"""Hyperparameter search: its objective, and EBFT settings as parameters of a trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import BestRun, HPSearchBackend

from hf_ebft.config import EBFTSettings

# Settings that are read when the trainer is built, before the first trial.
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
        """Search as `Trainer` does; without `compute_objective`, minimise `eval_loss`.

        The default objective of transformers is the sum of all metrics other than `eval_loss`. Here
        it would add up `eval_ebft/alignment`, the number of blocks, and so on.

        Raises:
            ValueError: `direction` is not "minimize", and there is no `compute_objective`.
        """
        if compute_objective is None:
            if direction != "minimize":
                raise ValueError(
                    f"direction={direction!r} without compute_objective would make eval_loss, the "
                    "default objective, as large as possible. Pass compute_objective, such as "
                    'lambda metrics: metrics["eval_ebft/alignment"].'
                )
            compute_objective = evaluation_loss
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction, backend, hp_name, **kwargs
        )

    def _hp_search_setup(self, trial: Any) -> None:
        # Private in transformers, but the only hook after a trial's parameters are set and before
        # it is trained. The networks were built earlier, from the last trial's settings.
        before = _values(self.ebft)
        super()._hp_search_setup(trial)
        changed = {name for name, value in _values(self.ebft).items() if value != before[name]}
        if not changed:
            return
        fixed = sorted(changed.intersection(_FIXED))
        if fixed:
            raise ValueError(
                f"A trial sets {', '.join(fixed)}, but this is read only when the trainer is "
                "built. Leave it out of hp_space, or build one trainer for each value."
            )
        self.ebft.validate()
        self._prepare_networks(self.model)

    def _prepare_networks(self, policy: nn.Module) -> None:
        raise NotImplementedError


def evaluation_loss(metrics: dict[str, float]) -> float:
    """`eval_loss`, the default objective of a search.

    Raises:
        ValueError: there is no `eval_loss`, since there are several evaluation sets.
    """
    if "eval_loss" not in metrics:
        losses = sorted(name for name in metrics if name.endswith("_loss"))
        raise ValueError(
            f"There is no eval_loss to minimise, only {losses}. Pass compute_objective, a function "
            "that makes one number of the metrics."
        )
    return metrics["eval_loss"]


def _values(settings: EBFTSettings) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(EBFTSettings)}
