"""The example configurations: all can be read, and those that need no download can be run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("trl")

from hf_ebft import EBFTConfig
from hf_ebft.commands import train
from hf_ebft.commands.runs import structured
from hf_ebft.commands.runs.parsing import check, parse_arguments
from hf_ebft.data import TRANSFORMS
from hf_ebft.structured import EBFTGRPOConfig

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))

# A row of the data set that each configuration names.
ROWS: dict[str, dict[str, Any]] = {
    "nvidia/OpenCodeInstruct": {"input": "Add two numbers.", "output": "def add(a, b): ..."},
    "haoranxu/ALMA-Human-Parallel": {"translation": {"de": "Hallo", "en": "Hello"}},
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_can_be_read(path: Path) -> None:
    """Into the classes that a run uses, which check values and combinations."""
    data, names, lora, report, args = parse_arguments([f"--config={path}"])
    check(names, lora, report)
    written = yaml.safe_load(path.read_text())
    is_structured = written.get("mode") == "structured"
    assert type(args) is (EBFTGRPOConfig if is_structured else EBFTConfig)
    if is_structured:
        structured.refuse_strided_options(data, report)
    values = {k: v for group in (data, names, lora, report, args) for k, v in vars(group).items()}
    for name, value in written.items():
        if not isinstance(value, (dict, list)) and name != "report_to":
            assert values[name] in (value, [value]), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_transforms_of_configurations_fit_their_data(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    if "transform" not in written:
        assert "transform_args" not in written
        return
    row = ROWS[written["dataset_name_or_path"]]
    made = TRANSFORMS[written["transform"]](row, 0, **written["transform_args"])
    assert made["ground_truth"].strip() in (str(row["output"]) if "output" in row else "Hello")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_comments_of_a_configuration_name_its_own_file(path: Path) -> None:
    """The commands in its comments use this configuration, and folders that exist."""
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    words = [word.strip(".,;") for line in comments for word in line.split()]
    for word in words:
        if word.startswith(("examples/", "accelerate_configs/")):
            assert (ROOT / word).exists(), word
        if word.startswith("examples/configs/"):
            assert ROOT / word == path


def run(config: str, output: Path, **changed: Any) -> dict[str, Any]:
    """Run a configuration with some options changed, and return the numbers of its report."""
    arguments = [f"--config={EXAMPLES / 'configs' / config}", f"--output_dir={output}"]
    train.main([*arguments, *(f"--{name}={value}" for name, value in changed.items())])
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


SMALL = {
    "dataset_name_or_path": "stdlib-functions:encodings",
    "max_steps": 1,
    "max_train_rows": 16,
    "max_eval_rows": 8,
    "report_rows": 8,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "report_to": "none",
}


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ("functions_tiny.yaml", {"max_completion_length": 8}),
        ("functions_tiny_strided.yaml", {"report_samples": 0}),
    ],
)
def test_offline_configurations_run(config: str, changed: Any, tmp_path: Path) -> None:
    """One step of each, on a few rows."""
    measurements = run(config, tmp_path, **SMALL, **changed)
    assert {"cfm_loss", "alignment"} <= measurements.keys()
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_structured_training_lowers_the_cfm_loss(tmp_path: Path) -> None:
    """The whole run: alignment up and CFM loss down on held-out prompts, beyond the noise."""
    measurements = run("functions_tiny.yaml", tmp_path)
    assert measurements["cfm_loss"]["high"] < 0 < measurements["alignment"]["low"]


@pytest.mark.slow
def test_strided_training_on_functions_runs(tmp_path: Path) -> None:
    measurements = run("functions_tiny_strided.yaml", tmp_path)
    assert measurements["cfm_loss"]["n_documents"] > 0


def train_tiny(tmp_path: Path, rows: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    """Two steps of structured mode on the small model with a chat template; its last log."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data, model = tmp_path / "data.jsonl", tmp_path / "model"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny_model")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(model)
    AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny_model").save_pretrained(model)
    options = SMALL | {"max_steps": 2, "report_rows": 0, "logging_steps": 1, "use_cpu": "true"}
    options |= {"num_generations": 4, "max_completion_length": 6, "bf16": "false"}
    options |= {"dataset_name_or_path": data, "model_name_or_path": model, "save_steps": 2}
    options |= {"output_dir": tmp_path / "out"} | changed
    train.main([f"--{name}={value}" for name, value in options.items()])
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    log: dict[str, Any] = state["log_history"][1]
    return log


def test_chats_of_several_turns_are_trained(tmp_path: Path) -> None:
    """From ShareGPT's columns to a training step in which later turns follow earlier ones."""
    chats = [
        [("human", f"Say {n}"), ("gpt", f"{n}"), ("human", "Again"), ("gpt", f"{n} and {n}")]
        for n in range(8)
    ]
    rows = [{"conversations": [{"from": a, "value": b} for a, b in chat]} for chat in chats]
    settings = json.dumps({"messages_column": "conversations", "turn": "all"})
    log = train_tiny(tmp_path, rows, transform="chat", transform_args=settings)
    # Two replies of at most 6 tokens, and nothing else, count as the completion.
    assert 2 <= log["completions/mean_length"] <= 12
    assert log["ebft/alignment"] != 0


def test_thinking_can_be_kept_out_of_features(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{n} + 1 =", "ground_truth": f"<think>one more</think>{n + 1}"}
        for n in range(8)
    ]
    changed = {"transform": "reasoning", "transform_args": json.dumps({"thinking": "strip"})}
    assert train_tiny(tmp_path, rows, **changed)["ebft/without_answer"] == 0


# ---- What structured mode refuses ---------------------------------------------------------------


def structured_run(tmp_path: Path, *arguments: str) -> None:
    train.main(
        ["--mode=structured", f"--output_dir={tmp_path}", "--use_cpu", "--bf16=false", *arguments]
    )


def test_options_of_the_other_mode_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no option 'stride'.*--mode strided has others"):
        structured_run(tmp_path, "--stride=4")
    with pytest.raises(ValueError, match="sequence_len=64 is for strided mode"):
        structured_run(tmp_path, "--sequence_len=64")
    with pytest.raises(ValueError, match="report_draws=1 is for strided mode"):
        structured_run(tmp_path, "--report_draws=1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has no column 'prompt', only 'text'"),
        ({"prompt": "a", "solution": "b"}, r"None of the columns \['prompt', 'solution'\]"),
        ({"prompt": "a", "ground_truth": " "}, "4 of 4 rows have no prompt or no ground truth"),
    ],
)
def test_data_without_ground_truths_is_refused(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    with pytest.raises(ValueError, match=message):
        structured_run(tmp_path, f"--dataset_name_or_path={path}", "--eval_fraction=0.5")


def test_fewer_prompts_than_a_batch_are_refused(tmp_path: Path) -> None:
    """TRL would train on none of them, and the command would report success."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "ground_truth": "b"}\n' * 7)
    arguments = [f"--dataset_name_or_path={path}", "--eval_fraction=0.5", "--num_generations=4"]
    arguments += ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=5"]
    with pytest.raises(ValueError, match="has 4 prompts, but one generation batch needs 5"):
        structured_run(tmp_path, *arguments)


def test_one_held_out_prompt_is_refused_before_training(tmp_path: Path) -> None:
    """One row gives no interval. Once, this error came after training."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "ground_truth": "b"}\n' * 10)
    arguments = [f"--dataset_name_or_path={path}", "--num_generations=4"]
    arguments += ["--per_device_train_batch_size=4", "--per_device_eval_batch_size=4"]
    with pytest.raises(
        ValueError, match=r"leaves 1 held-out row .*needs at least 2.*report_rows=0"
    ):
        structured_run(tmp_path, *arguments)
    assert not (tmp_path / "config.json").exists() and not list(tmp_path.rglob("*.safetensors"))


def test_the_column_of_ground_truths_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{n}", "solution": f"{n + 1}", "n": n} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"--dataset_name_or_path={path}", "--ground_truth_column=solution"]
    arguments += ["--mode=structured", "--use_cpu", "--bf16=false", "--eval_fraction=0.5"]
    groups = parse_arguments(arguments)
    train, held_out = structured.load_prompts(groups[0], groups[4], wants_eval=True)
    assert list(train)[1] == {"prompt": "2", "ground_truth": "3"}
    assert held_out is not None and len(train) == len(held_out) == 3


def test_chats_of_several_turns_get_their_own_rollout_function() -> None:
    import datasets

    groups = parse_arguments(["--mode=structured", "--use_cpu", "--bf16=false"])
    chats = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "a"}], "ground_truth": ["b"]}]
    )
    pairs = datasets.Dataset.from_list([{"prompt": "a", "ground_truth": "b"}])
    rollouts = structured.rollouts_for(chats, groups[4])
    assert isinstance(rollouts, structured.MultiTurnRollouts)
    assert structured.rollouts_for(pairs, groups[4]) is None
