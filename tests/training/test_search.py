"""Hyperparameter search: the objective, and trials that set EBFT settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import transformers.trainer
from transformers import LlamaForCausalLM
from transformers.trainer_utils import BestRun, HPSearchBackend

from hf_ebft import EBFTTrainer
from hf_ebft.training.search import evaluation_loss
from tests.support.tiny import config, texts, tiny_llama


class TrialsInTurn:
    """A search backend that needs no library: trains each trial and evaluates it."""

    trials: ClassVar[list[dict[str, Any]]] = []

    @staticmethod
    def ensure_available() -> None:
        """Always."""

    @staticmethod
    def default_hp_space(trial: Any) -> Any:
        """The trial itself."""
        return trial

    def run(self, trainer: EBFTTrainer, n_trials: int, direction: str, **kwargs: Any) -> BestRun:
        """Objectives of all trials, as the run's summary."""
        found = []
        for trial in self.trials:
            trainer.train(trial=dict(trial))
            metrics = trainer.evaluate()
            found.append((trainer.compute_objective(metrics), metrics))
        return BestRun("0", min(objective for objective, _ in found), {}, found)


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    backends = transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS
    monkeypatch.setitem(backends, HPSearchBackend.WANDB, TrialsInTurn)
    # These would ask libraries for searching, which are not installed.
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial)
    monkeypatch.setattr(EBFTTrainer, "_get_output_dir", lambda *_, **__: str(tmp_path))

    def of(trials: list[dict[str, Any]], **kwargs: Any) -> Any:
        monkeypatch.setattr(TrialsInTurn, "trials", trials)
        return make(tmp_path).hyperparameter_search(backend="wandb", **kwargs).run_summary

    return of


def make(folder: Path, **settings: Any) -> EBFTTrainer:
    def model_init() -> LlamaForCausalLM:
        return tiny_llama()

    return EBFTTrainer(
        args=config(folder, max_steps=1, **settings),
        model_init=model_init,
        train_dataset=texts(24, 24),
        eval_dataset=texts(26, 19),
    )


def test_the_objective_is_the_evaluation_loss(search: Any) -> None:
    """Upstream's default adds up alignment, block counts and all else but eval_loss."""
    found = search([{"learning_rate": 1e-3}, {"learning_rate": 1e-1}])
    objectives = [objective for objective, _ in found]
    assert objectives == [metrics["eval_loss"] for _, metrics in found]
    assert objectives[0] != objectives[1]


def test_an_objective_of_the_users_own_is_kept(search: Any) -> None:
    ((objective, metrics),) = search(
        [{}], compute_objective=lambda m: m["eval_ebft/alignment"], direction="maximize"
    )
    assert objective == metrics["eval_ebft/alignment"]


def test_maximising_the_loss_is_refused(search: Any) -> None:
    with pytest.raises(ValueError, match=r"direction='maximize' without compute_objective"):
        search([{}], direction="maximize")


def test_several_evaluation_sets_need_an_objective() -> None:
    with pytest.raises(ValueError, match=r"only \['eval_a_loss', 'eval_b_loss'\]"):
        evaluation_loss({"eval_a_loss": 1.0, "eval_b_loss": 2.0, "epoch": 1.0})


@pytest.mark.parametrize(
    "settings", [{"embed_method": "mean_pooling"}, {"temperature": 0.5}, {"stride": 7}]
)
def test_a_trial_trains_with_its_own_settings(
    settings: dict[str, Any], search: Any, tmp_path: Path
) -> None:
    """Not with those of the trial before, from which its networks were built."""
    ((_, found),) = search([settings])
    alone = make(tmp_path, **settings)
    alone.train()
    expected = alone.evaluate()
    for name in ("eval_loss", "eval_ebft/cfm_loss", "eval_ebft/blocks_per_document"):
        assert found[name] == expected[name], name


def test_a_trial_with_impossible_settings_is_refused(search: Any) -> None:
    with pytest.raises(ValueError, match="n_samples_per_prompt"):
        search([{"n_samples_per_prompt": 0}])


def test_a_trial_cannot_set_settings_that_are_read_only_once(search: Any) -> None:
    with pytest.raises(ValueError, match=r"A trial sets log_pictures_steps, but this is read only"):
        search([{"log_pictures_steps": 3}])
