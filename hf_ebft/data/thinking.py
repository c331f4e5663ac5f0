"""Splits text of reasoning models into thinking (between tags) and answer.

In structured mode the policy may think before it answers. Features compare whole sequences, so
rollout and ground truth must be treated in the same way: either both keep their thinking, or it is
removed from both before the feature network reads them. The policy gradient covers every sampled
token in both cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

THINKING_STARTS = "<think>"
THINKING_ENDS = "</think>"
# Number of tokens at the end of a prompt in which to look for an opening tag of the template.
_PROMPT_TAIL = 64


def split_thinking(text: str) -> tuple[str | None, str]:
    """Split a reply into thinking and answer.

    The answer is what follows the last `</think>`. The opening tag may be missing (some chat
    templates write it at the end of the prompt).

    Args:
        text: a whole reply.

    Returns:
        The thinking without its tags and surrounding space, or None if there is none; and the
        answer, without leading space if there was thinking.

    Raises:
        ValueError: thinking is opened but not closed, so that the start of the answer is unknown.
    """
    thinking, end, answer = text.rpartition(THINKING_ENDS)
    if not end:
        if THINKING_STARTS in text:
            raise ValueError(
                f"{THINKING_STARTS} without {THINKING_ENDS}: the reply ends within its thinking, "
                "or uses other tags. Complete the reply, or leave the row out."
            )
        return None, text
    if THINKING_STARTS in answer:
        raise ValueError(
            f"The last {THINKING_STARTS} comes after the last {THINKING_ENDS}: the reply ends "
            "within its thinking. Complete the reply, or leave the row out."
        )
    return thinking.strip().removeprefix(THINKING_STARTS).strip(), answer.lstrip()


def join_thinking(thinking: str, answer: str) -> str:
    """A reply with its thinking between tags, in the format of common chat templates."""
    return f"{THINKING_STARTS}\n{thinking.strip()}\n{THINKING_ENDS}\n\n{answer}"


def answer_start(prompt_ids: Sequence[int], completion_ids: Sequence[int], tokenizer: Any) -> int:
    """Index in `completion_ids` at which the answer begins, after any thinking.

    The tag is found in the decoded text, so its tokenization does not matter. The answer starts at
    the first token that is not space after the token that completes the last `</think>`. A token
    with both the end of the tag and the first characters of the answer counts as thinking.

    Args:
        prompt_ids: (P,) token ids; if they end with an open `<think>`, the completion begins with
            thinking.
        completion_ids: (C,) token ids.
        tokenizer: the tokenizer of these ids.

    Returns:
        The index; 0 if there is no thinking, C if the thinking has not ended, so that there is no
        answer yet.
    """
    text = tokenizer.decode(completion_ids, skip_special_tokens=False)
    end = text.rfind(THINKING_ENDS)
    reopened = text.rfind(THINKING_STARTS) > end
    if end < 0 and not reopened:
        tail = tokenizer.decode(prompt_ids[-_PROMPT_TAIL:], skip_special_tokens=False)
        # Only at the end: a user's message may contain the tag elsewhere.
        reopened = tail.rstrip().endswith(THINKING_STARTS)
    if reopened:
        return len(completion_ids)
    if end < 0:
        return 0
    count = text.count(THINKING_ENDS)
    start = _shortest_prefix(completion_ids, tokenizer, count)
    while start < len(completion_ids) and not _decode(completion_ids[start : start + 1], tokenizer):
        start += 1
    return start


def _shortest_prefix(ids: Sequence[int], tokenizer: Any, count: int) -> int:
    """The smallest number of tokens whose text contains the closing tag `count` times."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        text = tokenizer.decode(ids[:middle], skip_special_tokens=False)
        if text.count(THINKING_ENDS) < count:
            low = middle + 1
        else:
            high = middle
    return low


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    return text.strip()
