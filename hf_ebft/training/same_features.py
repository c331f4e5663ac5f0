"""Refuses to resume a run with another feature network than it began with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ebft.feature_network.fingerprint import Fingerprint

# Key in trainer_state.json, where transformers' own callbacks save their states, too.
KEY = "hf_ebft_feature_network"


class SameFeaturesCallback(TrainerCallback):
    """Saves a fingerprint of phi in checkpoints, and refuses to resume with another phi.

    By default phi is a copy of the model that the trainer gets. A trainer that is built from its
    own checkpoint would use the checkpoint as phi, and continue with other rewards than before.

    Args:
        fingerprint: returns the fingerprint of the trainer's feature network.
    """

    def __init__(self, fingerprint: Callable[[], Fingerprint]) -> None:
        self._fingerprint = fingerprint

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Compare the fingerprint with the checkpoint's, and store it for later checkpoints.

        Raises:
            ValueError: training resumes with another feature network.
        """
        fingerprint = asdict(self._fingerprint())
        states: Any = state.stateful_callbacks
        saved = states.get(KEY, {}).get("attributes") if state.global_step > 0 else None
        if saved is not None and saved != fingerprint:
            cast = saved["dtypes"] != fingerprint["dtypes"]
            precision = (
                f" (its weights were {saved['dtypes']}, now they are {fingerprint['dtypes']})"
            )
            raise ValueError(
                f"Training resumes at step {state.global_step} with another feature network than "
                f"it began with{precision if cast else ''}, so rewards before and after could not "
                f"be compared. {_remedy(args)} To train with a new feature network, start a new "
                "run from the checkpoint's weights, without resume_from_checkpoint."
            )
        states[KEY] = {"args": {}, "attributes": fingerprint}


def _remedy(args: TrainingArguments) -> str:
    """How to get the feature network back that the run began with."""
    named = getattr(args, "feature_model_name_or_path", None)
    if named is not None:
        return (
            f"feature_model_name_or_path={named!r} may now name another model, or its files may "
            "have changed: name the model that the run began with."
        )
    return (
        "If feature_network is not given, a copy of model is used. Pass as model the one that "
        "training started from, not a checkpoint (resume_from_checkpoint loads the trained "
        "weights), or pass feature_network. If the run began with feature_model_name_or_path, set "
        "it again."
    )
