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

`EBFTConfig` is `transformers.TrainingArguments` plus the settings of the first two tables.
`EBFTGRPOConfig`, for prompts with ground truths, is TRL's `GRPOConfig` plus those of the second,
third and fourth. The last table lists what both parents have, with another default here. All
can be given on the command line (`--stride 8`) and in YAML (`stride: 8`).
An unknown name is an error, and so is a value that a mode cannot honour.

`python -m tools.settings_table` writes this page from the code; a test holds it against that.
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
    "Strided mode: blocks, sampling, memory": (
        "Rollouts start at many places of a raw text.",
        STRIDED,
    ),
    "Both modes: features, rewards, weights of the loss": (
        "The paper's values are named where they are known.",
        MATCHING,
    ),
    "Structured mode: prompts with ground truths": (
        "Sampling, clipping and the number of rollouts (`num_generations`) are TRL's; "
        "[structured.md](structured.md) says which of its settings matter here.",
        STRUCTURED,
    ),
    "Structured mode: a vLLM server over HTTP": (
        "How to run one: [vllm.md](vllm.md).",
        SERVER,
    ),
    "Both modes: defaults of the optimizer": (
        "Those of the paper's released configurations, for people who set nothing. `EBFTTrainer` "
        "leaves a plain `TrainingArguments` as it is.",
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
