"""Transforms the columns of common data sets into prompts and ground truths.

Every transform is a plain function of one row, for `dataset.map`:

    dataset = dataset.map(question_answer, with_indices=True, remove_columns=dataset.column_names)

Its settings are keyword arguments (`fn_kwargs={"answer_column": "solution"}`). With
`with_indices=True` its errors name the row. It returns a `prompt`, as text or as chat messages, and
the `ground_truth` to match. `transform_rows` does the same in one call, and can leave out bad rows
and count them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any, Literal

from hf_ebft.data.thinking import join_thinking, split_thinking
from hf_ebft.data.unicode import fault_of

logger = logging.getLogger(__name__)

Message = dict[str, str]
Transform = Callable[..., dict[str, Any]]

#: Names of languages for the translation prompt; the argument `languages` adds others.
LANGUAGES: dict[str, str] = {
    "ar": "Arabic",
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hi": "Hindi",
    "is": "Icelandic",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "zh": "Chinese",
}
#: The instruction of the ALMA models (arXiv 2309.11674).
TRANSLATION_PROMPT = (
    "Translate this from {source_language} to {target_language}:\n"
    "{source_language}: {source}\n"
    "{target_language}:"
)
# Names of the three roles in several chat formats.
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class BadRowError(ValueError):
    """A row cannot be used, but other rows of the data set may be usable."""


class NoRowsError(ValueError):
    """None of the given rows can be used, but other rows of the data set may be usable."""


def question_answer(
    row: Mapping[str, Any],
    index: int | None = None,
    *,
    question_column: str = "input",
    answer_column: str = "output",
    prompt_template: str | None = None,
    chat: bool = False,
    system_prompt: str | None = None,
) -> dict[str, Any]:
    """Transform questions with answers, such as OpenCodeInstruct's `input` and `output`.

    Args:
        row: one row.
        index: number of the row, for messages.
        question_column: column with the question or instruction.
        answer_column: column with the ground truth.
        prompt_template: text with names of columns in braces, such as `"Q: {input}\\nA:"`. Default:
            the question alone.
        chat: make the prompt a chat message of the user.
        system_prompt: a system message before it; needs `chat`.

    Returns:
        `prompt` (text, or messages with `chat`) and `ground_truth` (text).

    Raises:
        ValueError: a column or the template does not fit the data set.
        BadRowError: the question or the answer is missing, blank or not text.
    """
    _refuse_system_prompt(chat, system_prompt)
    if prompt_template is None:
        prompt = _text(row, question_column, index)
    else:
        fields = _fields(prompt_template)
        prompt = prompt_template.format(**{name: _text(row, name, index) for name in fields})
    return {
        "prompt": _chat_prompt(prompt, system_prompt) if chat else prompt,
        "ground_truth": _text(row, answer_column, index),
    }


def translation(
    row: Mapping[str, Any],
    index: int | None = None,
    *,
    source: str,
    target: str,
    translation_column: str = "translation",
    prompt_template: str = TRANSLATION_PROMPT,
    languages: Mapping[str, str] | None = None,
    chat: bool = False,
    system_prompt: str | None = None,
) -> dict[str, Any]:
    """Transform translation pairs, `{"translation": {"de": ..., "en": ...}}`, as in WMT and ALMA.

    Args:
        row: one row.
        index: number of the row, for messages.
        source: code of the language to translate from.
        target: code of the language to translate to.
        translation_column: column with a mapping from language codes to texts.
        prompt_template: text with `{source}`, `{source_language}` and `{target_language}` in
            braces. Default: the instruction of the ALMA models.
        languages: names of further languages by code, in addition to `LANGUAGES`.
        chat: make the prompt a chat message of the user.
        system_prompt: a system message before it; needs `chat`.

    Returns:
        `prompt` and `ground_truth`. Without `chat`, the ground truth begins with a space, since it
        follows the colon of the prompt.

    Raises:
        ValueError: a column, a language or the template does not fit the data set.
        BadRowError: a translation is missing, blank or not text.
    """
    _refuse_system_prompt(chat, system_prompt)
    if source == target:
        raise ValueError(f"source and target are both {source!r}; name two languages.")
    names = LANGUAGES | dict(languages or {})
    for code in (source, target):
        if code not in names:
            raise ValueError(
                f"The name of the language {code!r} is unknown; give it as "
                f"languages={{{code!r}: 'its name'}}."
            )
    pair = _value(row, translation_column, index)
    if not isinstance(pair, Mapping):
        raise BadRowError(
            f"{_where(index)}: column {translation_column!r} contains a {type(pair).__name__}, "
            "not a mapping from language codes to texts."
        )
    values = {
        "source": _text(pair, source, index, within=translation_column),
        "source_language": names[source],
        "target_language": names[target],
    }
    unknown = _fields(prompt_template) - values.keys()
    if unknown:
        raise ValueError(
            f"prompt_template contains {{{sorted(unknown)[0]}}}, which is unknown; use "
            f"{', '.join(f'{{{name}}}' for name in values)}."
        )
    prompt = prompt_template.format(**values)
    answer = _text(pair, target, index, within=translation_column)
    return {
        "prompt": _chat_prompt(prompt, system_prompt) if chat else prompt,
        "ground_truth": answer if chat else f" {answer.lstrip()}",
    }


def chat(
    row: Mapping[str, Any],
    index: int | None = None,
    *,
    messages_column: str = "messages",
    turn: Literal["first", "last", "all"] = "last",
    thinking: Literal["strip", "keep"] | None = None,
) -> dict[str, Any]:
    """Transform chats: lists of messages `{"role", "content"}`, or `{"from", "value"}` (ShareGPT).

    Messages after the last reply of the assistant have no ground truth and are not used.

    Args:
        row: one row.
        index: number of the row, for messages.
        messages_column: column with the messages.
        turn: the reply that is the ground truth. `"first"`: the first one; the prompt is the chat
            before it. `"last"`: the last one; the prompt is the whole chat before it, with the
            earlier replies of the data. `"all"`: all replies, as a list; the prompt is the chat
            without replies, for `hf_ebft.structured.MultiTurnRollouts`, which continues from the
            replies that it has generated.
        thinking: what to do with thinking in replies, which is between `<think>` tags or in the
            `reasoning_content` of a message: `"strip"` or `"keep"`, see `reasoning`. Earlier
            replies in the prompt always lose theirs, as in chat templates. Must be set if a reply
            has thinking; `"strip"` is not possible with `turn="all"`.

    Returns:
        `prompt` (messages), `ground_truth` (text; a list of texts with `"all"`), and
        `embed_thinking` if `thinking` is set.

    Raises:
        ValueError: a column or setting does not fit the data set.
        BadRowError: the chat has no reply, an unknown role or a message without text, or, with
            `"all"`, user and assistant do not take turns.
    """
    if turn not in ("first", "last", "all"):
        raise ValueError(f"turn={turn!r} is unknown; choose first, last or all.")
    _check_thinking(thinking)
    if turn == "all" and thinking == "strip":
        raise ValueError(
            "thinking='strip' needs one answer after the thinking, but chats of several turns "
            "(turn='all') have thinking before each reply; use turn='last', or thinking='keep'."
        )
    messages = [
        _message(message, index, number, messages_column, thinking)
        for number, message in enumerate(_messages(row, messages_column, index))
    ]
    replies = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies:
        raise BadRowError(
            f"{_where(index)}: column {messages_column!r} contains no reply of the assistant."
        )
    result: dict[str, Any]
    if turn == "all":
        _check_turns(messages[: replies[-1] + 1], index, messages_column)
        prompt = [message for message in messages[: replies[-1]] if message["role"] != "assistant"]
        result = {"prompt": prompt, "ground_truth": [messages[n]["content"] for n in replies]}
    else:
        reply = replies[0 if turn == "first" else -1]
        prompt = [_without_thinking(message) for message in messages[:reply]]
        if not any(message["role"] == "user" for message in prompt):
            raise BadRowError(
                f"{_where(index)}: column {messages_column!r} has no message of the user before "
                f"the {turn} reply."
            )
        result = {"prompt": prompt, "ground_truth": messages[reply]["content"]}
    return result if thinking is None else result | {"embed_thinking": thinking == "keep"}


def reasoning(
    row: Mapping[str, Any],
    index: int | None = None,
    *,
    thinking: Literal["strip", "keep"],
    prompt_column: str = "prompt",
    answer_column: str = "ground_truth",
    thinking_column: str | None = None,
) -> dict[str, Any]:
    """Transform answers with thinking, from data for reasoning models.

    `"strip"`: only answers are compared. The thinking is removed from the ground truth here, and
    `embed_thinking=False` tells structured mode to remove it from rollouts before the feature
    network reads them. `"keep"`: both are embedded with their thinking. In both cases the policy
    gradient covers all sampled tokens.

    Args:
        row: one row.
        index: number of the row, for messages.
        thinking: `"strip"` or `"keep"`.
        prompt_column: column with the prompt, text or messages.
        answer_column: column with the reply; its thinking is between `<think>` tags unless there is
            a `thinking_column`.
        thinking_column: a separate column with the thinking, such as `reasoning_content`.

    Returns:
        `prompt`, `ground_truth` (text) and `embed_thinking` (bool).

    Raises:
        ValueError: a column or setting does not fit the data set.
        BadRowError: a value is missing, blank or not text; thinking does not end; or, with
            `"keep"`, the reply has no thinking.
    """
    _check_thinking(thinking)
    answer = _text(row, answer_column, index)
    try:
        thought, answer = split_thinking(answer)
    except ValueError as error:
        raise BadRowError(f"{_where(index)}: column {answer_column!r}: {error}") from error
    if thinking_column is not None:
        if thought is not None:
            raise BadRowError(
                f"{_where(index)}: thinking is in {answer_column!r} and in {thinking_column!r}; "
                "keep it in one of them."
            )
        thought = _text(row, thinking_column, index)
    if not answer.strip():
        raise BadRowError(f"{_where(index)}: column {answer_column!r} has no answer.")
    if thinking == "keep":
        if thought is None:
            raise BadRowError(f"{_where(index)}: column {answer_column!r} has no thinking to keep.")
        answer = join_thinking(thought, answer)
    return {
        "prompt": _value(row, prompt_column, index),
        "ground_truth": answer,
        "embed_thinking": thinking == "keep",
    }


#: The transforms by name, for configuration files.
TRANSFORMS: dict[str, Transform] = {
    "question_answer": question_answer,
    "translation": translation,
    "chat": chat,
    "reasoning": reasoning,
}


def transform_rows(
    rows: Any,
    transform: Transform,
    *,
    bad_rows: Literal["raise", "skip"] = "raise",
    **settings: Any,
) -> Any:
    """Apply a transform to all rows; columns that it does not return are dropped.

    Args:
        rows: a `datasets.Dataset`, or a list of rows.
        transform: a function of a row and its number, such as those of this module.
        bad_rows: `"raise"` the first `BadRowError`, or `"skip"` such rows and log their number and
            the first reason. Settings that do not fit are errors in both cases.
        settings: passed to the transform.

    Returns:
        The transformed rows: a `datasets.Dataset` or a list, like `rows`.

    Raises:
        ValueError: there are no rows, or none can be used.
    """
    if bad_rows not in ("raise", "skip"):
        raise ValueError(f"bad_rows={bad_rows!r} is unknown; choose raise or skip.")
    total = len(rows)
    if total == 0:
        raise ValueError("There are no rows to transform; check the path and the split.")
    is_dataset = hasattr(rows, "map")
    kept = rows
    if bad_rows == "skip":
        good, reason = _good_rows(rows, transform, settings)
        if not good:
            raise NoRowsError(f"None of {total} rows can be used. {reason}")
        if len(good) < total:
            logger.warning("%d of %d rows were left out. %s", total - len(good), total, reason)
            kept = rows.select(good) if is_dataset else [rows[number] for number in good]
    if is_dataset:
        return kept.map(
            transform, with_indices=True, fn_kwargs=settings, remove_columns=kept.column_names
        )
    return [transform(row, number, **settings) for number, row in enumerate(kept)]


def _good_rows(
    rows: Any, transform: Transform, settings: dict[str, Any]
) -> tuple[list[int], str | None]:
    """Numbers of the rows that can be used, and the reason why the first other one cannot."""
    good, reason = [], None
    for number, row in enumerate(rows):
        try:
            transform(row, number, **settings)
            good.append(number)
        except BadRowError as error:
            reason = reason or str(error)
    return good, reason


def _where(index: int | None) -> str:
    return "A row" if index is None else f"Row {index}"


def _value(row: Mapping[str, Any], column: str, index: int | None) -> Any:
    if column not in row:
        listed = ", ".join(map(repr, row))
        raise ValueError(f"{_where(index)} has no column {column!r}; it has {listed}.")
    return row[column]


def _text(
    row: Mapping[str, Any], column: str, index: int | None, *, within: str | None = None
) -> str:
    """A text that is not blank; `within` names the column whose entry `column` is."""
    name = f"column {column!r}" if within is None else f"{column!r} of column {within!r}"
    if within is None or column in row:
        value = _value(row, column, index)
    else:
        raise BadRowError(f"{_where(index)}: {name} is missing; it has {', '.join(row)}.")
    if isinstance(value, (list, tuple)) and index is None and within is None:
        raise ValueError(
            f"{name} contains a list: transforms take one row at a time, so leave batched=False."
        )
    if not isinstance(value, str):
        raise BadRowError(f"{_where(index)}: {name} contains a {type(value).__name__}, not text.")
    if not value.strip():
        raise BadRowError(f"{_where(index)}: {name} is blank.")
    if (fault := fault_of(value)) is not None:
        raise BadRowError(f"{_where(index)}: {name} {fault}")
    return value


def _fields(template: str) -> set[str]:
    """The names in braces in a template."""
    names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    if not names or not all(name.isidentifier() for name in names):
        raise ValueError(
            f"prompt_template={template!r} must contain names of columns in braces, such as "
            "{input}; write {{ and }} for literal braces."
        )
    return names


def _refuse_system_prompt(chat: bool, system_prompt: str | None) -> None:
    if system_prompt is not None and not chat:
        raise ValueError(
            "system_prompt needs chat=True; for plain-text prompts, put it into prompt_template."
        )


def _chat_prompt(prompt: str, system_prompt: str | None) -> list[Message]:
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": prompt}]


def _check_thinking(thinking: str | None) -> None:
    if thinking not in (None, "strip", "keep"):
        raise ValueError(f"thinking={thinking!r} is unknown; choose strip or keep.")


def _messages(row: Mapping[str, Any], column: str, index: int | None) -> Sequence[Any]:
    messages = _value(row, column, index)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadRowError(f"{_where(index)}: column {column!r} contains no list of messages.")
    if isinstance(messages[0], (list, tuple)) and index is None:
        raise ValueError(
            f"column {column!r} contains a list of chats: transforms take one row at a time, so "
            "leave batched=False."
        )
    return messages


def _message(
    message: Any, index: int | None, number: int, column: str, thinking: str | None
) -> Message:
    """A message with role and content, from any of the known formats."""
    where = f"{_where(index)}: message {number} of column {column!r}"
    if not isinstance(message, Mapping):
        raise BadRowError(f"{where} is a {type(message).__name__}, not a role with content.")
    name = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if name not in _ROLES:
        raise BadRowError(
            f"{where} has the role {name!r}; the known roles are {', '.join(_ROLES)}. Tool calls "
            "are not supported."
        )
    role = _ROLES[name]
    if not isinstance(content, str) or not content.strip():
        raise BadRowError(f"{where} ({role}) has no text.")
    if (fault := fault_of(content)) is not None:
        raise BadRowError(f"{where} ({role}) {fault}")
    if role == "assistant":
        content = _reply(content, message.get("reasoning_content"), where, thinking)
    return {"role": role, "content": content}


def _reply(content: str, thought: str | None, where: str, thinking: str | None) -> str:
    """A reply with or without its thinking."""
    try:
        inner, answer = split_thinking(content)
    except ValueError as error:
        raise BadRowError(f"{where}: {error}") from error
    thought = thought or inner
    if thought is None:
        return content
    if thinking is None:
        raise ValueError(
            f"{where} contains thinking, but the option thinking is not set; set thinking='strip' "
            "(only answers are compared) or thinking='keep'."
        )
    if not answer.strip():
        raise BadRowError(f"{where} has no answer after its thinking.")
    return join_thinking(thought, answer) if thinking == "keep" else answer


def _without_thinking(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    return {"role": "assistant", "content": split_thinking(message["content"])[1]}


def _check_turns(messages: Sequence[Message], index: int | None, column: str) -> None:
    """Raise unless the roles are user, assistant, user, ... after at most one system message."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadRowError(
            f"{_where(index)}: column {column!r} has the roles {', '.join(roles)}; for turn='all', "
            "user and assistant must take turns, after at most one system message."
        )
