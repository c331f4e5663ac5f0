"""The contract with TRL: what `trl_internals.py` uses is still there, and means the same."""

import inspect
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hf_ebft.structured import EBFTGRPOTrainer
from hf_ebft.structured.trl_internals import (
    restore_forward,
    sample_replies,
    set_most_tokens,
    take_metrics,
    trainer_of,
)
from hf_ebft.watching.model_card import CITATION
from tests.support.tiny_structured import config, policy, rows, tokenizer, trl_settings

MOVED = "TRL has moved this: adapt hf_ebft/structured/trl_internals.py, then the bound in setup.cfg"


def zero(completions, **_):
    return [0.0] * len(completions)


def trainer_with(folder, reward=zero, **settings):
    return GRPOTrainer(
        policy(),
        reward,
        args=GRPOConfig(**(trl_settings(folder) | settings)),
        train_dataset=rows(),
        eval_dataset=rows(2),
        processing_class=tokenizer(),
    )


def test_installed_trl_is_within_the_bounds():
    """The upper bound is the newest minor release that this file has passed with."""
    setup = ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = [line for line in (extras["structured"] + extras["test"]).splitlines() if "trl" in line]
    assert len(lines) == 2
    for line in lines:
        specifier = Requirement(line).specifier
        assert specifier.contains(version("trl")), f"trl {version('trl')} is not in {specifier}"
        assert any(bound.operator == "<" for bound in specifier)


def test_trl_s_model_card_names_the_method(tmp_path):
    """TRL reads these class attributes; without ours a card would cite GRPO's paper."""
    for name in ("_tag_names", "_name", "_paper"):
        assert hasattr(GRPOTrainer, name), MOVED
    trainer = EBFTGRPOTrainer(
        policy(),
        config(tmp_path),
        train_dataset=rows(),
        processing_class=tokenizer(),
    )
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert CITATION in card, MOVED
    assert "2603.12248" in card and "ebft" in card, MOVED
    assert "DeepSeekMath" not in card


def test_metrics_are_taken_as_trl_would_log_them(tmp_path):
    trainer = trainer_with(tmp_path)
    assert set(trainer._metrics) == {"train", "eval"}, MOVED
    trainer._metrics["eval"]["a"] += [1.0, float("nan"), 3.0]
    trainer._metrics["eval"]["b"].append(float("nan"))
    assert take_metrics(trainer, "eval") == {"a": 2.0, "b": None}
    assert take_metrics(trainer, "eval") == {}
    trainer._metrics["train"]["a"] += [1.0, float("nan"), 3.0]
    logs = {}
    trainer.model.train()
    trainer.log(logs)
    assert logs["a"] == 2.0, MOVED


def test_evaluation_gathers_its_metrics_there(tmp_path):
    trainer = trainer_with(tmp_path)
    kept = {}

    class Kept(type(trainer)):
        def log(self, logs, start_time=None):
            kept.update(take_metrics(self, "eval"))
            super().log(logs, start_time)

    trainer.__class__ = Kept
    metrics = trainer.evaluate()
    assert {"reward", "completions/mean_length"} <= set(kept), MOVED
    assert not any(name.startswith("eval_completions") for name in metrics), MOVED


def test_replies_are_sampled_from_token_ids(tmp_path):
    parameters = inspect.signature(GRPOTrainer._generate_single_turn).parameters
    used = {"prompt_ids", "images", "multimodal_fields", "num_generations"}
    assert used <= set(parameters), MOVED
    trainer = trainer_with(tmp_path)
    set_most_tokens(trainer, 2)
    replies, log_probs = sample_replies(trainer, [[5, 6, 7], [5]])
    assert len(replies) == 2 and all(1 <= len(reply) <= 2 for reply in replies), MOVED
    assert log_probs is None


def test_longest_completion_can_be_set(tmp_path):
    trainer = trainer_with(tmp_path, max_completion_length=9)
    assert trainer.generation_config.max_new_tokens == 9, MOVED
    set_most_tokens(trainer, 3)
    replies, _ = sample_replies(trainer, [[5, 6, 7]] * 8)
    assert max(map(len, replies)) <= 3, MOVED


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_reward_functions_can_tell_their_trainer(tmp_path, kind):
    seen = []

    def reward(completions, log_metric=None, **_):
        seen.append(trainer_of(log_metric))
        return [0.0] * len(completions)

    trainer_class, args_class = {
        "grpo": (GRPOTrainer, GRPOConfig),
        "rloo": (RLOOTrainer, RLOOConfig),
    }[kind]
    trainer = trainer_class(
        policy(),
        reward,
        args=args_class(**(trl_settings(tmp_path) | {"max_steps": 1, "beta": 0.0})),
        train_dataset=rows(),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert seen == [trainer], MOVED
    assert trainer_of(None) is None
    assert trainer_of(lambda name, value: None) is None


def test_copied_policy_gets_the_forward_of_its_class(tmp_path):
    trainer = trainer_with(tmp_path)
    assert "forward" in vars(trainer.model), MOVED
    restore_forward(trainer.model)
    assert "forward" not in vars(trainer.model), MOVED
    assert trainer.model(torch.tensor([[1, 2]])).logits.shape == (1, 2, len(tokenizer()))


def test_trl_withholds_the_completion_column(tmp_path):
    """Why a ground truth called `completion` is renamed while training."""
    seen = {}

    def reward(completions, **columns):
        seen.update(columns)
        return [0.0] * len(completions)

    data = rows().add_column("completion", ["a"] * 8).add_column("other", ["b"] * 8)
    trainer = GRPOTrainer(
        policy(),
        reward,
        args=GRPOConfig(**(trl_settings(tmp_path) | {"max_steps": 1})),
        train_dataset=data,
        processing_class=tokenizer(),
    )
    trainer.train()
    assert "other" in seen and "completion" not in seen, MOVED


def test_batches_hold_what_the_importance_ratio_is_taken_from(tmp_path):
    """`hf_ebft.structured.vllm.trainer` puts one entry in the other's place."""
    source = inspect.getsource(GRPOTrainer)
    for entry in ('output["sampling_per_token_logps"]', 'inputs.get("old_per_token_logps")'):
        assert entry in source, MOVED
