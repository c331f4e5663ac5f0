"""Checks the values of a converted configuration by building the training arguments from it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from transformers import HfArgumentParser

from hf_ebft.config import EBFTConfig

#: Options of the command that are not training arguments -> type.
SCRIPT_OPTIONS: dict[str, type] = {
    "sequence_len": int,
    "eval_fraction": float,
    "lora_r": int,
    "lora_alpha": int,
    "lora_dropout": float,
}
# Options that depend on the machine that trains, so they cannot be checked here.
BY_MACHINE = ("bf16", "fp16", "tf32", "generation_batch_size")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def check_values(options: Mapping[str, Any]) -> str | None:
    """Build the training arguments of the mode, which check every value and their combination.

    Args:
        options: options for `hf-ebft train`, including `mode`.

    Returns:
        A sentence about values that could not be checked, or None if all were.

    Raises:
        ValueError: a value has another type, or the training arguments refuse it.
    """
    config: Any = EBFTConfig
    if options["mode"] == "structured":
        if importlib.util.find_spec("trl") is None:
            return "TRL is not installed here, so the values were not checked."
        from hf_ebft.structured import EBFTGRPOConfig

        config = EBFTGRPOConfig
    parser = _Parser(config, allow_abbrev=False, add_help=False)
    for name, kind in SCRIPT_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind)
    known = {action.dest for action in parser._actions}
    taken = {name: value for name, value in options.items() if name in known}
    values = vars(parser.parse_args(as_arguments(taken)))
    fields = {name: values[name] for name in taken if name not in {*SCRIPT_OPTIONS, *BY_MACHINE}}
    if options["mode"] == "structured":
        # The number of processes is unknown, so set a batch size that fits.
        n_generations = values["num_generations"]
        fields["per_device_train_batch_size"] = n_generations
        fields["per_device_eval_batch_size"] = values["num_generations_eval"] or n_generations
    config(**fields, bf16=False, use_cpu=True)
    return None


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options of a file as command-line arguments, so that both are parsed in the same way."""
    arguments: list[str] = []
    for name, value in options.items():
        if value is None:  # an empty value means that the option is not set
            continue
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            arguments.append(f"--{name}={text}")
    return arguments
