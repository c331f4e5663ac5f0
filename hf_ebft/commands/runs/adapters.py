"""The adapters and the quantization of a run, as configurations of PEFT and bitsandbytes."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments

from hf_ebft.commands.runs.options import LoraArguments

# Matches a module's name or the end of one, as opposed to a regular expression.
NAME = re.compile(r"[\w.-]+")


def check_adapters(lora: LoraArguments) -> None:
    """Raise for adapter options that would fail late or have no effect.

    Raises:
        ValueError: naming the option, and what to write instead.
    """
    if lora.lora_merge and not lora.use_peft:
        raise ValueError(
            "lora_merge=True has no adapters to merge; add use_peft, or drop lora_merge."
        )
    if lora.quantizes and not lora.use_peft:
        option = "load_in_4bit" if lora.load_in_4bit else "load_in_8bit"
        raise ValueError(
            f"{option}=True: quantized weights cannot be trained, only adapters on them. Add "
            f"use_peft, or drop {option} to train all weights."
        )
    if lora.load_in_4bit and lora.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both set; keep one of the two.")
    if lora.quantizes and lora.lora_merge:
        raise ValueError(
            "lora_merge=True would round the adapters to the quantized precision of the weights. "
            "Drop it, load the saved adapters onto the model in full precision, and merge there."
        )
    defaults = LoraArguments()
    for field in dataclasses.fields(lora):
        name, value = field.name, getattr(lora, field.name)
        if value == getattr(defaults, name):
            continue
        if not lora.use_peft:
            raise ValueError(
                f"{name}={value!r} would have no effect without adapters: add use_peft, or drop "
                f"{name} to train all weights."
            )
        if "bnb" in name and not lora.load_in_4bit:
            raise ValueError(
                f"{name}={value!r} would have no effect without load_in_4bit: add load_in_4bit, or "
                f"drop {name}."
            )


def lora_config(lora: LoraArguments, model: Any) -> LoraConfig | None:
    """The configuration of the run's adapters, or None without adapters.

    Raises:
        ValueError: a name or a regular expression matches nothing in the model.
    """
    if not lora.use_peft:
        return None
    for name in lora.lora_modules_to_save or []:
        _require_match("lora_modules_to_save", name, [name for name, _ in model.named_modules()])
    for name in lora.lora_target_parameters or []:
        parameters = [name for name, _ in model.named_parameters()]
        _require_match("lora_target_parameters", name, parameters)
    modules = lora.lora_target_modules
    if modules == ["none"] and not lora.lora_target_parameters:
        raise ValueError(
            "lora_target_modules=none leaves nothing to adapt; set lora_target_parameters, or "
            "name modules in lora_target_modules."
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=[] if modules == ["none"] else target_modules(modules, model),
        target_parameters=lora.lora_target_parameters,
        modules_to_save=lora.lora_modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def quantization(lora: LoraArguments, args: TrainingArguments, dtype: torch.dtype) -> Any:
    """The `quantization_config` with which `from_pretrained` loads the model in few bits.

    Args:
        lora: options with `load_in_4bit` or `load_in_8bit` set.
        args: the training arguments, for `bf16` and `fp16`.
        dtype: data type of the weights that are not quantized.

    Returns:
        A `BitsAndBytesConfig`. Products with 4-bit weights are computed in the precision of the
        training: in that of `bf16` or `fp16` if one of them is set, else in `dtype`.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "load_in_4bit and load_in_8bit need bitsandbytes: pip install 'hf_ebft[quantization]'."
        )
    if lora.load_in_8bit:
        # bitsandbytes warns at every product that int8 is computed in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=(
            torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else dtype
        ),
        bnb_4bit_quant_type=lora.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=lora.use_bnb_nested_quant,
        bnb_4bit_quant_storage=lora.bnb_4bit_quant_storage,
    )


def target_modules(modules: list[str], model: Any) -> str | list[str]:
    """`target_modules` as PEFT expects it: a list of names, or a regular expression as text.

    Raises:
        ValueError: a name or a regular expression matches no module of the model.
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
                f"lora_target_modules={pattern!r} is neither a module name nor a valid regular "
                f"expression ({error}); write a list of module names, one regular expression for "
                "full names, or all-linear."
            ) from error
        if not matches:
            raise ValueError(_no_match_message(pattern, "regular expression", model))
        return pattern
    for wanted in modules:
        if not _matches_a_name(wanted, full_names):
            raise ValueError(_no_match_message(wanted, "name", model))
    return modules


def _matches_a_name(wanted: str, full_names: Iterable[str]) -> bool:
    """Whether `wanted` is one of the full names, or the end of one."""
    return any(f".{name}".endswith(f".{wanted}") for name in full_names)


def _require_match(option: str, wanted: str, full_names: Iterable[str]) -> None:
    """Raise if `wanted` is neither one of the full names nor the end of one."""
    names = list(full_names)
    if _matches_a_name(wanted, names):
        return
    ends = sorted({name.rpartition(".")[2] for name in names if name})
    near = difflib.get_close_matches(wanted.rpartition(".")[2], ends, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(ends)}."
    raise ValueError(f"{option}: {wanted!r} matches nothing in the model; {hint}")


def _no_match_message(wanted: str, kind: str, model: Any) -> str:
    linear = {
        name.rpartition(".")[2]: name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    example = next(iter(linear.values()), "none")
    return (
        f"lora_target_modules: the {kind} {wanted!r} matches no module of the model. The names of "
        f"its linear layers end in {', '.join(linear)}; a full name is {example!r}. Write a list "
        "of such names, one regular expression for full names, or all-linear."
    )
