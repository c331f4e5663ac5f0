"""Encodes prompts and ground truths as token ids, as TRL and the policy do.

A completion is sampled token by token after the prompt's ids, so no token spans the boundary
between prompt and completion. The ground truth must have the same form: the ids of the prompt as
TRL makes them, then the ids of the ground truth alone, then the token that ends a finished
completion. (Tokenizing prompt + ground truth as one text could merge tokens at the boundary.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_ebft.data.special_tokens import endings_of
from hf_ebft.data.thinking import answer_start
from hf_ebft.structured.multi_turn import unfold

logger = logging.getLogger(__name__)

# Some tokenizers add a space before a text. This text is put before it; it merges with nothing.
SEAM = "\n"


@dataclass(frozen=True)
class Example:
    """A prompt and its ground truth as token ids.

    Attributes:
        prompt_ids: the prompt as TRL passes it to the policy.
        truth_ids: the ground-truth completion, including the end-of-sequence token.
        is_target: for each of `truth_ids`, whether it counts for the cross-entropy. Messages of
            others within a ground truth do not count, nor does anything before `answer_start`.
        answer_start: index in `truth_ids` from which on it is embedded; above 0 if thinking is left
            out.
    """

    prompt_ids: tuple[int, ...]
    truth_ids: tuple[int, ...]
    is_target: tuple[bool, ...]
    answer_start: int = 0


class ExampleEncoder:
    """Encodes prompts as TRL does, and ground truths as if the policy had written them.

    Args:
        tokenizer: the policy's tokenizer.
        eos_token_ids: ids that end a completion, in addition to the tokenizer's.
        chat_template_kwargs: TRL's arguments for the chat template.
        vocabulary_size: number of rows of the policy's embedding. Default: not checked.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: Iterable[int] = (),
        chat_template_kwargs: dict[str, Any] | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                f"processing_class is a {type(tokenizer).__name__}; structured mode embeds text "
                "only and needs the policy's tokenizer."
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer has no eos_token, so completions and ground truths could not end; "
                "set tokenizer.eos_token."
            )
        self.tokenizer = tokenizer
        self._eos = int(tokenizer.eos_token_id)
        self._ends = {self._eos, *eos_token_ids}
        self._template_options = chat_template_kwargs or {}
        self._vocabulary_size = vocabulary_size
        self._noted_second_bos = False
        self._prepends_space = self._decode(self._ids("a") + self._ids("b")) != "ab"

    def encode(
        self,
        prompts: Sequence[Any],
        truths: Sequence[Any],
        embed_thinking: Sequence[bool | None] | None = None,
    ) -> list[Example]:
        """Encode rows; equal neighbours (the completions of a prompt) are encoded once.

        Args:
            prompts: texts, or conversations as lists of messages.
            truths: ground-truth completions: texts; after a conversation also lists of messages,
                or of replies, one for each message of the user in the prompt.
            embed_thinking: false if thinking is left out of the features. This includes the empty
                thinking block that templates of reasoning models write before an answer. None, for
                all rows or for one: thinking is embedded.

        Raises:
            ValueError: a row that cannot be encoded, with the reason.
        """
        thinking = [None] * len(prompts) if embed_thinking is None else embed_thinking
        rows = list(zip(prompts, truths, thinking, strict=True))
        examples: list[Example] = []
        for index, row in enumerate(rows):
            same = index > 0 and row == rows[index - 1]
            examples.append(examples[-1] if same else self._encode_one(*row))
        return examples

    def _encode_one(self, prompt: Any, truth: Any, embed_thinking: bool | None) -> Example:
        if not isinstance(prompt, (str, list)) or prompt == []:
            what = "an empty list" if prompt == [] else f"a {type(prompt).__name__}"
            raise ValueError(
                f"The prompt with the ground truth {_shown(truth)} is {what}; it must be a text or "
                "a list of messages."
            )
        for value in (prompt, truth):
            _refuse_unreadable(value, prompt)
        if not isinstance(truth, str) and not (isinstance(truth, list) and truth):
            raise ValueError(
                f"The ground truth of the prompt {_shown(prompt)} is {truth!r}; it must be a text "
                "or a list of messages. Filter out rows without one."
            )
        if embed_thinking not in (None, True, False):  # a text "false" would be true
            raise ValueError(
                f"The row with the prompt {_shown(prompt)} has embed_thinking={embed_thinking!r}; "
                "make it true or false, or leave it unset."
            )
        if isinstance(prompt, str):
            prompt_ids = list(self.tokenizer(text=prompt)["input_ids"])
            self._note_second_bos(prompt_ids, prompt)
            self._refuse_inner_end(truth, prompt)
            pieces = [(self._text_ids(prompt, truth), True)]
        else:
            if isinstance(truth, str):
                truth = [{"role": "assistant", "content": truth}]
            elif isinstance(truth[0], str):
                prompt, truth = unfold(prompt, truth)
            prompt_ids = self._prompt_ids(prompt)
            pieces = self._turns(prompt, truth)
        example = Example(
            prompt_ids=tuple(prompt_ids),
            truth_ids=tuple(token for ids, _ in pieces for token in ids),
            is_target=tuple(target for ids, target in pieces for _ in ids),
        )
        self._refuse_unknown_ids(example, prompt, truth)
        leaves_out = embed_thinking is not None and not embed_thinking
        return self._without_thinking(example, prompt) if leaves_out else example

    def _refuse_unknown_ids(self, example: Example, prompt: Any, truth: Any) -> None:
        """Raise for rows that the policy's embedding cannot read."""
        if not example.prompt_ids:
            raise ValueError(
                f"The prompt {_shown(prompt)} with the ground truth {_shown(truth)} has no token, "
                "so the first token of a completion cannot be predicted. Use a prompt with text, "
                "or a tokenizer that begins with BOS."
            )
        highest = max(example.prompt_ids + example.truth_ids)
        if self._vocabulary_size is not None and highest >= self._vocabulary_size:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise ValueError(
                f"The row with the prompt {_shown(prompt)} has the token {token!r} (id {highest}), "
                f"but the model's embedding has {self._vocabulary_size} rows only. Call "
                "model.resize_token_embeddings(len(tokenizer)), or use the model's own tokenizer."
            )

    def _without_thinking(self, example: Example, prompt: Any) -> Example:
        """The example with only its answer embedded and counted by the cross-entropy."""
        if not all(example.is_target):
            raise ValueError(
                f"The prompt {_shown(prompt)} has embed_thinking=False and a ground truth of "
                "several turns. Thinking can be left out before one answer only; remove it from "
                "such rows and leave embed_thinking unset, or train on the last turn alone."
            )
        ids = example.truth_ids
        start = answer_start(example.prompt_ids, ids, self.tokenizer)
        if start > 0 and self._holds_only_ends(ids[start:]):
            raise ValueError(
                f"The ground truth of the prompt {_shown(prompt)} has embed_thinking=False and no "
                "answer after its thinking. Filter out rows without an answer."
            )
        return replace(
            example,
            is_target=tuple(index >= start for index in range(len(ids))),
            answer_start=start,
        )

    def _note_second_bos(self, prompt_ids: list[int], prompt: str) -> None:
        """Log once that TRL passes the policy a prompt with two BOS tokens."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt_ids[:2] == [bos, bos] and not self._noted_second_bos:
            self._noted_second_bos = True
            logger.warning(
                "The prompt %s begins with BOS, and the tokenizer adds another one. Remove it from "
                "rendered prompts, or pass the messages (EBFTGRPOTrainer removes it).",
                _shown(prompt),
            )

    def _prompt_ids(self, prompt: list[dict[str, Any]]) -> list[int]:
        encoded: Any = self.tokenizer.apply_chat_template(
            conversation=[prompt],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **self._template_options,
        )
        return list(encoded["input_ids"][0])

    def _text_ids(self, prompt: str, truth: Any) -> list[int]:
        """Ids of a ground truth after a prompt that is a text, including its end."""
        if not isinstance(truth, str):
            raise ValueError(
                f"The prompt {_shown(prompt)} is a text, but its ground truth is a list of "
                "messages; make both texts or both messages."
            )
        _, end = endings_of(self.tokenizer).of_completion(prompt, truth)
        # After a rendered chat the template's end of turn, if sampling stops there; else EOS.
        end = end if end and end[-1] in self._ends else [self._eos]
        return self._ended(self._continuation_ids(truth), end)

    def _turns(
        self, prompt: list[dict[str, Any]], messages: list[dict[str, Any]]
    ) -> list[tuple[list[int], bool]]:
        """Token ids of the ground truth's messages, and whether an assistant wrote them."""
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"The ground truth of the prompt {_shown(prompt)} ends with a message of the "
                f"{messages[-1]['role']}; it must end with one of the assistant."
            )
        pieces: list[tuple[list[int], bool]] = []
        text = self._render(prompt, generation=True)
        for end, message in enumerate(messages, start=1):
            by_assistant = message["role"] == "assistant"
            next_by_assistant = end < len(messages) and messages[end]["role"] == "assistant"
            longer = self._render(
                prompt + messages[:end], generation=not by_assistant and next_by_assistant
            )
            if not longer.startswith(text):
                raise ValueError(
                    "The chat template changes earlier messages when another one follows, so the "
                    f"ground truth does not continue the prompt: {_shown(longer)} does not begin "
                    f"with {_shown(text)}. Use a template that does not change them (see "
                    "chat_template_kwargs), or render prompt and ground truth to texts in the "
                    "dataset."
                )
            ids = self._continuation_ids(longer[len(text) :])
            text = longer
            if not by_assistant:
                pieces.append((ids, False))
                continue
            for part in message.values():
                self._refuse_inner_end(part, prompt)
            # A completion ends with its end-of-turn token; text that templates write after it (a
            # newline, a second end token) does not belong to a turn.
            ended = self._ended(ids)
            pieces.append((ended, True))
            if end < len(messages):
                pieces.append((ids[len(ended) :], False))
        return pieces

    def _ended(self, ids: list[int], end: Sequence[int] = ()) -> list[int]:
        """The ids up to the first token at which sampling stops; else with `end` (or EOS) added."""
        for place, token in enumerate(ids):
            if token in self._ends:
                return ids[: place + 1]
        return [*ids, *(end or [self._eos])]

    def _refuse_inner_end(self, text: Any, prompt: Any) -> None:
        """Raise if a text continues after a token at which every completion ends."""
        if not isinstance(text, str):
            return
        ids = self._ids(text)
        ended = self._ended(ids)
        if len(ended) < len(ids) and not self._holds_only_ends(ids[len(ended) :]):
            token = self.tokenizer.convert_ids_to_tokens(ended[-1])
            raise ValueError(
                f"The ground truth of the prompt {_shown(prompt)} continues after {token!r}, but "
                f"every completion ends there: {_shown(text)}. Cut it there, or write the token "
                "in another way."
            )

    def _holds_only_ends(self, ids: Sequence[int]) -> bool:
        """Whether the ids are end tokens and space only."""
        return not self._decode([token for token in ids if token not in self._ends]).strip()

    def _render(self, messages: list[dict[str, Any]], *, generation: bool) -> str:
        rendered = self.tokenizer.apply_chat_template(
            conversation=messages,
            add_generation_prompt=generation,
            tokenize=False,
            **self._template_options,
        )
        assert isinstance(rendered, str)
        return rendered

    def _continuation_ids(self, text: str) -> list[int]:
        """Ids of a text that continues another one, without the space that some tokenizers add."""
        if not self._prepends_space:
            return self._ids(text)
        seam, ids = self._ids(SEAM), self._ids(SEAM + text)
        if ids[: len(seam)] != seam:
            raise ValueError(
                f"The tokenizer merges a newline with the text {_shown(text)}, so the ids of the "
                "text cannot be separated; use a tokenizer that splits at newlines."
            )
        return ids[len(seam) :]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text=text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        decoded = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(decoded, str)
        return decoded


def text_of(truth: Any) -> str:
    """A ground truth as text, for tables."""
    if isinstance(truth, str):
        return truth
    return "\n".join(part if isinstance(part, str) else str(part["content"]) for part in truth)


def _refuse_unreadable(value: Any, prompt: Any) -> None:
    """Raise for text that is not valid Unicode, and for parts of messages that are not text."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The row with the prompt {_shown(prompt)} contains {value[error.start]!r}, a lone "
                "surrogate (half of a character). Repair the text, or filter out the row."
            ) from error
    elif isinstance(value, Mapping):
        kind = value.get("type", "text")
        if "content" not in value and kind != "text":
            raise ValueError(
                f"The row with the prompt {_shown(prompt)} contains a part of type {kind!r}, but "
                "the feature network reads text only. Filter out such rows."
            )
        for part in value.values():
            _refuse_unreadable(part, prompt)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _refuse_unreadable(part, prompt)


def _shown(value: Any, most: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."
