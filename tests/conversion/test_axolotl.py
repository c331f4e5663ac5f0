"""axolotl's configurations: every key carried over or named, and the result runs our script."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from hf_ebft import EBFTConfig
from hf_ebft.cli import main
from hf_ebft.commands.runs.options import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    ReportArguments,
)
from hf_ebft.commands.runs.parsing import check, parse_arguments
from hf_ebft.conversion import Conversion, convert_axolotl, to_yaml
from hf_ebft.conversion.axolotl_keys import (
    EBFT_SAME,
    EBFT_STRIDED,
    EBFT_STRUCTURED,
    SAME,
    TRL_NO_PLACE,
    TRL_SAME,
    VLLM_SAME,
)
from hf_ebft.data import TRANSFORMS

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests" / "conversion" / "axolotl").glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(
        (ROOT / "tests/conversion/axolotl" / f"{name}.yaml").read_text()
    )
    return config


def keys_of(config: Mapping[str, Any]) -> Iterator[str]:
    """Every key of a file; of the three sections and the first data set, what they hold."""
    for key, value in config.items():
        if key in ("ebft", "trl", "vllm"):
            yield from (f"{key}.{inner}" for inner in value)
        elif key == "datasets":
            yield from (f"datasets[0].{inner}" for inner in value[0])
            yield from (f"datasets[{number}]" for number in range(1, len(value)))
        else:
            yield key


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_key_is_dropped_silently(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    conversion = convert_axolotl(config)
    keys = set(keys_of(config))
    assert keys == conversion.carried.keys() | conversion.left.keys()
    assert not conversion.carried.keys() & conversion.left.keys()
    assert set(conversion.carried.values()) <= conversion.options.keys()
    assert len(conversion.left) < len(keys) / 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_written_can_be_run(path: Path, tmp_path: Path) -> None:
    """Parsed by the script into its dataclasses, which check each value."""
    pytest.importorskip("trl")
    from hf_ebft.commands.runs import structured

    file = tmp_path / "run.yaml"
    assert main(["convert", str(path), "--output", str(file)]) == 0
    groups = parse_arguments([f"--config={file}", "--use_cpu"])
    check(*groups[1:4])
    values = {k: v for group in groups for k, v in vars(group).items()}
    config = yaml.safe_load(path.read_text())
    for key in EBFT_SAME:
        if key in config["ebft"]:
            assert values[key] == config["ebft"][key]
    assert values["learning_rate"] == config["learning_rate"]
    assert values["per_device_train_batch_size"] == config["micro_batch_size"]
    assert values["mode"] == config["ebft"].get("mode", "structured")
    if values["mode"] == "structured":
        structured.refuse_strided_options(groups[0], groups[3])
        assert values["num_generations"] == 4 and values["epsilon"] == 0.2


def test_qlora_is_carried_over() -> None:
    config = {"adapter": "qlora", "load_in_4bit": True, "load_in_8bit": False, "lora_r": 8}
    config |= {"peft_use_rslora": True, "peft_use_dora": True, "lora_modules_to_save": ["lm_head"]}
    options = convert_axolotl({"rl": "ebft", **config}).options
    expected = {"use_peft": True, "load_in_4bit": True, "lora_r": 8, "use_rslora": True}
    expected |= {"use_dora": True, "lora_modules_to_save": ["lm_head"]}
    assert expected.items() <= options.items() and "load_in_8bit" not in options


def test_a_structured_run() -> None:
    conversion = convert_axolotl(load("llama-1b-ebft-opencode"))
    options = conversion.options
    expected: dict[str, Any] = {
        "mode": "structured",
        "model_name_or_path": "meta-llama/Llama-3.2-1B",
        "dataset_name_or_path": "nvidia/OpenCodeInstruct",
        "train_split": "train[:1%]",
        "transform": "question_answer",
        "transform_args": {"question_column": "input", "answer_column": "output", "chat": True},
        "use_vllm": True,
        "vllm_mode": "server",
        "use_peft": True,
        "lora_target_modules": ["all-linear"],
        "dtype": "bfloat16",
        "bf16": False,
        "attn_implementation": "flash_attention_2",
        "use_whitening": False,
        "adaptive_max_tokens": True,
        "report_to": ["tensorboard"],
        "report_rows": 0,
    }
    assert {name: options[name] for name in expected} == expected
    assert conversion.left.keys() == {
        "chat_template",
        "trl.scale_rewards",
        "sequence_len",
        "special_tokens",
    }
    assert any(
        note.startswith("adaptive_max_tokens: true is axolotl's") for note in conversion.notes
    )


def test_a_strided_run() -> None:
    options = convert_axolotl(load("llama-3b-ebft-strided-fft")).options
    expected = {"stride": 8, "n_samples_per_prompt": 4, "temperature": 0.6, "warmup_steps": 0.1}
    expected |= {"text_column": "question", "sequence_len": 1024, "run_name": "strided-3b"}
    expected |= {"train_split": "train[:5000]", "report_to": ["wandb"], "diversity_coef": 0.0}
    assert {name: options[name] for name in expected} == expected
    # Not said there: axolotl does not whiten unless it is told to.
    assert convert_axolotl(load("llama-1b-ebft-strided")).options["use_whitening"] is False


def test_adapters_over_files() -> None:
    """A stock server takes the place of axolotl's; its key needs no use_vllm here."""
    conversion = convert_axolotl(load("qwen3-4b-ebft-structured-async"))
    options = conversion.options
    expected = {"vllm_lora_sync": True, "vllm_sync_interval": 2, "async_prefetch": True}
    expected |= {"vllm_server_host": "127.0.0.1", "vllm_max_lora_rank": 32}
    expected |= {"vllm_gpu_memory_utilization": 0.5, "vllm_max_model_length": 2048}
    assert {name: options[name] for name in expected} == expected
    assert "use_vllm" not in options
    assert "after --" in conversion.left["vllm.enforce_eager"]


@pytest.mark.parametrize(
    ("change", "key", "why"),
    [
        ({"surprise": 1}, "surprise", "no such option"),
        ({"ebft": {"surprise": 1}}, "ebft.surprise", "no such option"),
        ({"ebft": {"stride": 8}}, "ebft.stride", "axolotl does not read it in structured mode"),
        ({"trl": {"surprise": 1}}, "trl.surprise", "no such option"),
        ({"trl": {"reward_weights": [1.0]}}, "trl.reward_weights", "has one reward"),
        ({"trl": {"async_prefetch": True}}, "trl.async_prefetch", "needs vllm_lora_sync"),
        ({"trl": {"beta": None}}, "trl.beta", "empty"),
        ({"vllm": {"dtype": "auto"}}, "vllm.dtype", "after --"),
        ({"datasets": [{"path": "a", "type": "my.transform"}]}, "datasets[0].type", "it is code"),
        (
            {"datasets": [{"path": "a", "type": "ebft_chat_multiturn.transform_all_turns"}]},
            "datasets[0].type",
            "one row for each reply",
        ),
        (
            {"datasets": [{"path": "a", "type": "ebft_strided_chat.transform"}]},
            "datasets[0].type",
            "it is for strided mode",
        ),
        (
            {"datasets": [{"path": "a"}, {"path": "b"}]},
            "datasets[1]",
            "one data set is carried over",
        ),
        ({"datasets": [{"path": "a", "shards": 3}]}, "datasets[0].shards", "no such option"),
        ({"datasets": []}, "datasets", "no list of data sets"),
        ({"adapter": "llama-adapter"}, "adapter", "llama-adapter is not supported"),
        ({"load_in_4bit": True}, "load_in_4bit", "without adapter: lora"),
        ({"lora_target_linear": False}, "lora_target_linear", "lora_target_modules"),
        ({"val_set_size": 500}, "val_set_size", "share of at most 0.5"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_ratio", "said by another key"),
        ({"deepspeed": "zero2.json"}, "deepspeed", "not supported"),
        ({"load_in_8bit": False}, "load_in_8bit", "default"),
        ({"use_wandb": False}, "use_wandb", "default"),
        ({"wandb_project": ""}, "wandb_project", "empty"),
    ],
)
def test_keys_without_a_place_are_named(change: dict[str, Any], key: str, why: str) -> None:
    conversion = convert_axolotl({"rl": "ebft", **change})
    assert why in conversion.left[key]
    assert f"# - {key}: " in to_yaml(conversion, "axolotl.yaml")


@pytest.mark.parametrize(
    ("transform", "mode", "settings", "prompt", "truth"),
    [
        ("ebft_chat_multiturn.transform", "structured", {"turn": "all"}, 2, ["<A>1", "<A>2"]),
        ("ebft_chat_multiturn.transform_last_turn", "structured", {"turn": "last"}, 3, "<A>2"),
        (
            "ebft_reasoning.transform",
            "structured",
            {"turn": "last", "thinking": "keep"},
            3,
            "<think>\nsum\n</think>\n\n2",
        ),
        (
            "ebft_reasoning.transform_answer_only",
            "structured",
            {"turn": "last", "thinking": "strip"},
            3,
            "2",
        ),
        (
            "ebft_reasoning.transform_strided",
            "strided",
            {"turn": "last", "thinking": "keep"},
            3,
            "<think>\nsum\n</think>\n\n2",
        ),
        ("ebft_strided_chat.transform", "strided", {"turn": "last"}, 3, "<A>2"),
    ],
)
def test_transforms_of_chats(
    transform: str, mode: str, settings: dict[str, str], prompt: int, truth: Any
) -> None:
    """The settings give the prompt and the ground truth that axolotl's function gives."""
    data = {"path": "chats", "type": transform}
    conversion = convert_axolotl({"rl": "ebft", "ebft": {"mode": mode}, "datasets": [data]})
    assert conversion.options["transform"] == "chat"
    assert conversion.options["transform_args"] == settings
    answer = "<think>sum</think>" if "thinking" in settings else "<A>"
    chat = [
        {"role": role, "content": f"{answer if role == 'assistant' else 'Q'}{number}"}
        for number in (1, 2)
        for role in ("user", "assistant")
    ]
    made = TRANSFORMS["chat"]({"messages": chat}, **settings)
    assert (len(made["prompt"]), made["ground_truth"]) == (prompt, truth)


def test_every_option_of_grpo_is_carried_or_has_a_reason() -> None:
    """A field that TRL adds fails here until it is in one of the two tables."""
    trl = pytest.importorskip("trl")
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(trl.GRPOConfig)} - inherited
    assert own == (own & {*TRL_SAME, *TRL_NO_PLACE}) | {"use_vllm"}
    assert not set(TRL_SAME) & set(TRL_NO_PLACE)
    conversion = convert_axolotl({"rl": "ebft", "trl": {"importance_sampling_level": "sequence"}})
    assert conversion.options["importance_sampling_level"] == "sequence"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ebft": {"mode": "strided", "stride": "eight"}},
            r"^ebft\.stride: invalid int value: 'eight'\.$",
        ),
        ({"micro_batch_size": "two"}, "^micro_batch_size: invalid int value: 'two'"),
        ({"lora_r": "big"}, "^lora_r: invalid int value: 'big'"),
        ({"trl": {"temperature": "hot"}}, r"^trl\.temperature: invalid float value: 'hot'"),
        ({"optimizer": "sgdd"}, "^optimizer: .*'sgdd'"),
        ({"val_set_size": "some"}, "^val_set_size is 'some'"),
        ({"ebft": {"mode": "strided", "temperature": -1.0}}, "temperature=-1.0 must"),
        ({"ebft": {"feature_layers": [2.0]}}, "feature_layers"),
        ({"trl": {"num_generations": 2}}, "diversity"),
    ],
)
def test_values_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    if "mode" not in change.get("ebft", {}):
        pytest.importorskip("trl")
    with pytest.raises(ValueError, match=message):
        convert_axolotl({"rl": "ebft", **change})


def test_a_batch_may_fit_on_the_machine_that_trains() -> None:
    """Eight processes with a row each make a group of eight, which one process cannot."""
    pytest.importorskip("trl")
    trl = {"num_generations": 8, "generation_batch_size": 24}
    config = {"rl": "ebft", "micro_batch_size": 3, "trl": trl, "bf16": True, "tf32": True}
    options = convert_axolotl(config).options
    assert options["per_device_train_batch_size"] == 3 and options["generation_batch_size"] == 24


def test_modules_stay_a_list_or_a_regular_expression() -> None:
    for modules in (["q_proj", "v_proj"], r".*layers\.[0-3]\..*q_proj"):
        config = {"rl": "ebft", "lora_target_modules": modules}
        options = convert_axolotl(config | {"adapter": "lora"}).options
        assert options["lora_target_modules"] == modules
        without = convert_axolotl(config)  # the script refuses options of adapters that are off
        assert "lora_target_modules" not in without.options
        assert "all weights are trained" in without.left["lora_target_modules"]


def test_pooling_of_the_other_mode_is_not_taken_over() -> None:
    strided = {"mode": "strided", "embed_method": "completion_mean"}
    conversion = convert_axolotl({"rl": "ebft", "ebft": strided, "trl": {"beta": 0.1}})
    assert "embed_method" not in conversion.options
    assert "for structured mode" in conversion.left["ebft.embed_method"]
    assert "without TRL" in conversion.left["trl.beta"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rl": "grpo"}, "rl: 'grpo' is not EBFT"),
        ({}, "rl: None is not EBFT"),
        ({"rl": "ebft", "ebft": {"mode": "fast"}}, "ebft.mode is 'fast'"),
        ({"rl": "ebft", "trl": [1]}, "trl must hold"),
    ],
)
def test_other_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_axolotl(config)


def test_every_option_written_exists() -> None:
    """In the script's groups or in the configuration of the mode."""
    pytest.importorskip("trl")
    from hf_ebft.structured import EBFTGRPOConfig

    def names(*classes: Any) -> set[str]:
        return {field.name for kind in classes for field in dataclasses.fields(kind)}

    groups = names(
        DataArguments,
        ModelArguments,
        LoraArguments,
        ReportArguments,
    )
    both = names(EBFTConfig) & names(EBFTGRPOConfig)
    assert set(SAME.values()) | set(EBFT_SAME) <= groups | both
    assert set(EBFT_STRIDED) <= names(EBFTConfig)
    structured = {*EBFT_STRUCTURED, *TRL_SAME, *VLLM_SAME.values()}
    assert structured <= names(EBFTGRPOConfig)


def test_an_empty_conversion_is_still_a_file() -> None:
    assert to_yaml(Conversion(), "a.yaml") == "# Converted from a.yaml.\n{}\n"
