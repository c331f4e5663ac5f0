"""Adapters of a run, as PEFT wants them described."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig

from hf_ebft.commands.runs.options import LoraArguments

# A module's name, or its end, as opposed to a regular expression.
NAME = re.compile(r"[\w.-]+")


def lora_config(lora: LoraArguments, model: Any) -> LoraConfig | None:
    """What PEFT is to wrap the model with, if anything.

    Raises:
        ValueError: a name or a regular expression that matches no module of the model.
    """
    if not lora.use_peft:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=target_modules(lora.lora_target_modules, model),
    )


def target_modules(modules: list[str], model: Any) -> str | list[str]:
    """Names as a list, or one regular expression as the text that PEFT takes for one.

    Raises:
        ValueError: a name or a regular expression that matches no module of the model.
    """
    if modules == ["all-linear"]:
        return modules[0]
    full_names = [name for name, _ in model.named_modules()]
    if len(modules) == 1 and not NAME.fullmatch(modules[0]):
        (pattern,) = modules
        try:
            matches = any(re.fullmatch(pattern, name) for name in full_names)
        except re.error as error:
            raise ValueError(
                f"lora_target_modules={pattern!r} is no regular expression: {error}."
            ) from error
        if not matches:
            raise ValueError(_matches_nothing(pattern, "regular expression", model))
        return pattern
    for wanted in modules:
        if not any(f".{name}".endswith(f".{wanted}") for name in full_names):
            raise ValueError(_matches_nothing(wanted, "name", model))
    return modules


def _matches_nothing(wanted: str, kind: str, model: Any) -> str:
    linear = {
        name.rpartition(".")[2]: name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    example = next(iter(linear.values()), "none")
    return (
        f"lora_target_modules: the {kind} {wanted!r} matches no module of the model. Its linear "
        f"layers are called {', '.join(linear)}, {example!r} in full; write a list of such names, "
        "one regular expression for the full names, or all-linear."
    )
