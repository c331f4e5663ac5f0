"""Text of reasoning models: thinking between tags, then the answer.

In structured mode the policy may think before it answers. Features compare sequences, so rollout
and ground truth have to be treated alike: either both keep their thinking, or both lose it before
they reach the feature network. The policy gradient covers every sampled token either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

THINKING_STARTS = "<think>"
THINKING_ENDS = "</think>"
# Tokens at the prompt's end that hold the tag and the space after it, where a template opens it.
_PROMPT_TAIL = 64


def split_thinking(text: str) -> tuple[str | None, str]:
    """Thinking and answer of a reply.

    The answer is what follows the last `</think>`. The opening tag may be missing (some chat
    templates write it at the end of the prompt).

    Args:
        text: a whole reply.

    Returns:
        The thinking without its tags and surrounding space, None if there is none, and the answer
        without leading space if there was thinking.

    Raises:
        ValueError: thinking that is opened and not closed: there is no telling where the answer
            starts.
    """
    thinking, end, answer = text.rpartition(THINKING_ENDS)
    if not end:
        if THINKING_STARTS in text:
            raise ValueError(
                f"{THINKING_STARTS} without {THINKING_ENDS}: the reply breaks off in its thinking, "
                "or the tags are others."
            )
        return None, text
    if THINKING_STARTS in answer:
        raise ValueError(
            f"The last {THINKING_STARTS} comes after the last {THINKING_ENDS}: the reply breaks "
            "off in its thinking."
        )
    return thinking.strip().removeprefix(THINKING_STARTS).strip(), answer.lstrip()


def join_thinking(thinking: str, answer: str) -> str:
    """A reply with its thinking between tags, as the templates of common models lay it out."""
    return f"{THINKING_STARTS}\n{thinking.strip()}\n{THINKING_ENDS}\n\n{answer}"


def answer_start(prompt_ids: Sequence[int], completion_ids: Sequence[int], tokenizer: Any) -> int:
    """Index in `completion_ids` at which the answer begins, after any thinking.

    Found in the decoded text, so that it does not matter how the tags are tokenized: the first
    token after the one that completes the last `</think>`, and after space. A token that holds
    the end of the tag and the answer's first characters counts as thinking.

    Args:
        prompt_ids: (P,) token ids; where they end in an open `<think>`, the completion starts out
            thinking.
        completion_ids: (C,) token ids.
        tokenizer: whose ids they are.

    Returns:
        0 where there is no thinking; C where the thinking has not ended, so that there is no answer
        yet.
    """
    text = tokenizer.decode(completion_ids, skip_special_tokens=False)
    end = text.rfind(THINKING_ENDS)
    reopened = text.rfind(THINKING_STARTS) > end
    if end < 0 and not reopened:
        tail = tokenizer.decode(prompt_ids[-_PROMPT_TAIL:], skip_special_tokens=False)
        reopened = tail.rstrip().endswith(THINKING_STARTS)  # a user may write of the tag elsewhere
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
    """The least number of tokens whose text holds the closing tag `count` times, by bisection."""
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
