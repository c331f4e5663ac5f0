"""The recipes of the paper: the values of its released configurations, each with its source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_ebft import EBFTConfig
from hf_ebft.commands.runs.parsing import check, parse_arguments

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
BOTH: dict[str, Any] = {
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0.03,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "ema_decay": 0.9,
    "n_samples_per_prompt": 4,
    "temperature": 0.6,
    "feature_layers": [0.25, 0.5, 0.75],
    "feature_normalization": "joint",
    "whitening_space": "sample",
    "use_whitening": True,
    "rl_coef": 1.0,
    "advantage_estimator": "rloo",
}
RECIPES: dict[str, dict[str, Any]] = {
    "paper_qwen25_1b5_code": {
        "stride": 8,
        "context_length": 8,
        "generate_max_len": 8,
        "embed_method": "last_token",
    },
    "paper_llama32_1b_translation": {
        "stride": 2,
        "context_length": 4,
        "generate_max_len": 4,
        "embed_method": "mean_pooling",
    },
}
SOURCES = ("[released]", "[paper]", "[ours]")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_the_configuration_of_the_released_code(name: str) -> None:
    data, names, lora, report, args = parse_arguments([f"--config={CONFIGS / name}.yaml"])
    check(names, lora, report)
    assert type(args) is EBFTConfig
    expected = BOTH | RECIPES[name]
    assert {key: getattr(args, key) for key in expected} == expected
    assert data.sequence_len == 1024
    assert args.ce_coef in (0.0, 0.03, 0.1) and args.diversity_coef in (0.0, 0.5, 1.0)
    assert not lora.use_peft and names.dtype == "float32"


def test_a_step_of_the_code_recipe_has_sixteen_packed_rows() -> None:
    data, _, _, _, args = parse_arguments([f"--config={CONFIGS}/paper_qwen25_1b5_code.yaml"])
    assert isinstance(args, EBFTConfig) and data.pack
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_names_its_source(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    lines = [line for line in text.splitlines() if re.match(r"\w+:", line)]
    assert {line.partition(":")[0] for line in lines} == yaml.safe_load(text).keys()
    for line in lines:
        assert line.partition("  # ")[2].startswith(SOURCES), line
