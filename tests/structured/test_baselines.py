"""The reward looks at the trainer it works for: what changes the advantages is said."""

import logging

import pytest
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hf_ebft.structured import EBFTGRPOTrainer, FeatureMatchingReward
from tests.support.tiny_structured import config, policy, rows, tokenizer, trl_settings

PLAIN = {
    GRPOTrainer: (GRPOConfig, {"scale_rewards": "none"}, "group_mean"),
    RLOOTrainer: (RLOOConfig, {"beta": 0.0}, "leave_one_out"),
}


def train(folder, trainer_class, baseline=None, **settings):
    args_class, plain, own = PLAIN[trainer_class]
    if settings.pop("peft", False):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(policy(), LoraConfig(r=2, target_modules=["q_proj"]))
    else:
        model = policy()
    reward = FeatureMatchingReward(policy(), tokenizer(), trainer_baseline=baseline or own)
    args = args_class(**(trl_settings(folder) | plain | settings))
    trainer_class(
        model, reward, args=args, train_dataset=rows(), processing_class=tokenizer()
    ).train()


@pytest.mark.parametrize(
    ("trainer_class", "settings", "message"),
    [
        (GRPOTrainer, {"scale_rewards": "group"}, "scale_rewards='group' divides"),
        (GRPOTrainer, {"scale_rewards": True}, "scale_rewards='group' divides"),
        (GRPOTrainer, {"scale_rewards": "batch"}, "set scale_rewards='none'"),
        (
            GRPOTrainer,
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum' divides",
        ),
        (RLOOTrainer, {"beta": 0.05, "peft": True}, "beta=0.05 takes a KL penalty"),
        (RLOOTrainer, {"normalize_advantages": True}, "normalize_advantages=True divides"),
        (RLOOTrainer, {"reward_clip_range": (-1.0, 1.0)}, "reward_clip_range=(-1.0, 1.0) clips"),
    ],
)
def test_setting_that_changes_the_advantages_is_named_once(
    tmp_path, caplog, trainer_class, settings, message
):
    """Naive leave-one-out, or advantages over a standard deviation, came about without a word."""
    with caplog.at_level(logging.WARNING, logger="hf_ebft"):
        train(tmp_path, trainer_class, **settings)
    found = [line for line in caplog.messages if "eq. 94" in line]
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize("trainer_class", PLAIN)
def test_exact_settings_pass_in_silence(tmp_path, caplog, trainer_class):
    with caplog.at_level(logging.WARNING, logger="hf_ebft"):
        train(tmp_path, trainer_class, max_steps=1)
        EBFTGRPOTrainer(
            policy(),
            config(tmp_path, max_steps=1),
            train_dataset=rows(),
            processing_class=tokenizer(),
        ).train()
    assert not [line for line in caplog.messages if "eq. 94" in line]


@pytest.mark.parametrize(
    ("trainer_class", "baseline"), [(GRPOTrainer, "leave_one_out"), (RLOOTrainer, "group_mean")]
)
def test_reward_made_for_the_other_trainer_is_refused(tmp_path, trainer_class, baseline):
    own = PLAIN[trainer_class][2]
    message = f"trainer_baseline='{baseline}' does not fit .*trainer_baseline='{own}'"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, trainer_class, baseline)
