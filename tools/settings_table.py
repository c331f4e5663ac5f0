"""Writes docs/settings.md from the dataclasses: `python -m tools.settings_table`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from hf_ebft.config import FeatureMatchingArguments, OptimizerDefaults, StridedArguments
from hf_ebft.structured.config import EBFTGRPOConfig
from hf_ebft.structured.vllm.settings import VLLMServerArguments

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

QUOTES = "`'"
# In a help text: `name`, 'value', name_of_setting='value', <folder>/name and group/name.
CODE = re.compile(
    r"`[^`]+`"
    r"|(?<!\w)'[^' ]+'"
    r"|(?<![\w/-])(?:<\w+>/)?[a-z]+(?:_[a-z0-9]+)+(?:/\w+)?(?:=(?:'[^']+'|\w+))?(?!\w)"
)
INTRODUCTION = """\
# Settings

Every setting can be given in Python, on the command line (`--stride 8`) and in YAML (`stride: 8`).
An unknown name is an error, and so is a value that has no effect in the chosen mode.

| class | mode | extends | tables below |
|---|---|---|---|
| `EBFTConfig` | strided: raw text | `transformers.TrainingArguments` | 1, 2, 5 |
| `EBFTGRPOConfig` | structured: prompts with ground truths | TRL's `GRPOConfig` | 2, 3, 4, 5 |

`python -m tools.settings_table` writes this page from the code. A test checks that the two agree.
"""
STRIDED, MATCHING, SERVER, OPTIMIZER = (
    {field.name: field for field in dataclasses.fields(group)}
    for group in (
        StridedArguments,
        FeatureMatchingArguments,
        VLLMServerArguments,
        OptimizerDefaults,
    )
)
STRUCTURED = {
    field.name: field
    for field in dataclasses.fields(EBFTGRPOConfig)
    if field.name not in {field.name for field in dataclasses.fields(GRPOConfig)}
    and field.name not in MATCHING | SERVER
}
SECTIONS: dict[str, tuple[str, dict[str, dataclasses.Field[Any]]]] = {
    "1. Strided mode: blocks, sampling, memory": (
        "Rollouts start at many positions of a raw text.",
        STRIDED,
    ),
    "2. Both modes: features, rewards, weights of the loss": (
        "The help names the paper's value where it is known.",
        MATCHING,
    ),
    "3. Structured mode: prompts with ground truths": (
        "Sampling, clipping and the number of rollouts (`num_generations`) are TRL's. "
        "[structured.md](structured.md) says which of TRL's settings matter here.",
        STRUCTURED,
    ),
    "4. Structured mode: a vLLM server over HTTP": (
        "How to run one: [vllm.md](vllm.md).",
        SERVER,
    ),
    "5. Both modes: defaults of the optimizer": (
        "These settings exist in both parent classes with another default. The defaults here are "
        "those of the paper's released configurations. `EBFTTrainer` leaves a plain "
        "`TrainingArguments` as it is.",
        OPTIMIZER,
    ),
}


def page() -> str:
    """The text of docs/settings.md."""
    parts = [INTRODUCTION]
    for title, (text, fields) in SECTIONS.items():
        parts.append(f"## {title}\n\n{text}\n\n{table(fields)}")
    return "\n".join(parts)


def table(fields: dict[str, dataclasses.Field[Any]]) -> str:
    """Name, default and help of settings."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in fields.items():
        lines.append(f"| `{name}` | {_default(field)} | {_in_table(_help(field))} |")
    return "\n".join(lines) + "\n"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = field.default
    if value is None:
        return "unset"
    return f"`{value}`"


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata.get("help", ""))
    if not text:
        raise ValueError(f"{field.name} has no help text; write one in its metadata.")
    return text


def _in_table(text: str) -> str:
    """Values in quotes and names of settings as code; nothing that Markdown takes for a cell."""
    text = text.replace("|", "\\|")
    return CODE.sub(_as_code, text)


def _as_code(match: re.Match[str]) -> str:
    code = match.group()
    return f"`{code if '=' in code else code.strip(QUOTES)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
