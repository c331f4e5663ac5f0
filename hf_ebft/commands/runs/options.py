"""The options of `hf-ebft train`: their groups, and how a file and the command line are read."""

from __future__ import annotations

import difflib
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import yaml
from transformers import HfArgumentParser

from hf_ebft import EBFTConfig
from hf_ebft.conversion.checking import as_arguments
from hf_ebft.data import TRANSFORMS

EXAMPLES = Path(__file__).parents[3] / "examples"
DEMO_CONFIG = EXAMPLES / "configs" / "demo.yaml"
# Prefixes of data sets that come with Python.
STDLIB = "stdlib:"
STDLIB_FUNCTIONS = "stdlib-functions:"
Mode = Literal["strided", "structured"]
# The columns that, beside `prompt`, make a data set one for structured mode. A `prompt` with a
# `completion` has always been read as text of which only the completion is learned.
GROUND_TRUTHS = ("ground_truth", "answer")


@dataclass
class DataArguments:
    """What text to train on."""

    _argument_group_name = "data"

    config: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with any of these options, by the same names. The command line wins."
        },
    )
    mode: Mode | None = field(
        default=None,
        metadata={
            "help": "'strided' for text, 'structured' for prompts with ground truths (needs TRL). "
            "Default: 'structured' where the dataset has 'prompt' with 'ground_truth' or 'answer', "
            "else 'strided'."
        },
    )
    dataset_name_or_path: str = field(
        default=STDLIB + "topics",
        metadata={
            "help": "A .txt, .md or .py file, a folder of them, a .jsonl, .json or .parquet file, "
            "a dataset's name on the hub, 'stdlib:' and a domain of hf_ebft.data.stdlib_text "
            "(text that comes with Python), or 'stdlib-functions:' and such a domain (its "
            "functions: heads with bodies)."
        },
    )
    transform: str | None = field(
        default=None,
        metadata={
            "help": "What makes prompts and ground truths of the dataset's columns: "
            f"{', '.join(TRANSFORMS)} of hf_ebft.data. Default: the columns are used as they are."
        },
    )
    transform_args: str | None = field(
        default=None,
        metadata={
            "help": "Settings of the transform: a mapping in a config file, JSON on the command "
            "line."
        },
    )
    bad_rows: Literal["raise", "skip"] = field(
        default="raise",
        metadata={
            "help": "Rows that the transform cannot use: 'raise' an error, or 'skip' and count."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a hub dataset that has several."}
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the text. Default: 'prompt' with 'completion' if there are both "
            "(only completions are trained on then), else 'text', 'content' or 'code'."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Where the held-out text is. Default: in the training dataset."},
    )
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split with the held-out text. Default: 'report' for 'stdlib:', 'train' of "
            "eval_dataset_name_or_path if that is given, else eval_fraction of train_split."
        },
    )
    eval_fraction: float = field(
        default=0.05,
        metadata={
            "help": "Share of the training documents that is held out where no other held-out text "
            "is named. 0: none, for which report_rows must be 0 too."
        },
    )
    sequence_len: int = field(default=512, metadata={"help": "Most tokens of a row of text."})
    pack: bool = field(
        default=False,
        metadata={
            "help": "Put several short documents into one row for training; they do not see each "
            "other. Held-out text is never packed."
        },
    )
    keep_short: bool = field(
        default=False,
        metadata={
            "help": "Keep pieces of text too short for a block, to train by cross-entropy only "
            "(ce_coef). Default: drop them. Both are counted."
        },
    )
    max_train_rows: int | None = field(
        default=None,
        metadata={"help": "Train on at most so many rows, of documents chosen at random."},
    )
    max_eval_rows: int | None = field(
        default=None,
        metadata={"help": "Hold out at most so many rows, of as many documents as possible."},
    )


@dataclass
class ModelArguments:
    """What model to train."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default=str(EXAMPLES / "tiny_model"),
        metadata={"help": "Model to train: a hub name or a folder. Default: the small one here."},
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a model on the hub."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not with the model."}
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "Name of a GGUF file in the model's folder (needs gguf)."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={
            "help": "Type of the weights; 'auto' is that of the checkpoint. On GPUs, float32 with "
            "--bf16 is mixed precision."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention to load the model with; see packed_attention, too."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that comes with a checkpoint."}
    )


@dataclass
class StructuredModelArguments(ModelArguments):
    """What model to train; TRL's configuration has an option of the group's itself."""

    trust_remote_code: bool = field(default=False, init=False)


@dataclass
class LoraArguments:
    """Adapters instead of full fine-tuning."""

    _argument_group_name = "LoRA"

    use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters; the model itself stays as it is."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(
        default=32, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the adapters, in the training pass only."}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={
            "help": "Names of the modules that get adapters, one regular expression for their full "
            "names, or 'all-linear'."
        },
    )
    lora_merge: bool = field(
        default=False,
        metadata={"help": "Save the whole model with the adapters merged in, not the adapters."},
    )


@dataclass
class ReportArguments:
    """What is measured on held-out text before and after training."""

    _argument_group_name = "report"

    report_rows: int = field(
        default=64,
        metadata={"help": "Rows of held-out text to measure, of many documents. 0: no report."},
    )
    report_stride: int | None = field(
        default=None, metadata={"help": "Tokens between blocks there. Default: stride."}
    )
    report_n_samples: int | None = field(
        default=None,
        metadata={
            "help": "Rollouts in a group there. Default: n_samples_per_prompt, with which "
            "alignment as rewarded is on the scale of the training curves."
        },
    )
    report_draws: int = field(
        default=2, metadata={"help": "Groups of rollouts for each block, averaged: less noise."}
    )
    report_samples: int = field(
        default=3, metadata={"help": "How many rollouts to print before and after."}
    )
    report_sample_len: int = field(default=24, metadata={"help": "Tokens of these."})


class Parser(HfArgumentParser):
    """Takes whole option names only, and keeps 200 options of usage out of error messages."""

    def __init__(self, mode: Mode = "strided") -> None:
        self.mode = mode
        model: Any = ModelArguments
        config: Any = EBFTConfig
        if mode == "structured":
            from hf_ebft.structured import EBFTGRPOConfig

            model, config = StructuredModelArguments, EBFTGRPOConfig
        groups: Any = (DataArguments, model, LoraArguments, ReportArguments, config)
        super().__init__(
            groups,
            prog="hf-ebft train",
            description="Fine-tune a causal language model by matching features of its rollouts.",
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Exit with the message."""
        self.exit(2, f"{self.prog}: error: {message}\n--help explains every option.\n")

    def refuse_unknown(self, names: Iterable[str], where: str) -> None:
        """Exit if one of the names is no option, with the names that it may have been meant for."""
        known = {action.dest for action in self._actions}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                hint = f"; did you mean {' or '.join(near)}?" if near else "."
                other = get_args(Mode)[self.mode == "strided"]
                self.error(
                    f"{where}: there is no option {name!r}{hint} (Options of {self.mode} mode; "
                    f"--mode {other} has others.)"
                )


def early_options(argv: Sequence[str]) -> tuple[str, dict[str, Any], Mode | None]:
    """The file that `--config` names, what it holds, and the mode if one of the two gives it."""
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=None if argv else str(DEMO_CONFIG))
    finder.add_argument("--mode")
    early = finder.parse_known_args(argv)[0]
    options = {} if early.config is None else file_options(early.config, finder)
    mode = early.mode or options.get("mode")
    if mode is not None and mode not in get_args(Mode):
        finder.exit(2, f"error: mode={mode!r} is unknown; choose {' or '.join(get_args(Mode))}.\n")
    return str(early.config), options, mode


def parse_arguments(
    argv: Sequence[str], mode: Mode | None = None
) -> tuple[DataArguments, ModelArguments, LoraArguments, ReportArguments, Any]:
    """Options from the file that `--config` names and from the command line, which wins.

    Without any option it is the demo.

    Args:
        argv: the command line.
        mode: whose options there are. Default: as file or command line say, else strided.

    Returns:
        The four groups above, and an `EBFTConfig` or `EBFTGRPOConfig`.
    """
    path, options, said = early_options(argv)
    parser = Parser(mode or said or "strided")
    parser.refuse_unknown(map(str, options), path)
    if "config" in options:
        parser.error(f"--config {path} names another config file; put all options into one.")
    from_file = as_arguments(options)
    *groups, unread = parser.parse_args_into_dataclasses(
        [*from_file, *argv], return_remaining_strings=True, look_for_args_file=False
    )
    names = [text[2:].partition("=")[0] for text in unread if text.startswith("--")]
    parser.refuse_unknown((name.replace("-", "_") for name in names), "command line")
    if unread:
        parser.error(f"command line: {' '.join(unread)!r} belongs to no option.")
    data, model, lora, report, args = groups
    data.mode = parser.mode
    if parser.mode == "structured":
        model.trust_remote_code = args.trust_remote_code
    return data, model, lora, report, args


def file_options(path: str, parser: ArgumentParser) -> dict[str, Any]:
    """The options of a YAML file."""
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.exit(2, f"{parser.prog}: error: --config {path} cannot be read: {error}\n")
    if not isinstance(options, dict):
        parser.exit(
            2,
            f"{parser.prog}: error: --config {path} must hold lines of the form 'option: value'.\n",
        )
    return options


def check(names: ModelArguments, lora: LoraArguments, report: ReportArguments) -> None:
    """Refuse combinations that would only fail, or be ignored, after training."""
    if lora.lora_merge and not lora.use_peft:
        raise ValueError("lora_merge=True has nothing to merge; add use_peft, or drop lora_merge.")
    for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
        value = getattr(lora, name)
        if not lora.use_peft and value != getattr(LoraArguments(), name):
            raise ValueError(
                f"{name}={value!r} would have no effect without adapters: add use_peft, or drop "
                f"{name} to train all weights."
            )
    if lora.use_peft and names.gguf_file and not lora.lora_merge:
        raise ValueError(
            f"Adapters of a model from a GGUF file ({names.gguf_file}) cannot be loaded by "
            "AutoModelForCausalLM, which would look for the model without gguf_file; add "
            "lora_merge."
        )
    for name, least in (("report_rows", 0), ("report_samples", 0), ("report_sample_len", 1)):
        if getattr(report, name) < least:
            raise ValueError(f"{name}={getattr(report, name)} must be at least {least}.")
