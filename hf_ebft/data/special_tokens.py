"""The special tokens around a text: the BOS before it, and the end of a document or a reply."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

logger = logging.getLogger(__name__)

# A chat that every template can render. Its words are in no template, so they can be found in the
# rendered text.
QUESTION = {"role": "user", "content": "ebftquestion"}
REPLY = {"role": "assistant", "content": "ebftreply"}


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds but only one BOS.

    A text that a chat template has rendered often begins with BOS, and most tokenizers add a second
    one.

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
    """The BOS token that the tokenizer adds before a text, as a list of one id; [] if none."""
    added = list(tokenizer("").input_ids)
    return [tokenizer.bos_token_id] if added[:1] == [tokenizer.bos_token_id] else []


def without_bos(ids: Sequence[int], bos: Sequence[int]) -> list[int]:
    """Remove the BOS with which a text itself begins from its token ids.

    Args:
        ids: token ids of the text, without the special tokens that the tokenizer adds.
        bos: the result of `added_bos`.
    """
    ids = list(ids)
    return ids[len(bos) :] if ids[: len(bos)] == list(bos) else ids


class Endings:
    """The ends of texts: EOS, or the tokens that the chat template writes after a reply.

    The two differ for many models: a reply ends with `<end_of_turn>`, `<|im_end|>` or `<|eot_id|>`,
    but the EOS token is another one.

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
                "The chat template cannot render a question with a reply (%s), so chats end with "
                "the EOS token, like other texts.",
                error,
            )
            return
        _, _, after = rendered.rpartition(REPLY["content"])
        self._turn_end = _turn_end(after, tokenizer)
        end = tokenizer.decode(self._turn_end)
        self._turn_texts = [text for text in (after.rstrip(), end) if text.strip()]

    def of_document(self, text: str) -> tuple[str, list[int]]:
        """A document without an end that its text already has, and the ids of its end."""
        bare = _without_end(text, self._turn_texts)
        if bare is not None:
            return bare, self._turn_end
        bare = _without_end(text, self._eos_texts)
        return text if bare is None else bare, self._eos

    def of_completion(
        self, prompt: str, completion: str, *, chat: bool = False
    ) -> tuple[str, list[int]]:
        """A completion without an end that its text already has, and the ids of its end.

        Args:
            prompt: the prompt; it counts as a chat if it contains the text with which the template
                opens a reply.
            completion: the text of the completion.
            chat: treat the prompt as a chat in any case.
        """
        if self._turn_end and (chat or (self._reply_opening and self._reply_opening in prompt)):
            stripped = [text.strip() for text in self._turn_texts]
            bare = _without_end(completion, [*self._turn_texts, *stripped, *self._eos_texts])
            return completion if bare is None else bare, self._turn_end
        bare = _without_end(completion, self._eos_texts)
        return completion if bare is None else bare, self._eos


# A cache, since rendering a template and listing special tokens costs more than encoding a row.
_KNOWN: WeakKeyDictionary[Any, tuple[tuple[Any, ...], Endings]] = WeakKeyDictionary()


def endings_of(tokenizer: Any) -> Endings:
    """The tokenizer's `Endings`, cached until its template or special tokens change."""
    state = (str(tokenizer.chat_template), tokenizer.eos_token_id, len(tokenizer))
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != state:
        known = _KNOWN[tokenizer] = (state, Endings(tokenizer))
    return known[1]


def _without_end(text: str, ends: Sequence[str]) -> str | None:
    """The text without the first of these ends that it ends with; None if it has none of them."""
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
    """The text that the template writes between a question and its reply; it marks rendered chats.

    Raises:
        ValueError: the template leaves out the question or the reply.
    """
    question, reply = QUESTION["content"], REPLY["content"]
    before, found, _ = rendered.rpartition(reply)
    _, asked, between = before.rpartition(question)
    if not (found and asked):
        raise ValueError("the template leaves out the question or the reply")
    # Use the generation prompt if there is one: the text in between may contain an empty thought.
    short, long = (_render([QUESTION], tokenizer, generation=added) for added in (False, True))
    generation = long.removeprefix(short).strip() if long.startswith(short) else ""
    return generation or between.strip()


def _turn_end(after: str, tokenizer: Any) -> list[int]:
    """Ids of the text after a reply, up to the first token that ends a turn.

    If no token ends a turn, EOS is added.
    """
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
