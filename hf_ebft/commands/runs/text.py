"""The text of strided mode: reading it from a table, and tokenizing it into rows."""

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
    """The text of a table, or its prompts with completions.

    Ground truths of structured mode serve as completions. Chats are rendered to text.

    Raises:
        ValueError: the table has tools, or a completion that is not one reply.
    """
    truths = [name for name in (COMPLETION, *GROUND_TRUTHS) if name in table.columns]
    if data.text_column is not None or "prompt" not in table.columns or not truths:
        return table.text(data.text_column)
    if "tools" in table.columns:
        raise ValueError(
            f"{table.name} has a column 'tools', which would not be rendered into the prompt. "
            "Render the tools into the prompt yourself, or remove the column."
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
    """The text of a completion, which may be a list of one assistant message as in TRL's data.

    Args:
        completion: a text, or a list of messages.
        where: its place in the data, for messages.

    Raises:
        ValueError: several messages, or one message of another role.
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
            f"{where} has {len(completion)} messages, {len(replies)} of them by the assistant, but "
            "strided mode takes one assistant reply per row. Use --mode structured for the rest of "
            "a chat, or put the whole chat into the column 'messages' (--transform chat)."
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
    """Tokenize text into rows of at most `sequence_len` tokens, with labels if it has prompts."""
    min_length = args.context_length + args.generate_max_len
    if raw.has_prompts:
        if pack:
            raise ValueError(
                "pack=True packs documents of text, but this data has prompts with completions; "
                "drop pack."
            )
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
