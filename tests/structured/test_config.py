"""Settings of structured mode, and that nothing else needs TRL."""

import subprocess
import sys
import textwrap

import pytest

from hf_ebft.structured import EBFTGRPOConfig
from tests.support.tiny_structured import config


def test_defaults_are_trls_but_for_scaled_rewards_and_the_optimizer(tmp_path):
    from trl import GRPOConfig

    cpu = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    ours, theirs = EBFTGRPOConfig(**cpu), GRPOConfig(**cpu)
    differing = {
        name for name, value in vars(theirs).items() if vars(ours)[name] != value
    } - {"distributed_state"}  # fmt: skip
    optimizer = {"learning_rate", "lr_scheduler_type", "warmup_steps", "adam_beta2"}
    assert differing == {"scale_rewards"} | optimizer
    assert ours.learning_rate is None  # 1e-6 or 1e-5, as soon as the model is known
    assert ours.lr_scheduler_type == "constant_with_warmup"
    assert (ours.warmup_steps, ours.adam_beta2) == (0.03, 0.95)
    assert ours.scale_rewards == "none"
    assert ours.embed_method == "last_token"
    assert ours.feature_layers == [0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 2}, r"num_generations=2 with diversity_coef=1.0.*3 or more"),
        (
            {"num_generations": 4, "per_device_train_batch_size": 2},
            r"per_device_train_batch_size=2 times .* num_generations=4 completions: change",
        ),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"num_generations_eval": 1}, "num_generations_eval=1 gives no pairs"),
        ({"scale_rewards": True}, "scale_rewards='group' would divide"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch' would divide"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
        ({"remove_unused_columns": True}, "would drop the ground truth"),
        ({"advantage_estimator": "reinforce"}, "use 'rloo' or 'group_norm'"),
        ({"advantage_estimator": "fitted"}, "gives every token its own advantage"),
        ({"kl_coef": 0.1}, "`beta`"),
        ({"kl_estimator": "k1"}, "`beta`"),
        ({"adaptive_max_tokens": "yes"}, "must be True or False"),
        ({"gt_length_multiplier": 0}, "must be a number above 0"),
        ({"gt_length_multiplier": float("nan")}, "must be a number above 0"),
        ({"max_completion_length": None}, "max_completion_length=None"),
        ({"ce_coef": -1.0}, "ce_coef=-1.0 must be 0 or more"),
        ({"whitening_space": "corpus"}, "which structured mode does not have"),
        ({"embed_method": "first_token"}, "last_token, mean_pooling, concat, completion_mean"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_generations": 2, "diversity_coef": 0.0},
        {"num_generations": 2, "advantage_estimator": "group_norm"},
        {"num_generations_eval": 2},
        {"scale_rewards": False},
        {"beta": 0.1},
    ],
)
def test_settings_that_are_exact_are_accepted(tmp_path, settings):
    assert config(tmp_path, **settings).scale_rewards == "none"


def run(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )


def test_only_structured_mode_imports_trl(tmp_path):
    finished = run(
        f"""
        import sys
        import hf_ebft
        from tests.support.tiny import config, texts, tiny_llama
        from pathlib import Path
        trainer = hf_ebft.EBFTTrainer(
            tiny_llama(), config(Path({str(tmp_path)!r}), max_steps=1), train_dataset=texts(20, 20)
        )
        trainer.train()
        assert "trl" not in sys.modules
        import hf_ebft.structured
        assert "trl" in sys.modules
        """
    )
    assert finished.returncode == 0, finished.stderr


def test_without_trl_structured_mode_says_what_to_install():
    finished = run(
        """
        import sys
        sys.modules["trl"] = None
        import hf_ebft
        import hf_ebft.structured
        """
    )
    assert "pip install 'hf_ebft[structured]'" in finished.stderr
