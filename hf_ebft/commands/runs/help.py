"""The help of `hf-ebft train`: the most used options, or all options in groups."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import TrainingArguments

from hf_ebft.commands.runs.options import (
    DataArguments,
    LoraArguments,
    Mode,
    ModelArguments,
    ReportArguments,
)

#: The options that most runs set, by group, for each mode.
FIRST: dict[Mode, dict[str, tuple[str, ...]]] = {
    "strided": {
        "data": ("config", "dataset_name_or_path", "sequence_len"),
        "model": ("model_name_or_path", "use_peft"),
        "training": ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate"),
        "EBFT": ("n_samples_per_prompt", "generate_max_len", "stride", "ce_coef"),
    },
    "structured": {
        "data": ("config", "dataset_name_or_path", "transform"),
        "model": ("model_name_or_path", "use_peft"),
        "training": ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate"),
        "EBFT": ("num_generations", "max_completion_length", "ce_coef"),
    },
}
#: An option with more choices than this does not list them.
MOST_CHOICES = 8
_NAME_WIDTH = 32


def first_options(actions: Iterable[Action], mode: Mode) -> str:
    """The options of `FIRST`, for the terminal.

    Args:
        actions: the options of the mode's parser.
        mode: the mode.
    """
    by_name = _by_name(actions)
    n_others = len(by_name) - sum(map(len, FIRST[mode].values()))
    other = "structured" if mode == "strided" else "strided"
    sections = [
        _section(title, [by_name[n] for n in names]) for title, names in FIRST[mode].items()
    ]
    return (
        "usage: hf-ebft train [--config FILE] [--option value ...]\n\n"
        + "\n".join(sections)
        + f"\nThese are the options of {mode} mode that most runs set. --help-all explains "
        f"{n_others} more,\nand --mode {other} --help the other mode. --debug shows where an error "
        "was raised.\n"
    )


def all_options(actions: Iterable[Action], config: type) -> str:
    """Every option: those of this library before those of TRL and transformers.

    Args:
        actions: the options of a mode's parser.
        config: the class of the mode's training arguments.
    """
    by_name = _by_name(actions)
    sections = []
    for title, names in _groups(config).items():
        members = [by_name.pop(name) for name in names if name in by_name]
        if members:
            sections.append(_section(title, members))
    return "usage: hf-ebft train [--config FILE] [--option value ...]\n\n" + "\n".join(sections)


def command_help(usage: str, description: str, actions: Iterable[Action]) -> str:
    """The help of a command with few options: each once, with its default where it has one.

    Args:
        usage: the line after "usage:".
        description: a sentence about the command.
        actions: the options of the command's parser.
    """
    options = _section("options", list(_by_name(actions).values()))
    return f"usage: {usage}\n\n{description}\n\n{options}"


def _by_name(actions: Iterable[Action]) -> dict[str, Action]:
    """Name -> option; `--no_x` is left out, since it belongs to `--x`."""
    by_name: dict[str, Action] = {}
    for action in actions:
        if action.help is not SUPPRESS and action.dest != "help":
            by_name.setdefault(action.dest, action)
    return by_name


def _groups(config: type) -> Mapping[str, Sequence[str]]:
    """Group title -> names of options; a name belongs to the first group that contains it."""

    def names(kind: Any) -> list[str]:
        return [field.name for field in dataclasses.fields(kind)]

    bases = [base for base in config.__mro__[1:] if issubclass(base, TrainingArguments)]
    inherited = {name for base in bases for name in names(base)}
    training = names(TrainingArguments)
    return {
        "data": names(DataArguments),
        "model": names(ModelArguments),
        "adapters": names(LoraArguments),
        "report": names(ReportArguments),
        "vLLM": [name for name in names(config) if "vllm" in name],
        "EBFT": [name for name in names(config) if name not in inherited],
        "GRPO (of TRL)": [name for name in names(config) if name not in training],
        "training (of transformers)": names(config),
    }


def _section(title: str, actions: Iterable[Action]) -> str:
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    lines = [f"{title}:"]
    for action in actions:
        name = f"  --{action.dest}"
        text = textwrap.wrap(_explanation(action), max(width - _NAME_WIDTH, 30))
        if len(name) > _NAME_WIDTH - 2:
            lines.append(name)
            name = ""
        first, *rest = text or [""]
        lines.append(f"{name:<{_NAME_WIDTH}}{first}".rstrip())
        lines += [" " * _NAME_WIDTH + line for line in rest]
    return "\n".join(lines) + "\n"


def _explanation(action: Action) -> str:
    """The help of an option, with its choices and its default unless the text states them."""
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    text = " ".join(text.split())
    choices = [str(choice) for choice in action.choices or ()]
    if len(choices) <= MOST_CHOICES and any(choice not in text for choice in choices):
        text += f" One of {', '.join(choices)}."
    default = action.default
    if default is None or default == "" or default == [] or "efault" in text:
        return text
    if isinstance(default, list):
        default = " ".join(map(str, default))
    return f"{text} [{default}]"
