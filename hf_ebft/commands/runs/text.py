"""Text of strided mode: what is read of a table, and the rows that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_ebft import EBFTConfig
from hf_ebft.commands.runs.options import GROUND_TRUTHS, DataArguments
from hf_ebft.data import (
    RawDataset,
    Table,
    TokenizedRows,
    render_prompt,
    tokenize_and_cut,
    tokenize_prompt_completion,
)

COMPLETION = "completion"


def raw_text(table: Table, data: DataArguments, tokenizer: Any) -> RawDataset:
    """What strided mode reads of a table: its text, or its prompts with completions.

    Ground truths of structured mode are completions here, and chats are laid out as text.
    """
    truths = [name for name in (COMPLETION, *GROUND_TRUTHS) if name in table.columns]
    if data.text_column is not None or "prompt" not in table.columns or not truths:
        return table.text(data.text_column)
    if "tools" in table.columns:
        raise ValueError(
            f"{table.name} has a column 'tools', which would not reach the prompt. Render them "
            "into the prompt, or take the column out."
        )
    pairs = [
        {
            "prompt": render_prompt(record["prompt"] or "", tokenizer, f"The prompt of row {n}"),
            COMPLETION: reply_of(record[truths[0]], f"{table.name}, row {n}, {truths[0]!r},"),
        }
        for n, record in enumerate(table.records)
    ]
    return RawDataset(pairs, ("prompt", COMPLETION), table.name)


def reply_of(completion: Any, where: str) -> Any:
    """The text of a completion that is one message of the assistant, as TRL's data has it.

    Raises:
        ValueError: several messages, or one of somebody else.
    """
    if not isinstance(completion, list):
        return completion
    replies = [
        message["content"]
        for message in completion
        if isinstance(message, Mapping) and message.get("role") == "assistant"
    ]
    if len(completion) != 1 or len(replies) != 1:
        raise ValueError(
            f"{where} holds {len(completion)} messages, {len(replies)} of them by the assistant; "
            "strided mode takes one reply a row. Use --mode structured for a rest of a chat, or "
            "give the whole chat in 'messages' (--transform chat)."
        )
    return replies[0]


def tokenize(
    raw: RawDataset,
    tokenizer: Any,
    data: DataArguments,
    args: EBFTConfig,
    *,
    pack: bool = False,
    most: int | None = None,
) -> TokenizedRows:
    """Rows of at most `sequence_len` tokens, with labels if there are prompts."""
    min_length = args.context_length + args.generate_max_len
    if raw.has_prompts:
        if pack:
            raise ValueError("pack=True is for text, not for prompts with completions; drop it.")
        return tokenize_prompt_completion(
            raw.pairs(),
            tokenizer,
            sequence_len=data.sequence_len,
            min_length=min_length,
            min_completion=args.min_completion_prefix + args.generate_max_len,
            keep_short=data.keep_short,
            max_rows=most,
        )
    return tokenize_and_cut(
        raw.texts(),
        tokenizer,
        sequence_len=data.sequence_len,
        min_length=min_length,
        pack=pack,
        keep_short=data.keep_short,
        max_rows=most,
    )
