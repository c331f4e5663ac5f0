"""Converts axolotl's `rl: ebft` configurations to options of `hf-ebft train`.

Every key of the file becomes an option, or is listed as not carried over, with the reason. Where
axolotl has another default than we have, its default is written out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_ebft.conversion.axolotl_keys import (
    ADAPTERS,
    EBFT_SAME,
    EBFT_STRIDED,
    EBFT_STRUCTURED,
    NO_PLACE,
    OTHER_DEFAULTS,
    SAME,
    TRL_NO_PLACE,
    TRL_RENAMED,
    TRL_SAME,
    VLLM_SAME,
)
from hf_ebft.conversion.checking import check_values


@dataclass(frozen=True)
class _Chat:
    """A transform of chats: settings of `hf_ebft.data.chat`, the mode, and how it differs."""

    settings: Mapping[str, str]
    mode: str = "structured"
    note: str | None = None


_LAST_REPLY_ONLY = (
    "Only the last reply of a chat is learned; axolotl's rows have blocks in every reply. For such "
    "rows give input_ids and labels to EBFTTrainer in a script."
)
#: axolotl's transforms of chats: module and function.
CHATS: dict[tuple[str, str], _Chat] = {
    ("ebft_chat_multiturn", "transform"): _Chat({"turn": "all"}),
    ("ebft_chat_multiturn", "transform_last_turn"): _Chat({"turn": "last"}),
    ("ebft_reasoning", "transform"): _Chat({"turn": "last", "thinking": "keep"}),
    ("ebft_reasoning", "transform_split_thinking"): _Chat({"turn": "last", "thinking": "keep"}),
    ("ebft_reasoning", "transform_answer_only"): _Chat(
        {"turn": "last", "thinking": "strip"},
        note="Thinking is removed from rollouts, too; axolotl removes it from ground truths only.",
    ),
    ("ebft_reasoning", "transform_strided"): _Chat(
        {"turn": "last", "thinking": "keep"}, mode="strided"
    ),
    ("ebft_strided_chat", "transform"): _Chat(
        {"turn": "last"}, mode="strided", note=_LAST_REPLY_ONLY
    ),
}


@dataclass
class Conversion:
    """A configuration in our options, with a record of what became of every original key.

    Attributes:
        options: options for `hf-ebft train --config`.
        carried: original key (such as `ebft.stride`) -> our option.
        left: original keys that could not be carried over -> reason.
        notes: sentences about settings with another meaning here.
    """

    options: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def carry(self, key: str, option: str, value: Any) -> None:
        """Set an option for a key."""
        self.options[option] = value
        self.carried[key] = option

    def leave(self, key: str, why: str) -> None:
        """Record why a key has no option."""
        self.left[key] = why


def convert_axolotl(config: Mapping[str, Any]) -> Conversion:
    """Convert an axolotl configuration with `rl: ebft`.

    Raises:
        ValueError: the configuration is for another training method, has another form, or contains
            a value that the training arguments refuse.
    """
    if config.get("rl") != "ebft":
        raise ValueError(
            f"rl: {config.get('rl')!r} is not EBFT; only configurations with 'rl: ebft' can be "
            "converted."
        )
    for section in ("ebft", "trl", "vllm"):
        if not isinstance(config.get(section) or {}, Mapping):
            raise ValueError(f"{section} must hold 'key: value' lines, not {config[section]!r}.")
    result = Conversion()
    ebft = dict(config.get("ebft") or {})
    mode = ebft.pop("mode", "structured")
    if mode not in ("strided", "structured"):
        raise ValueError(f"ebft.mode is {mode!r}; it can be strided or structured.")
    result.options["mode"] = mode
    result.carried["rl"] = "mode"
    if "mode" in (config.get("ebft") or {}):
        result.carried["ebft.mode"] = "mode"
    for key, value in config.items():
        if key in ("rl", "ebft", "trl", "vllm"):
            continue
        _top(result, key, value, config, mode)
    _ebft(result, ebft, mode)
    _trl(result, dict(config.get("trl") or {}), dict(config.get("vllm") or {}), mode)
    _report_to(result, config)
    _check(result)
    _leave_unused_lora(result)
    return result


def _leave_unused_lora(result: Conversion) -> None:
    """Remove options of adapters if there are no adapters, since the command refuses them."""
    if result.options.get("use_peft"):
        return
    for key, option in list(result.carried.items()):
        if option.startswith("lora_") or option in ADAPTERS.values():
            result.options.pop(option, None)
            del result.carried[key]
            result.leave(key, "without adapter: lora all weights are trained")


def _check(result: Conversion) -> None:
    """Raise for values that cannot work; the message uses the names of axolotl's file."""
    try:
        unchecked = check_values(result.options)
    except (ValueError, TypeError) as error:
        said = str(error)
        named = re.match(r"argument --(\w+)(?:/\S+)?: ", said)
        keys = {option: key for key, option in result.carried.items()}
        if named is not None and named[1] in keys:
            said = f"{keys[named[1]]}: {said[named.end() :]}"
        raise ValueError(f"{said}{'' if said.endswith('.') else '.'}") from error
    if unchecked is not None:
        result.notes.append(unchecked)


def _top(result: Conversion, key: str, value: Any, config: Mapping[str, Any], mode: str) -> None:
    """Convert a key outside the sections."""
    if value is None:
        result.leave(key, "it is empty")
    elif key in SAME and SAME[key] in result.options:
        result.leave(key, f"{SAME[key]} is said by another key already")
    elif key in SAME:
        result.carry(key, SAME[key], value)
    elif (key in NO_PLACE or key in ADAPTERS) and value is False:
        result.leave(key, "false is the default")
    elif key in ADAPTERS:
        result.carry(key, ADAPTERS[key], value)
    elif key in NO_PLACE:
        result.leave(key, NO_PLACE[key])
    elif key == "sequence_len":
        if mode == "strided":
            result.carry(key, "sequence_len", value)
        else:
            result.leave(key, "prompts are not cut; max_completion_length bounds completions")
    elif key == "datasets":
        _datasets(result, value, mode)
    elif key == "val_set_size":
        _val_set_size(result, value)
    elif key == "adapter":
        if value in ("lora", "qlora"):
            result.carry(key, "use_peft", True)
        else:
            result.leave(key, f"{value} is not supported from the command line, lora and qlora are")
    elif key == "lora_target_linear":
        if value:
            result.carry(key, "lora_target_modules", ["all-linear"])
        else:
            result.leave(key, "lora_target_modules says which modules get adapters")
    elif key == "lora_target_modules":
        result.carry(key, key, value)  # names, or a regular expression, as PEFT has it
    elif key in ("bf16", "fp16", "torch_dtype"):
        _precision(result, key, config)
    elif key == "flash_attention":
        _flash_attention(result, value, mode)
    elif key in ("use_tensorboard", "use_wandb", "wandb_project"):
        pass  # together, at the end
    else:
        result.leave(key, "there is no such option here")


def _datasets(result: Conversion, entries: Any, mode: str) -> None:
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], Mapping):
        result.leave("datasets", "it holds no list of data sets with a path")
        return
    for number in range(1, len(entries)):
        result.leave(
            f"datasets[{number}]", "one data set is carried over; dataset_name_or_path takes more"
        )
    names = {"path": "dataset_name_or_path", "name": "dataset_config_name"}
    names |= {"split": "train_split", "train_on_split": "train_split"}
    for key, value in entries[0].items():
        path = f"datasets[0].{key}"
        if key in names:
            result.carry(path, names[key], value)
        elif key == "type":
            _transform(result, path, value, entries[0].get("path"), mode)
        else:
            result.leave(path, "there is no such option here")


def _transform(result: Conversion, key: str, transform: Any, dataset: Any, mode: str) -> None:
    """Convert axolotl's own transforms; others are code, which cannot be converted."""
    name, _, function = str(transform).partition(".")
    if (name, function) in CHATS:
        _chat(result, key, CHATS[name, function], mode)
    elif transform in ("ebft_opencode.transform", "ebft_strided_structured.transform"):
        settings: dict[str, Any] = {"question_column": "input", "answer_column": "output"}
        if transform == "ebft_opencode.transform":
            settings["chat"] = True
        result.carry(key, "transform", "question_answer")
        result.options["transform_args"] = settings
        if mode == "structured":
            result.notes.append(
                "Prompts are chat messages: the model's tokenizer needs a chat template. For a "
                "base model without one drop 'chat' from transform_args."
            )
    elif transform == "ebft_pretrain.transform":
        column = "question" if "swallow_code" in str(dataset) else "text"
        result.carry(key, "text_column", column)
        result.notes.append(
            f"Text is read from the column {column!r}; axolotl takes 'question' where there is "
            "one, else 'text'. Long documents continue in the next row here instead of ending."
        )
    elif transform == "ebft_chat_multiturn.transform_all_turns":
        result.leave(
            key,
            "one row for each reply of a chat is not made here; transform: chat takes the first or "
            "the last reply (turn), or all of them as one completion",
        )
    else:
        result.leave(
            key,
            "it is code; use one of the transforms in docs/data.md, or a data set with prompts and "
            "ground truths",
        )


def _chat(result: Conversion, key: str, chat: _Chat, mode: str) -> None:
    """Convert a transform of chats; ours is one function with settings."""
    if mode != chat.mode:
        result.leave(key, f"it is for {chat.mode} mode")
        return
    result.carry(key, "transform", "chat")
    result.options["transform_args"] = dict(chat.settings)
    result.notes += [
        "Chats are read from the column 'messages'; axolotl takes 'conversations' where there is "
        "none. For another column add messages_column to transform_args.",
        *([chat.note] if chat.note else []),
    ]


def _val_set_size(result: Conversion, value: Any) -> None:
    if not isinstance(value, (int, float)):
        raise ValueError(f"val_set_size is {value!r}; it has to be a number.")
    if not 0 <= value <= 0.5:
        result.leave("val_set_size", "held-out rows are a share of at most 0.5 here: eval_fraction")
        return
    result.carry("val_set_size", "eval_fraction", value)
    if value == 0:
        result.options["report_rows"] = 0
        result.notes.append(
            "Nothing is held out (val_set_size 0), so there is no report before and after "
            "training; set eval_fraction or eval_split, and drop report_rows: 0, to get one."
        )


def _precision(result: Conversion, key: str, config: Mapping[str, Any]) -> None:
    """Convert bf16 and fp16; with adapters, the weights themselves are loaded in that type."""
    value = config[key]
    names = {"bf16": "bfloat16", "fp16": "float16"}
    if key == "torch_dtype":
        result.carry(key, "dtype", str(value).removeprefix("torch."))
    elif value not in (True, "auto", "full"):
        result.carry(key, key, False)
    elif config.get("adapter") is not None and key == "bf16":
        # Adapters stay float32 in a model loaded in bfloat16, so no second copy is needed.
        result.carry(key, "dtype", names[key])
        result.options["bf16"] = False
    else:
        result.carry(key, key, True)
    if value == "auto":
        result.notes.append(f"{key}: auto is taken as true; set it to false on a device without.")


def _flash_attention(result: Conversion, value: Any, mode: str) -> None:
    if mode == "strided":
        result.leave("flash_attention", "packed rows need a mask; packed_attention chooses")
    elif value:
        result.carry("flash_attention", "attn_implementation", "flash_attention_2")
    else:
        result.leave("flash_attention", "false is the default")


def _ebft(result: Conversion, ebft: dict[str, Any], mode: str) -> None:
    by_mode: dict[str, tuple[str, ...]] = {
        "strided": EBFT_STRIDED,
        "structured": EBFT_STRUCTURED,
    }
    own = by_mode.pop(mode)
    (other,) = by_mode.values()
    for key, value in ebft.items():
        if value is None:
            result.leave(f"ebft.{key}", "it is empty")
        elif key in EBFT_SAME or key in own:
            result.carry(f"ebft.{key}", key, value)
        elif key in other:
            result.leave(f"ebft.{key}", f"axolotl does not read it in {mode} mode either")
        else:
            result.leave(f"ebft.{key}", "there is no such option here")
    for key, (default, modes) in OTHER_DEFAULTS.items():
        if mode in modes and key not in result.options:
            result.options[key] = default
            result.notes.append(f"{key}: {str(default).lower()} is axolotl's default, not ours.")
    if mode == "strided" and result.options.get("embed_method") == "completion_mean":
        del result.options["embed_method"], result.carried["ebft.embed_method"]
        result.leave("ebft.embed_method", "completion_mean is for structured mode")


def _trl(result: Conversion, trl: dict[str, Any], vllm: dict[str, Any], mode: str) -> None:
    if mode == "strided":
        for section, keys in (("trl", trl), ("vllm", vllm)):
            for key in keys:
                result.leave(f"{section}.{key}", "strided mode samples by itself, without TRL")
        return
    # axolotl serves adapters from files where a key or the server's module says so.
    lora_sync = trl.get("vllm_lora_sync") is True or "lora" in str(vllm.get("serve_module"))
    for key, value in trl.items():
        path = f"trl.{key}"
        if value is None:
            result.leave(path, "it is empty")
        elif key in TRL_NO_PLACE:
            result.leave(path, TRL_NO_PLACE[key])
        elif key == "use_vllm" and value and lora_sync:
            result.carry(path, "vllm_lora_sync", True)
        elif key == "use_vllm":
            result.carry(path, key, value)
        elif key in ("vllm_lora_sync", "vllm_sync_interval", "async_prefetch"):
            if lora_sync:
                result.carry(path, key, value)
            else:
                result.leave(path, "it needs vllm_lora_sync: true here")
        elif key == "vllm_server_host" and value == "0.0.0.0":
            result.carry(path, key, "127.0.0.1")
        elif key in TRL_SAME or key in TRL_RENAMED:
            option = TRL_RENAMED.get(key, key)
            if option in result.options:
                result.leave(path, f"{option} is said by another key already")
            else:
                result.carry(path, option, value)
        else:
            result.leave(path, "there is no such option here")
    for key, value in vllm.items():
        path = f"vllm.{key}"
        if key == "serve_module":
            if lora_sync:
                result.carry(path, "vllm_lora_sync", True)
            else:
                result.leave(path, "hf-ebft serve, or TRL's server, is started instead")
        elif key in VLLM_SAME and value is not None:
            if VLLM_SAME[key] in result.options:
                result.leave(path, f"trl.{VLLM_SAME[key]} says it already")
            else:
                result.carry(path, VLLM_SAME[key], value)
        else:
            result.leave(path, "give it to hf-ebft serve after --, as vLLM calls it")
    if trl.get("use_vllm") and not lora_sync:
        result.options["vllm_mode"] = result.options.get("vllm_mode", "server")
    rank = result.options.get("lora_r")
    if lora_sync and isinstance(rank, int) and rank > 16:
        result.options["vllm_max_lora_rank"] = next(
            (served for served in (32, 64, 128, 256, 512) if served >= rank), 512
        )


def _report_to(result: Conversion, config: Mapping[str, Any]) -> None:
    """Convert where curves are logged; several of axolotl's keys become one list."""
    targets = []
    for key, target in (("use_tensorboard", "tensorboard"), ("use_wandb", "wandb")):
        if key in config:
            if config[key]:
                targets.append(target)
                result.carried[key] = "report_to"
            else:
                result.leave(key, "false is the default")
    if "wandb_project" in config:
        if config["wandb_project"]:
            targets.append("wandb")
            result.carried["wandb_project"] = "report_to"
            result.notes.append(
                "The project's name is read from the environment: WANDB_PROJECT="
                f"{config['wandb_project']}."
            )
        else:
            result.leave("wandb_project", "it is empty")
    result.options["report_to"] = sorted(set(targets)) or "none"
