"""The special tokens around a text: the BOS before it, and what ends it or an assistant's turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds and only one BOS.

    A text that a chat template has rendered often begins with BOS. Most tokenizers then put a
    second one before it.

    Args:
        text: any text.
        tokenizer: a transformers tokenizer.

    Returns:
        One id per token.
    """
    ids: list[int] = list(tokenizer(text, verbose=False).input_ids)
    bos = added_bos(tokenizer)
    return ids[1:] if bos and ids[:2] == 2 * bos else ids


def added_bos(tokenizer: Any) -> list[int]:
    """The BOS token that the tokenizer puts before a text, as a list of one id; [] if none."""
    added = list(tokenizer("").input_ids)
    return [tokenizer.bos_token_id] if added[:1] == [tokenizer.bos_token_id] else []


def without_bos(ids: Sequence[int], bos: Sequence[int]) -> list[int]:
    """Token ids of a text without the BOS that the text itself begins with.

    Args:
        ids: of the text, without the special tokens that the tokenizer adds.
        bos: what `added_bos` returns.
    """
    ids = list(ids)
    return ids[len(bos) :] if ids[: len(bos)] == list(bos) else ids
