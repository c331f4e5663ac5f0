"""Writes docs/architectures.md, which the slow tests hold against the code.

Run it with `python -m tools.architecture_table`.

Takes some minutes: every model type is measured with several lengths and attention implementations.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import torch
import transformers

from hf_ebft.packed.supported import set_packed_attention
from tests.support.architectures import LIMIT, MODEL_TYPES, NOT_BUILT, tiny_model
from tests.support.exactness import Case, Verdict, judge, ragged_batch

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
# Longest document of the case; its packed row is more than twice as long.
LONGEST = 43
CASE = Case(ragged_batch(LONGEST, 30))
SHORT, AMPLE = LONGEST // 2, 4096

INTRODUCTION = """\
# Which models are exact

This page lists every model type of `MODEL_FOR_CAUSAL_LM_MAPPING` in transformers {version}.
A model is exact if packed rows, cached sampling and the feature network compute the same as plain
causal forward passes over `prefix + own tokens`, up to rounding.

**Other models.** For architectures that are not listed (for example with `trust_remote_code`), and
for other releases of transformers, the trainer runs a self-test before it trains
(`verify_packing`). It compares short packed rows, ragged and with two documents in a row, with
plain forward passes. In transformers 5.17, the oldest release that the package installs with, it
refuses `big_bird`, `rembert` and `megatron-bert`, which are exact in the release above.

**Refused models** raise a `ValueError` that gives the reason. It is raised when the trainer is
built. If a model is exact up to some length, it is raised at the first batch that is longer.

**PEFT.** Adapter methods are measured in the same way, with adapters that have an effect. Methods
that change weights are exact. These are refused:

- prompt learning (virtual tokens);
- methods whose effect on a token depends on the rest of the forward pass (`LILY`, `POLY`, `SHADOW`,
  `XLORA`);
- LoRA with `alora_invocation_tokens`, `monteclora_config` or `velora_config`.

**How it is measured.** In float32, on tiny random models (4 layers, windows of 7 tokens, documents
of up to {longest} tokens, packed rows of {row}). "Largest difference" is the maximum over:

- log-probabilities of the whole vocabulary, in the training pass and in the cached sampler;
- coordinates of an embedding (hidden states of the first, middle and last layer);
- the attention implementations split, sdpa and eager, as far as the model has them;
- configured lengths above and below those of the documents and the row.

The tests allow 1e-4. A wrong mask causes a difference of more than 1.

`python -m tools.architecture_table` writes this page. The slow tests compare it with the code.
"""


def build_and_judge(model_type: str, *, limit: int, attention: str | None) -> Verdict | None:
    """Verdict on a type; None if it does not have this attention implementation.

    Split attention takes the place of sdpa; sdpa itself is with a dense mask.
    """
    loaded = "sdpa" if attention == "split" else attention
    try:
        model = tiny_model(model_type, limit=limit, attention=loaded)
        if attention == "split":
            set_packed_attention(model, "split")
    except ValueError:
        if attention is None:
            raise
        return None
    return judge(model, CASE, "sdpa" if attention == "sdpa" else "auto")


def all_verdicts(model_type: str) -> list[Verdict]:
    """With ample, tight and short lengths, and in every attention implementation."""
    ample = build_and_judge(model_type, limit=AMPLE, attention=None)
    assert ample is not None
    if ample.outcome == "refused":
        return [ample]
    others = [
        build_and_judge(model_type, limit=limit, attention=attention)
        for limit, attention in [
            (LIMIT, None),
            (SHORT, None),
            (LIMIT, "eager"),
            (LIMIT, "sdpa"),
            (LIMIT, "split"),
        ]
    ]
    return [ample, *(verdict for verdict in others if verdict is not None)]


def remark(verdict: Verdict) -> str:
    """What limits an exact model, in words."""
    assert verdict.forward is not None
    limits = verdict.forward.limits
    remarks = [
        f"{what}: {limit[1].partition(' ')[2]} beyond a configured length"
        for what, limit in (("documents", limits.document), ("rows", limits.row))
        if limit is not None
    ]
    if verdict.without_features:
        clause = re.split(r"[,.:]", verdict.without_features.partition(" ")[2])[0]
        remarks.append(f"not as a feature network: {clause}")
    return "; ".join(remarks)


def first_clause(verdict: Verdict) -> str:
    """Why a model is refused, without its class's name and the ways out."""
    text = re.sub(r"^\w+(\.forward)? ", "", verdict.reason)
    return re.split(r"[:;]|\. |, so |, which", text)[0]


def render() -> str:
    """The page, from measurements."""
    exact, refused = [], []
    for model_type in MODEL_TYPES:
        if model_type in NOT_BUILT:
            continue
        print(model_type, file=sys.stderr, flush=True)
        verdicts = all_verdicts(model_type)
        assert all(verdict.outcome != "wrong" for verdict in verdicts), (model_type, verdicts)
        if verdicts[0].outcome == "refused":
            refused.append(f"| `{model_type}` | {first_clause(verdicts[0])} |")
        else:
            largest = max(verdict.differences.largest for verdict in verdicts)
            exact.append(f"| `{model_type}` | {largest:.0e} | {remark(verdicts[0])} |")
    missing = [f"| `{name}` | {reason} |" for name, reason in NOT_BUILT.items()]
    parts = [
        INTRODUCTION.format(
            version=transformers.__version__, longest=LONGEST, row=CASE.layout().row_width
        ),
        f"## Exact ({len(exact)})\n",
        "| model type | largest difference | limit |\n|---|---|---|",
        *exact,
        f"\n## Refused ({len(refused)})\n",
        "Some configurations of these types have only attention layers. Those are exact and\n"
        "accepted: `granitemoehybrid` without Mamba layers, for example.\n",
        "| model type | why |\n|---|---|",
        *refused,
        f"\n## Not measured ({len(missing)})\n",
        "| model type | why |\n|---|---|",
        *missing,
    ]
    return "\n".join(parts) + "\n"


def documented() -> tuple[str, dict[str, str]]:
    """The page's transformers version, and what it says of each type: "exact" or "refused"."""
    text = PAGE.read_text(encoding="utf-8")
    version = re.search(r"in transformers (\S+)\.\n", text)
    assert version is not None
    _, exact, refused, _ = re.split(r"^## ", text, flags=re.MULTILINE)
    outcomes = dict.fromkeys(re.findall(r"^\| `(.+?)`", exact, re.MULTILINE), "exact")
    outcomes |= dict.fromkeys(re.findall(r"^\| `(.+?)`", refused, re.MULTILINE), "refused")
    return version[1], outcomes


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    PAGE.write_text(render(), encoding="utf-8")
