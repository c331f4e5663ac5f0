"""The command line of `hf-ebft train`: options, refusals, and whole small runs."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_ebft import EBFTTrainer
from hf_ebft.commands.runs import strided
from hf_ebft.commands.runs.adapters import lora_config
from hf_ebft.commands.runs.help import FIRST
from hf_ebft.commands.runs.model import load_model, load_tokenizer
from hf_ebft.commands.runs.options import Mode, ModelArguments
from hf_ebft.commands.runs.parsing import Parser, parse_arguments
from hf_ebft.commands.train import announce_defaults, choose_mode, main
from hf_ebft.evaluation import DOCUMENT_METRICS
from tests.support.tiny import config, source_text, texts, tiny_llama, tiny_tokenizer

datasets = pytest.importorskip("datasets")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

VOCABULARY = 300
PAIRS = [
    {"prompt": f"{a} + {b} =", "completion": f" {a + b}, which is the sum of {a} and {b}."}
    for a in range(6)
    for b in range(6)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama with a byte-level tokenizer, for `from_pretrained`."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer(VOCABULARY, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    tiny_llama(vocabulary=VOCABULARY).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "source.txt"
    path.write_text("\n\n".join(source_text())[:6000], encoding="utf-8")
    return str(path)


def table(path: Path, records: Sequence[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(list(records)).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def options(model: str, data: str, output: Path, **changed: Any) -> dict[str, Any]:
    """The options of a run of two steps."""
    return {
        "model_name_or_path": model,
        "dataset_name_or_path": data,
        "output_dir": str(output),
        "use_cpu": True,
        "sequence_len": 32,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,  # one step of a warm-up would change nothing
        "verify_packing": False,
        "report_rows": 4,
        "report_draws": 1,
        "max_eval_rows": 4,
    } | changed


def argv(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={str(value).lower() if value is True or value is False else value}"
            for name, value in options.items()]  # fmt: skip


def tags(output: Path) -> dict[str, list[float]]:
    """TensorBoard's curves: tag -> values in the order of the steps."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = output.glob("runs/*/events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_trained(output: Path, start: str) -> LlamaForCausalLM:
    """The saved model can be loaded and run, and training has changed its weights."""
    model = AutoModelForCausalLM.from_pretrained(output)
    old = AutoModelForCausalLM.from_pretrained(start)
    assert any(
        not torch.equal(new, was)
        for new, was in zip(model.parameters(), old.parameters(), strict=True)
    )
    ids = AutoTokenizer.from_pretrained(output)("import os", return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=ids).logits).all()
    return model


# ---- Whole runs -----------------------------------------------------------------------------


def test_a_text_file(
    tmp_path: Path, model_folder: str, text_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    changed = {"ce_coef": 0.03, "report_to": "tensorboard", "eval_strategy": "steps"}
    changed |= {"eval_steps": 1, "eval_fraction": 0.2}
    main(argv(options(model_folder, text_file, output, **changed)))

    assert_trained(output, model_folder)
    curves = tags(output)
    names = {"alignment", "diversity", "mean_reward", "cfm_loss", "advantages_std"}
    assert {f"train/ebft/{name}" for name in names | {"rl_loss", "ce_loss"}} <= curves.keys()
    assert {f"eval/ebft/{name}" for name in names} | {"eval/loss"} <= curves.keys()
    for tag in ("train/ebft/cfm_loss", "eval/ebft/cfm_loss"):
        assert len(curves[tag]) == 2 and all(map(math.isfinite, curves[tag]))

    figures = json.loads((output / "report.json").read_text())
    assert figures.keys() == DOCUMENT_METRICS.keys()
    for paired in figures.values():
        assert paired["difference"] == pytest.approx(paired["after"] - paired["before"])
        assert paired["low"] <= paired["difference"] <= paired["high"]
        assert paired["n_documents"] == 4
    assert figures["cross_entropy"]["difference"] != 0

    printed = capsys.readouterr().out
    assert "1 documents -> " in printed
    assert "4 rows of 1 documents" in printed and "bootstrap over rows" in printed
    assert f"{figures['cfm_loss']['before']:.4f}" in printed
    assert printed.count("prefix | ") == printed.count("after | ") == 3
    assert f"tensorboard --logdir {output}" in printed
    assert f"The model is in {output}" in printed
    assert "'ebft/" not in printed  # no raw dictionaries


def test_prompts_with_completions(
    tmp_path: Path, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    data = table(tmp_path / "sums.jsonl", PAIRS)
    changed = {"eval_fraction": 0.25, "sequence_len": 64, "min_completion_prefix": 2}
    main(argv(options(model_folder, data, output, **changed)))
    assert_trained(output, model_folder)
    assert "4 rows of 4 documents" in capsys.readouterr().out


def test_a_parquet_file_and_options_from_a_file(tmp_path: Path, model_folder: str) -> None:
    """Options of the command line win, whatever the order."""
    output = tmp_path / "out"
    data = table(tmp_path / "code.parquet", [{"code": text} for text in source_text()])
    config = tmp_path / "run.yaml"
    settings = options(model_folder, data, tmp_path / "elsewhere", max_steps=50, pack=True)
    settings |= {"text_column": "code", "report_rows": 0, "feature_layers": [0.5, 1.0]}
    config.write_text(yaml.safe_dump(settings))
    main([f"--output_dir={output}", "--config", str(config), "--max_steps", "1"])
    assert_trained(output, model_folder)
    assert not (tmp_path / "elsewhere").exists()
    assert not (output / "report.json").exists()


@pytest.mark.parametrize("merge", [False, True])
def test_adapters(tmp_path: Path, model_folder: str, text_file: str, merge: bool) -> None:
    output = tmp_path / "out"
    changed = {"use_peft": True, "lora_r": 2, "lora_merge": merge, "report_rows": 0}
    main(argv(options(model_folder, text_file, output, **changed)))
    assert (output / "adapter_config.json").exists() == (not merge)
    assert (output / "config.json").exists() == merge
    if merge:
        assert_trained(output, model_folder)
    else:
        adapted = AutoModelForCausalLM.from_pretrained(output)
        weights = dict(adapted.named_parameters())
        assert any(w.abs().sum() > 0 for name, w in weights.items() if "lora_B" in name)


def adapted(tmp_path: Path, *modules: str, file: str | None = None) -> set[str]:
    """Names of the modules that get adapters with the given options."""
    argument = ["--lora_target_modules", *modules]
    if file is not None:
        argument = [config_file(tmp_path, f"lora_target_modules: {file}\n")]
    lora = parse_arguments(["--use_peft", "--mode=strided", *argument])[2]
    model = tiny_llama()
    config_ = lora_config(lora, model)
    names = {name for name, _ in get_peft_model(model, config_).named_parameters()}
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        for name in names
        if "lora_A" in name
    }


def test_adapters_by_name_or_by_regular_expression(tmp_path: Path) -> None:
    first = {f"model.layers.0.self_attn.{name}_proj" for name in "qv"}
    everywhere = {name.replace("0", str(layer)) for name in first for layer in range(2)}
    pattern = r".*layers\.0\..*(q|v)_proj"
    assert adapted(tmp_path, "q_proj", "v_proj") == everywhere
    assert adapted(tmp_path, file="[q_proj, v_proj]") == everywhere
    assert adapted(tmp_path, pattern) == first
    assert adapted(tmp_path, file=f"'{pattern}'") == first
    assert adapted(tmp_path, file=f"['{pattern}']") == first
    assert adapted(tmp_path, "layers.0.self_attn.q_proj") == {"model.layers.0.self_attn.q_proj"}
    assert adapted(tmp_path, file="lm_head") == {"lm_head"}
    assert len(adapted(tmp_path, "all-linear")) == 2 * 7


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["q_proj", "query"], "the name 'query' matches no module .* end in q_proj, k_proj"),
        ([".*query"], r"the regular expression '\.\*query' matches no module .*a full name is"),
        (["proj"], "the name 'proj' matches no module"),
        (["(q_proj"], r"lora_target_modules='\(q_proj' is neither .* a valid regular expression"),
        ([".*q_proj", "v_proj"], r"the name '\.\*q_proj' matches no module"),
    ],
)
def test_names_of_missing_modules_are_refused(
    tmp_path: Path, modules: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(tmp_path, *modules)


@pytest.mark.slow
def test_two_processes_under_accelerate_launch(
    tmp_path: Path, model_folder: str, text_file: str
) -> None:
    """One report, one set of curves, one model: only the main process prints."""
    output = tmp_path / "out"
    changed = {"report_to": "tensorboard", "disable_tqdm": True, "eval_fraction": 0.2}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command += ["--main_process_port=0", "-m", "hf_ebft", "train"]
    command += argv(options(model_folder, text_file, output, **changed))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_trained(output, model_folder)
    assert done.stdout.count("The model is in") == 1
    assert done.stdout.count("Training text") == 1
    assert len(tags(output)["train/ebft/cfm_loss"]) == 2


@pytest.mark.parametrize("card_samples", [0, 1])
def test_card_samples_limits_the_text_that_the_card_quotes(
    tmp_path: Path, model_folder: str, text_file: str, card_samples: int
) -> None:
    output = tmp_path / "out"
    run = options(model_folder, text_file, output, report_rows=0, max_steps=1)
    main(argv(run | {"card_samples": card_samples}))
    card = (output / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^truth    ", card, flags=re.MULTILINE)) == card_samples


class FullDisk(OSError):
    """No space left."""


@pytest.mark.parametrize("fails", ["save_model", "create_model_card", "measure"])
def test_a_step_that_fails_after_training_does_not_stop_the_others(
    tmp_path: Path,
    model_folder: str,
    text_file: str,
    fails: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a full disk the table is still printed, without the card the model is still saved."""
    output = tmp_path / "out"
    calls = []

    def fail(*_: Any, **__: Any) -> None:
        raise FullDisk(28, "No space left on device")

    def measure(comparison: Any) -> None:
        calls.append(comparison)
        fail() if len(calls) == 2 else original(comparison)

    original = strided.Comparison.measure
    if fails == "measure":
        monkeypatch.setattr(strided.Comparison, "measure", measure)
    else:
        monkeypatch.setattr(EBFTTrainer, fails, fail)
    ended = []
    monkeypatch.setattr("accelerate.Accelerator.end_training", lambda self: ended.append(self))
    run = options(model_folder, text_file, output, max_steps=1, eval_fraction=0.2)
    with pytest.raises(FullDisk):
        main(argv(run))
    printed = capsys.readouterr()
    assert ("before and after training" in printed.out) == (fails != "measure")
    assert (output / "report.json").exists() == (fails != "measure")
    assert (output / "model.safetensors").exists() == (fails != "save_model")
    assert (f"The model is in {output}" in printed.out) == (fails != "save_model")
    assert (output / "trainer_state.json").exists()
    assert len(ended) == 1


def test_a_run_resumes_from_the_newest_checkpoint(
    tmp_path: Path, model_folder: str, text_file: str
) -> None:
    output = tmp_path / "out"
    run = options(model_folder, text_file, output, report_rows=0, save_strategy="steps")
    run |= {"save_steps": 1}
    resumed = argv(run | {"max_steps": 2, "resume_from_checkpoint": "true"})
    with pytest.raises(ValueError, match=r"finds no checkpoint in .*out; name the folder"):
        main(resumed)
    main(argv(run | {"max_steps": 1}))
    main(resumed)
    state = json.loads((output / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]
    assert not (output / "checkpoint-2" / "checkpoint-1").exists()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=gone is not a folder"):
        main(argv(run | {"resume_from_checkpoint": "gone"}))


# ---- Options --------------------------------------------------------------------------------


def parse(*arguments: str) -> tuple[Any, ...]:
    return parse_arguments(arguments)


def config_file(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return f"--config={path}"


def test_a_file_and_the_command_line_give_the_same_options(tmp_path: Path) -> None:
    file = config_file(
        tmp_path,
        "learning_rate: 3e-4\n"  # a string to YAML
        "max_steps: -1\n"
        "use_whitening: false\n"
        "document_masking: true\n"
        "feature_layers: [0.5, 1.0]\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\n"
        "run_name: '--odd name'\n"
        "eval_split:\n"
        "stride: 4\n"
        f"output_dir: {tmp_path}\n",
    )
    words = (
        "--learning_rate 3e-4 --max_steps -1 --no_use_whitening --document_masking true "
        f"--stride 4 --feature_layers 0.5 1.0 --output_dir {tmp_path}"
    ).split()
    words += ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--run_name=--odd name"]
    from_file, from_line = parse(file), parse(*words)
    assert from_file[1:4] == from_line[1:4]
    from_file[0].config = None
    assert from_file[0] == from_line[0]
    assert from_file[4].to_dict() == from_line[4].to_dict()
    args = from_file[4]
    assert (args.learning_rate, args.max_steps, args.stride) == (3e-4, -1, 4)
    assert (args.use_whitening, args.document_masking) == (False, True)
    assert (args.feature_layers, args.run_name) == ([0.5, 1.0], "--odd name")
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize("first", ["file", "line"])
def test_the_command_line_wins(tmp_path: Path, first: str) -> None:
    file = config_file(
        tmp_path, "stride: 4\nuse_whitening: false\nfeature_layers: [0.1]\ntemperature: 0.9\n"
    )
    line = ["--stride=2", "--use_whitening", "--feature_layers", "0.5", "1"]
    args = parse(*([file, *line] if first == "file" else [*line, file]))[4]
    assert (args.stride, args.use_whitening, args.feature_layers) == (2, True, [0.5, 1.0])
    assert args.temperature == 0.9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "no option 'learning_rat'; did you mean learning_rate"),
        ("n_samples: 4", "did you mean .*n_samples_per_prompt"),
        ("qqq: 4", "no option 'qqq'."),
        ("stride: many", "argument --stride.*invalid int value: 'many'"),
        ("embed_method: mean", "invalid choice: 'mean'"),
        ("stride: [1, 2]", "'2' belongs to no option"),
        ("just words", "write lines of the form 'option: value'"),
        ("stride: 4\nn: {a: [", "line 2 is not valid YAML"),
        ("stride: 4\nce_coef: 0\nstride: 8", "line 3: 'stride' is given a second time .*line 1"),
        ("config: other.yaml", "names another config file"),
    ],
)
def test_files_with_mistakes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse(config_file(tmp_path, text))
    assert len(str(error.value).splitlines()) < 4, "usage of all options hides the message"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat=1"], "no option 'learning_rat'; did you mean learning_rate"),
        (["--sequence-length", "5"], "no option 'sequence_length'; did you mean .*sequence_len"),
        (["--learn", "1"], "no option 'learn'"),  # no abbreviations: they change with new options
        (["data.txt"], "'data.txt' belongs to no option"),
        # The misspelt option is the cause: ce_coef_schedule alone would ask for ce_coef_final.
        (["--ce_coef_schedule=linear", "--ce_coef_end=0"], "no option 'ce_coef_end'"),
    ],
)
def test_command_lines_with_mistakes_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*arguments)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        parse("--config=missing.yaml")


def test_settings_that_the_library_refuses_are_errors() -> None:
    with pytest.raises(ValueError, match="n_samples_per_prompt=1 leaves"):
        parse("--n_samples_per_prompt=1")


def test_every_option_is_explained() -> None:
    actions = Parser()._actions
    assert len(actions) > 150
    unexplained = [action.dest for action in actions if not (action.help or "").strip()]
    assert unexplained == []


@pytest.mark.parametrize("mode", ["strided", "structured"])
def test_help_is_short_and_help_all_is_complete(
    mode: Mode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "structured":
        pytest.importorskip("trl")
    monkeypatch.setenv("COLUMNS", "100")
    main(["--help", f"--mode={mode}"])
    brief = capsys.readouterr().out
    assert len(brief.splitlines()) < 60 and max(map(len, brief.splitlines())) <= 100
    assert "Mode:" not in brief  # nothing is opened before
    for name in ("dataset_name_or_path", "output_dir", "learning_rate", "ce_coef"):
        assert f"  --{name} " in brief
    n_others = int(re.search(r"explains (\d+) more", brief)[1])  # type: ignore[index]
    main(["--help-all", f"--mode={mode}"])
    complete = capsys.readouterr().out
    named = re.findall(r"^  --(\w+)", complete, flags=re.MULTILINE)
    wanted = {action.dest for action in Parser(mode)._actions} - {"help"}
    assert len(named) == len(set(named)) and set(named) == wanted
    assert len(named) == n_others + sum(map(len, FIRST[mode].values()))
    assert max(map(len, complete.splitlines())) <= 100
    assert "  --lora_target_modules" in complete and "[all-linear]" in complete


def test_default_data_and_the_default_model_are_announced(tmp_path: Path) -> None:
    no_data, no_model = "NO DATA WAS NAMED: training on stdlib:topics", "NO MODEL WAS NAMED"
    said = announce_defaults(["--max_steps=1"])
    assert said[0].startswith(no_data) and said[1].startswith(no_model) and len(said) == 2
    file = config_file(tmp_path, "model_name_or_path: m\n")
    assert [line.startswith(no_data) for line in announce_defaults([file])] == [True]
    assert announce_defaults([file, "--dataset-name-or-path", "d.txt"]) == []
    assert (
        announce_defaults([f"--config={EXAMPLES / 'configs' / 'demo.yaml'}", "--max_steps=2"]) == []
    )
    (without_options,) = announce_defaults([])
    assert without_options.startswith("NO OPTIONS WERE GIVEN: this is the demo")


def test_no_options_mean_the_demo() -> None:
    groups = parse()
    demo = yaml.safe_load((EXAMPLES / "configs" / "demo.yaml").read_text())
    values = {name: value for group in groups for name, value in vars(group).items()}
    assert values["max_steps"] == demo["max_steps"]
    assert values["model_name_or_path"] == str(EXAMPLES / "tiny_model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_merge"], "lora_merge=True has no adapters to merge"),
        (["--lora_r=8"], "lora_r=8 would have no effect without adapters: add use_peft"),
        (["--lora_target_modules=q_proj"], r"\['q_proj'\] would have no effect"),
        (["--use_peft", "--gguf_file=a.gguf"], "a.gguf.* add lora_merge"),
        (["--report_rows=-1"], "report_rows=-1 must be at least 0"),
        (["--report_sample_len=0"], "report_sample_len=0 must be at least 1"),
        (["--card_samples=-1"], "card_samples=-1 must be at least 0"),
    ],
)
def test_combinations_that_fail_late_are_refused_early(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(arguments)


# ---- Mode -------------------------------------------------------------------------------------

GOOD = {"prompt": "a", "ground_truth": "b"}


@pytest.mark.parametrize(
    ("record", "mode", "why"),
    [
        ({"text": "a"}, "strided", "the data has no prompts"),
        ({"code": "a", "id": 1}, "strided", "the data has no prompts"),
        (GOOD, "structured", "columns are 'prompt' and 'ground_truth'"),
        ({"prompt": "a", "answer": "b", "id": 1}, "structured", "'prompt' and 'answer'"),
        ({"prompt": "a", "completion": "b"}, "strided", "whole completions .* structured"),
    ],
)
def test_the_columns_of_the_data_decide_the_mode(
    tmp_path: Path, record: dict[str, Any], mode: str, why: str
) -> None:
    data = table(tmp_path / "data.jsonl", [record] * 3)
    chosen, reason, opened = choose_mode([f"--dataset_name_or_path={data}"])
    assert chosen == mode and re.search(why, reason) and opened is not None


def test_the_mode_is_printed(
    tmp_path: Path, model_folder: str, text_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = options(model_folder, text_file, tmp_path / "out", report_rows=0, max_steps=1)
    main(argv(run))
    assert "Mode: strided (the data has no prompts with ground truths)." in capsys.readouterr().out


def test_the_mode_is_printed_before_its_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`answer` chooses structured mode; an error about its batch sizes needs that context."""
    data = table(tmp_path / "data.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}] * 8)
    arguments = [f"--dataset_name_or_path={data}", f"--output_dir={tmp_path}", "--use_cpu"]
    with pytest.raises(ValueError, match="divisible"):
        main([*arguments, "--bf16=false", "--per_device_train_batch_size=3"])
    said = "Mode: structured (the columns are 'prompt' and 'answer')."
    assert said in capsys.readouterr().out


def test_data_is_not_opened_if_the_mode_is_set(tmp_path: Path) -> None:
    """The mode is set on the command line, which wins, or in the file."""
    file = config_file(tmp_path, "mode: structured\ndataset_name_or_path: missing.jsonl\n")
    assert choose_mode([file]) == ("structured", "as --mode says", None)
    assert choose_mode([file, "--mode=strided"])[0] == "strided"
    assert choose_mode([])[0] == "strided"
    text = ["--dataset_name_or_path=missing.jsonl", "--text_column=body"]
    assert choose_mode(text) == ("strided", "the text is in the column 'body'", None)


def test_contradictory_columns_are_refused(tmp_path: Path) -> None:
    data = table(tmp_path / "data.jsonl", [GOOD | {"text": "c"}] * 3)
    with pytest.raises(ValueError, match="choose with --mode structured or"):
        choose_mode([f"--dataset_name_or_path={data}"])


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode='chunked' is unknown; choose strided or structured"):
        main(["--mode=chunked"])


def test_strided_mode_does_not_need_trl(tmp_path: Path, model_folder: str, text_file: str) -> None:
    run = options(model_folder, text_file, tmp_path / "out", report_rows=0, max_steps=1)
    program = (
        "import sys; sys.modules['trl'] = None\n"
        f"from hf_ebft.commands.train import main; main({argv(run)!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_transforms_make_rows_of_any_columns(tmp_path: Path, model_folder: str) -> None:
    """In strided mode: the ground truth is the completion to train on, and bad rows are counted."""
    rows = [{"q": f"{n} + 1 =", "a": f" {n + 1}, of course" if n % 4 else ""} for n in range(40)]
    data = table(tmp_path / "data.jsonl", rows)
    settings = {"question_column": "q", "answer_column": "a"}
    changed: dict[str, Any] = {"transform": "question_answer", "mode": "strided"}
    changed |= {"eval_fraction": 0.2, "transform_args": json.dumps(settings)}
    with pytest.raises(ValueError, match=r"question_answer: Row 0: column 'a' is blank"):
        rows_of(model_folder, data, tmp_path, **changed)
    train, held_out = rows_of(model_folder, data, tmp_path, bad_rows="skip", **changed)
    assert train.counts.documents + held_out.counts.documents == 30
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    row = train[0]
    learned = row["input_ids"][row["labels"] != -100]
    assert tokenizer.decode(learned) == " 2, of course<eos>"
    with pytest.raises(ValueError, match="transform='answers' is unknown; choose one of question"):
        rows_of(model_folder, data, tmp_path, transform="answers")
    with pytest.raises(ValueError, match="without a transform; set transform to one of"):
        rows_of(model_folder, data, tmp_path, transform_args='{"a": 1}')


# ---- Data and model ---------------------------------------------------------------------------


def rows_of(model_folder: str, data: str, tmp_path: Path, **changed: Any) -> tuple[Any, Any]:
    groups = parse(*argv(options(model_folder, data, tmp_path / "out", **changed)))
    tokenizer = load_tokenizer(groups[1], groups[4])
    return strided.load_rows(groups[0], tokenizer, groups[4], wants_eval=True)


def test_columns_and_splits_that_are_missing_are_named(tmp_path: Path, model_folder: str) -> None:
    data = table(tmp_path / "data.jsonl", [{"body": "abc"}] * 4)
    run = options(model_folder, data, tmp_path / "out")
    with pytest.raises(ValueError, match=r"neither a text column .* 'body'.*\(text_column\)"):
        main(argv(run))
    with pytest.raises(ValueError, match="no column 'title'; it has 'body'"):
        main(argv(run | {"text_column": "title"}))
    with pytest.raises(ValueError, match="split='validation'"):
        main(argv(run | {"text_column": "body", "eval_split": "validation"}))


def test_empty_data_is_refused(tmp_path: Path, model_folder: str) -> None:
    nothing = table(tmp_path / "nothing.jsonl", [])
    with pytest.raises(ValueError, match=r"nothing\.jsonl is empty"):
        main(argv(options(model_folder, nothing, tmp_path / "out")))
    blank = table(tmp_path / "blank.jsonl", [{"text": ""}] * 4)
    with pytest.raises(ValueError, match=r"No row of text is left .*3 empty documents"):
        main(argv(options(model_folder, blank, tmp_path / "out")))


def test_held_out_text_is_not_trained_on(tmp_path: Path, model_folder: str, text_file: str) -> None:
    run = options(model_folder, text_file, tmp_path / "out")
    with pytest.raises(ValueError, match=r"eval_split='train' .* is the split to train on"):
        main(argv(run | {"eval_split": "train"}))
    with pytest.raises(
        ValueError, match=r"eval_fraction=0 leaves no held-out text .* report_rows=0"
    ):
        main(argv(run | {"eval_fraction": 0}))
    with pytest.raises(ValueError, match=r"report_rows=1 leaves 1 held-out row .*needs at least 2"):
        main(argv(run | {"eval_fraction": 0.25, "report_rows": 1}))
    data = table(tmp_path / "data.jsonl", [{"text": f"{i} " * 20} for i in range(40)])
    train, held_out = rows_of(model_folder, data, tmp_path, eval_fraction=0.25, max_eval_rows=99)
    documents = [
        {tuple(rows[i]["input_ids"].tolist()) for i in range(len(rows))}
        for rows in (train, held_out)
    ]
    assert train.counts.documents == 30 and held_out.counts.documents == 10
    assert not documents[0] & documents[1]


def test_held_out_text_may_be_another_data_set(
    tmp_path: Path, model_folder: str, text_file: str
) -> None:
    data = table(tmp_path / "data.jsonl", [{"text": "import os\n" * 9}] * 3)
    train, held_out = rows_of(model_folder, text_file, tmp_path, eval_dataset_name_or_path=data)
    assert train.counts.documents == 1 and held_out.counts.documents == 3


def test_limited_rows_come_from_documents_all_over_the_data(
    tmp_path: Path, model_folder: str
) -> None:
    data = table(tmp_path / "data.jsonl", [{"text": f"{i} " * 16} for i in range(40)])
    train, held_out = rows_of(
        model_folder, data, tmp_path, eval_fraction=0.5, max_train_rows=6, max_eval_rows=5
    )
    assert (len(train), len(held_out)) == (6, 5)
    assert len({source for (source,) in held_out.sources}) == 5
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    numbers = [int(tokenizer.decode(train[i]["input_ids"]).split()[0]) for i in range(6)]
    assert max(numbers) > 20, "the first documents only"


def test_the_standard_library_s_text_has_splits_of_its_own(
    tmp_path: Path, model_folder: str
) -> None:
    train, held_out = rows_of(model_folder, "stdlib:topics", tmp_path, max_train_rows=20)
    assert len(train) == 20 and len(held_out) == 4
    with pytest.raises(ValueError, match="domain 'poems' does not exist"):
        rows_of(model_folder, "stdlib:poems", tmp_path)


def test_a_tokenizer_without_pad_token_pads_with_eos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer(eos_token="<eos>").save_pretrained(tmp_path / "eos")
    tiny_tokenizer().save_pretrained(tmp_path / "none")
    groups = parse(f"--tokenizer_name_or_path={tmp_path / 'eos'}", f"--output_dir={tmp_path}")
    assert load_tokenizer(groups[1], groups[4]).pad_token == "<eos>"
    assert "padded with '<eos>'" in capsys.readouterr().out
    groups[1].tokenizer_name_or_path = str(tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"tokenizer_name_or_path=.*none.*neither a pad nor an EOS"
    ):
        load_tokenizer(groups[1], groups[4])


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(tmp_path: Path) -> None:
    tiny_llama(vocabulary=20).save_pretrained(tmp_path)
    names = ModelArguments(model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"has 300 tokens, .* has embeddings for 20"):
        load_model(names, 300)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_weights_have_the_dtype_of_the_option(tmp_path: Path, dtype: str) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    names = ModelArguments(model_name_or_path=str(tmp_path), dtype=dtype)  # type: ignore[arg-type]
    expected = torch.float32 if dtype == "float32" else torch.bfloat16
    assert load_model(names, 20).dtype == expected


def write_gguf(path: Path) -> None:
    """A Llama of one layer in the format of llama.cpp, with 4-bit weights."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(64)
    shapes = {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}": (32, 32) for part in ("gate", "up", "down")}
    shapes |= {"token_embd": (64, 32), "output": (64, 32)}
    shapes |= {"output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        weight = generator.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weight)
        else:
            packed = gguf.quants.quantize(weight, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_from_a_gguf_file_can_be_trained(tmp_path: Path) -> None:
    """The weights are unpacked on loading, since packed weights have no gradient."""
    write_gguf(tmp_path / "tiny.gguf")
    names = ModelArguments(model_name_or_path=str(tmp_path), gguf_file="tiny.gguf")
    model = load_model(names, 64)
    assert model.dtype == torch.float32
    trainer = EBFTTrainer(model, config(tmp_path, max_steps=1), train_dataset=texts(20))
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.lm_head.weight, before)
