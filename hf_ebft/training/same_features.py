"""Resuming with the feature network that the run began with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ebft.feature_network.fingerprint import Fingerprint

# In trainer_state.json, beside the states of transformers' own callbacks.
KEY = "hf_ebft_feature_network"


class SameFeaturesCallback(TrainerCallback):
    """Keeps a fingerprint of phi in checkpoints, and refuses to resume with another phi.

    By default phi is a copy of the policy as the trainer gets it. A trainer that is built from its
    own checkpoint would take that for phi, and go on with other rewards than before.

    Args:
        fingerprint: gives that of the trainer's feature network.
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
        """Compare with the checkpoint's; the state carries the fingerprint into later ones.

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
                f"it began with{precision if cast else ''}, so that rewards before and after could "
                "not be compared. Without feature_network the policy that the trainer is given "
                "becomes it: give the model that training started from, not a checkpoint "
                "(resume_from_checkpoint loads the trained weights), or pass feature_network. To "
                "train with a new feature network, start a new run from the checkpoint's weights, "
                "without resume_from_checkpoint."
            )
        states[KEY] = {"args": {}, "attributes": fingerprint}
