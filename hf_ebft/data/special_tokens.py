"""The special tokens around a text: the BOS before it, and what ends it or an assistant's turn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

logger = logging.getLogger(__name__)

# A chat that every template can lay out. Its words are in no template, so they can be found again.
QUESTION = {"role": "user", "content": "ebftquestion"}
REPLY = {"role": "assistant", "content": "ebftreply"}


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


class Endings:
    """What texts end with: EOS, or what the chat template writes after a reply.

    The two differ for many models: a reply ends with `<end_of_turn>`, `<|im_end|>` or `<|eot_id|>`
    where the EOS token is another.

    Args:
        tokenizer: a transformers tokenizer, with or without EOS and chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        eos = tokenizer.eos_token_id
        self._eos: list[int] = [] if eos is None else [eos]
        self._eos_texts = [] if eos is None else [tokenizer.eos_token]
        self._turn_end: list[int] = []
        self._turn_texts: list[str] = []
        self._reply_opening = ""
        if tokenizer.chat_template is None:
            return
        try:
            rendered = _render([QUESTION, REPLY], tokenizer)
            self._reply_opening = _reply_opening(rendered, tokenizer)
        except (TemplateError, ValueError) as error:
            logger.warning(
                "The chat template cannot lay out a question with a reply (%s), so chats end with "
                "the EOS token, as other texts do.",
                error,
            )
            return
        _, _, after = rendered.rpartition(REPLY["content"])
        self._turn_end = _turn_end(after, tokenizer)
        end = tokenizer.decode(self._turn_end)
        self._turn_texts = [text for text in (after.rstrip(), end) if text.strip()]

    def of_document(self, text: str) -> tuple[str, list[int]]:
        """A document without the end that its text may have already, and the ids of its end."""
        bare = _without_end(text, self._turn_texts)
        if bare is not None:
            return bare, self._turn_end
        bare = _without_end(text, self._eos_texts)
        return text if bare is None else bare, self._eos

    def of_completion(
        self, prompt: str, completion: str, *, chat: bool = False
    ) -> tuple[str, list[int]]:
        """A completion without the end that its text may have already, and the ids of its end.

        Args:
            prompt: what it follows; a chat if the template's opening of a reply is in it.
            completion: text.
            chat: the prompt is a chat, whatever it holds.
        """
        if self._turn_end and (chat or (self._reply_opening and self._reply_opening in prompt)):
            stripped = [text.strip() for text in self._turn_texts]
            bare = _without_end(completion, [*self._turn_texts, *stripped, *self._eos_texts])
            return completion if bare is None else bare, self._turn_end
        bare = _without_end(completion, self._eos_texts)
        return completion if bare is None else bare, self._eos


# Rendering a template and listing special tokens costs more than encoding a row.
_KNOWN: WeakKeyDictionary[Any, tuple[tuple[Any, ...], Endings]] = WeakKeyDictionary()


def endings_of(tokenizer: Any) -> Endings:
    """The tokenizer's `Endings`, made once as long as its template and special tokens stay."""
    state = (str(tokenizer.chat_template), tokenizer.eos_token_id, len(tokenizer))
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != state:
        known = _KNOWN[tokenizer] = (state, Endings(tokenizer))
    return known[1]


def _without_end(text: str, ends: Sequence[str]) -> str | None:
    """The text without the first of these ends that it has, None if it has none."""
    stripped = text.rstrip()
    for end in ends:
        if stripped.endswith(end):
            return stripped.removesuffix(end)
    return None


def _render(messages: list[dict[str, str]], tokenizer: Any, *, generation: bool = False) -> str:
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation
    )
    return text


def _reply_opening(rendered: str, tokenizer: Any) -> str:
    """What the template writes between a question and its reply, as a mark of rendered chats.

    Raises:
        ValueError: the template leaves out the question or the reply.
    """
    question, reply = QUESTION["content"], REPLY["content"]
    before, found, _ = rendered.rpartition(reply)
    _, asked, between = before.rpartition(question)
    if not (found and asked):
        raise ValueError("the template leaves out the question or the reply")
    # The generation prompt alone where there is one: what is between may hold an empty thought.
    short, long = (_render([QUESTION], tokenizer, generation=added) for added in (False, True))
    generation = long.removeprefix(short).strip() if long.startswith(short) else ""
    return generation or between.strip()


def _turn_end(after: str, tokenizer: Any) -> list[int]:
    """Ids of what follows a reply, up to the first token that ends a turn; else with EOS added."""
    reply = tokenizer(REPLY["content"], add_special_tokens=False).input_ids
    ids = tokenizer(REPLY["content"] + after, add_special_tokens=False).input_ids
    if ids[: len(reply)] == reply:
        ids = ids[len(reply) :]
    else:  # the tokenizer merges the reply with what follows
        ids = tokenizer(after, add_special_tokens=False).input_ids
    ends = {id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    ends.update(tokenizer.all_special_ids)
    for place, token in enumerate(ids):
        if token in ends:
            return list(ids[: place + 1])
    written = tokenizer(after.rstrip(), add_special_tokens=False).input_ids
    return [*written, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
