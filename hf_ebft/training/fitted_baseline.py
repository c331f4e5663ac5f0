"""`advantage_estimator="fitted"`: regressions on the feature network's states, updated over a run.

They are fitted between optimizer steps, to rollouts of earlier steps, so that the prediction for a
rollout does not depend on that rollout. All processes fit the same regressions. Checkpoints contain
everything that a resumed run needs to continue exactly.

Dimension letters: B rows of the batch, n rollouts per block, K blocks, G tokens of a rollout, V
vocabulary, D width of a feature, r width of the regressions' inputs, F = 2 r + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ebft.feature_network.network import FeatureNetwork, FeaturePass
from hf_ebft.objective.fitted import Moments, TokenKnowledge, fitted_advantages
from hf_ebft.packed.expectations import expected_over_tokens
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.model_parts import vocabulary_size
from hf_ebft.packed.sampling import Rollouts
from hf_ebft.packed.targets import TokenLogProbs
from hf_ebft.training.ema import checkpoint_folder
from hf_ebft.training.metrics import sum_over_processes

FILE = "fitted_baseline.safetensors"
# Number of dimensions of states and of token features that the regressions use. For the shipped
# model, 256 of 576 dimensions keep 98 % of the variance that all of them explain.
RANK = 256
# The weight of earlier rollouts decays by this factor per step, since the policy changes: about the
# last 100 steps count.
DECAY = 0.99
# Strengths of the ridge penalty, in rollouts, from which one is chosen for each token; and the
# index of the first choice.
STRENGTHS = (30.0, 300.0, 3000.0, 30000.0)
FIRST_STRENGTH = 3
# Regressions are fitted again after a quarter more steps, or after this many steps.
GROWTH, MOST_STEPS = 1.25, 25


class FittedBaseline(TrainerCallback):
    """Computes advantages for each token, and fits the regressions for them.

    Args:
        trainer: the `EBFTTrainer`, which has the settings, phi and the policy.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.resume_from: str | None = None
        self._restart()

    def _restart(self) -> None:
        self._steps = self._fitted_at = 0
        self._basis: Tensor | None = None
        self._table: Tensor | None = None
        self._old: Moments | None = None
        self._new: Moments | None = None
        self._errors: Tensor | None = None
        self.coefficients: Tensor | None = None

    @property
    def basis(self) -> Tensor:
        """(D, r), orthonormal: the directions in which features of single tokens vary most."""
        if self._basis is None:
            self._basis = _from_main_process(self._principal_directions())
        return self._basis

    def _principal_directions(self) -> Tensor:
        features = self._token_features()
        centred = features - features.mean(dim=0)
        wide = centred.cpu() if centred.device.type == "mps" else centred
        _, vectors = torch.linalg.eigh(wide.double().T @ wide.double())  # ascending
        return vectors[:, -RANK:].flip(1).float().to(features.device)

    def _token_vectors(self, device: torch.device) -> Tensor:
        """(V, r): features of single tokens, projected on the basis."""
        if self._table is None:
            self._table = self._token_features() @ self.basis
        if self._table.device != device:
            self._table = self._table.to(device)
        return self._table

    def _token_features(self) -> Tensor:
        size = vocabulary_size(self._trainer.model)
        features: Tensor = self._trainer.feature_network.token_features(size)
        return features

    def embed(self, rollouts: Rollouts, score: Callable[..., TokenLogProbs] | None) -> FeaturePass:
        """Features of rollouts, and states projected on `basis`; see `FeatureNetwork.embed`."""
        network: FeatureNetwork = self._trainer.feature_network
        return network.embed_with_states(rollouts, self.basis, score)

    def score(
        self, model: nn.Module, forward: PackedForward, rollouts: Rollouts, features: FeaturePass
    ) -> Tensor:
        """Advantages (B, n, K, G); the rollouts are also added to the data of the next regressions.

        Args:
            model: the policy.
            forward: its forward pass over packed rows.
            rollouts: the batch and its sampled tokens.
            features: features of the rollouts, with states in `basis`.
        """
        assert features.states is not None, "embedded without a basis"
        knowledge = self.knowledge(model, forward, rollouts, features.states)
        self.add_rollouts(features.generated, knowledge, rollouts.exists)
        return self.advantages(features, knowledge)

    def knowledge(
        self, model: nn.Module, forward: PackedForward, rollouts: Rollouts, states: Tensor
    ) -> TokenKnowledge:
        """The inputs of the regressions for rollouts; arguments as in `score`."""
        settings, table = self._trainer.ebft, self._token_vectors(rollouts.tokens.device)
        with self._trainer.accelerator.autocast():
            expected = expected_over_tokens(
                model,
                forward,
                rollouts,
                table,
                temperature=settings.temperature,
                top_p=settings.top_p,
                chunk_size=settings.log_prob_chunk_size,
            )
        return TokenKnowledge(states.float(), table[rollouts.tokens], expected)

    def advantages(self, features: FeaturePass, knowledge: TokenKnowledge) -> Tensor:
        """(B, n, K, G), from regressions that were fitted to earlier steps."""
        return fitted_advantages(
            features.generated,
            features.ground_truth,
            knowledge,
            self.coefficients,
            alignment_coef=self._trainer.ebft.alignment_coef,
            diversity_coef=self._trainer.ebft.diversity_coef,
        )

    def add_rollouts(self, features: Tensor, knowledge: TokenKnowledge, exists: Tensor) -> None:
        """Add rollouts to the data of the next regressions.

        Args:
            features: (B, n, K, D) features of the rollouts.
            knowledge: the regressions' inputs for the same rollouts.
            exists: (B, K), whether each block exists.
        """
        rollout_exists = exists[:, None].expand(features.shape[:3])
        regressors = knowledge.regressors(knowledge.tokens)[rollout_exists]
        if self._new is None:
            _, length, width = regressors.shape
            self._new = Moments.zeros(length, width, features.shape[-1], features.device)
        self._new.add(regressors, features[rollout_exists])

    def fit(self) -> None:
        """Fit regressions to all rollouts so far: a collective call."""
        if self._new is None:
            return
        new = self._new_of_all_processes()
        if self._errors is None:
            shape = (len(STRENGTHS), len(new.gram))
            self._errors = torch.zeros(shape, dtype=torch.float64, device=new.gram.device)
        if self._old is None:
            self._old = new
            chosen = torch.full_like(self._errors[0], FIRST_STRENGTH, dtype=torch.long)
        else:
            # The error of each strength is measured on rollouts that were not used for fitting.
            weight = DECAY ** (self._steps - self._fitted_at)
            trials = [self._old.solve(torch.full_like(self._errors[0], s)) for s in STRENGTHS]
            found = torch.stack([new.error(trial) for trial in trials])
            self._errors = weight * self._errors + found.double()
            chosen = self._errors.argmin(dim=0)
            self._old = self._old.plus(new, decay=weight)
        strengths = torch.tensor(STRENGTHS, device=chosen.device)[chosen]
        self.coefficients = _from_main_process(self._old.solve(strengths))
        self._new = None
        self._fitted_at = self._steps

    def _new_of_all_processes(self) -> Moments:
        """Moments of the rollouts since the last regressions, summed over processes."""
        assert self._new is not None
        return Moments(*(sum_over_processes(part) for part in self._new.parts))

    def _counted_once(self, summed: Moments) -> Moments:
        """This process's share of summed moments: all of them on the main process, zero elsewhere.

        So the next sum over processes counts them once.
        """
        if self._trainer.accelerator.is_main_process:
            return summed
        return Moments(*(torch.zeros_like(part) for part in summed.parts))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Fit the regressions again at certain steps, which are the same on all processes."""
        self._steps += 1
        longest = self._fitted_at + MOST_STEPS
        if self._steps >= min(max(self._fitted_at + 1, int(GROWTH * self._fitted_at)), longest):
            self.fit()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start without regressions, or with those of the checkpoint that training resumes from.

        Raises:
            ValueError: the checkpoint has no regressions, or regressions for another length of
                rollouts.
        """
        self._restart()
        if state.global_step > 0:
            folder = self.resume_from or checkpoint_folder(args, state)
            self._load(Path(folder, FILE), args.device)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save the regressions, and the data of the next ones, into the checkpoint."""
        if args.save_only_model:
            return
        tensors: dict[str, Tensor] = {"steps": torch.tensor([self._steps, self._fitted_at])}
        if self._new is not None:
            new = self._new_of_all_processes()
            tensors |= _to_tensors("new", new)
            self._new = self._counted_once(new)
        if self._old is not None:
            tensors |= _to_tensors("old", self._old)
        kept = {"basis": self._basis, "errors": self._errors, "coefficients": self.coefficients}
        tensors |= {name: value for name, value in kept.items() if value is not None}
        if args.should_save:
            folder = checkpoint_folder(args, state)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in tensors.items()}, folder / FILE)

    def _load(self, path: Path, device: torch.device) -> None:
        if not path.is_file():
            raise ValueError(
                "Training resumes with advantage_estimator='fitted', but there are no regressions "
                f"at {path}: the checkpoint was saved with another estimator or with "
                "save_only_model, or is in another folder. Pass its path to "
                "train(resume_from_checkpoint=...), or start a new run."
            )
        tensors = load_file(path)
        length = self._trainer.ebft.generate_max_len
        if "coefficients" in tensors and len(tensors["coefficients"]) != length:
            fitted_length = len(tensors["coefficients"])
            raise ValueError(
                f"Training resumes with generate_max_len={length}, but the regressions at {path} "
                f"are for rollouts of {fitted_length} tokens. Resume with "
                f"generate_max_len={fitted_length}, or start a new run."
            )
        self._steps, self._fitted_at = tensors["steps"].tolist()
        on_device = {name: value.to(device) for name, value in tensors.items()}
        self._old = _from_tensors("old", on_device)
        new = _from_tensors("new", on_device)
        self._new = None if new is None else self._counted_once(new)
        self._errors = on_device.get("errors")
        self.coefficients = on_device.get("coefficients")
        basis = tensors.get("basis")
        self._basis = None if basis is None else basis.to(self._trainer.feature_network.device)


def _to_tensors(name: str, moments: Moments) -> dict[str, Tensor]:
    parts = zip(("gram", "cross", "count"), moments.parts, strict=True)
    return {f"{name}.{part}": value for part, value in parts}


def _from_tensors(name: str, tensors: dict[str, Tensor]) -> Moments | None:
    if f"{name}.gram" not in tensors:
        return None
    return Moments(*(tensors[f"{name}.{part}"] for part in ("gram", "cross", "count")))


def _from_main_process(tensor: Tensor) -> Tensor:
    """The main process's tensor, on every process: solvers may round differently elsewhere."""
    found: Tensor = broadcast(tensor.contiguous(), from_process=0)
    return found
