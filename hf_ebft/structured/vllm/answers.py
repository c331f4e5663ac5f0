"""Checks and reads the server's answers: completions, the base model, error messages."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_ebft.structured.vllm.errors import BadAnswer, ServerUnavailable

CLAMPED_LOG_PROB = -9999.0
"""What vLLM writes for log-probs at or below it, minus infinity among them."""


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        token_ids: including the stop token if the completion ended with one; never empty.
        log_probs: log-probs of these tokens under the sampled distribution, in nats.
        finish_reason: "stop" or "length".
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str

    def beginning(self, tokens: int) -> Completion:
        """The first tokens of the completion, at most this many."""
        return replace(self, token_ids=self.token_ids[:tokens], log_probs=self.log_probs[:tokens])


@dataclass(frozen=True)
class ServedModel:
    """The base model of a server."""

    name: str
    path: str
    max_length: int | None


def parse(body: str) -> Any:
    """The JSON of an answer.

    Raises:
        ServerUnavailable: an answer that was cut short, or another server's.
    """
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise ServerUnavailable(f"an answer that is not valid JSON: {body!r:.200}") from error


def error_message(body: str) -> str:
    """The error message in an error answer."""
    try:
        content = json.loads(body)
    except json.JSONDecodeError:
        return body.strip()
    for key in ("error", "message", "detail"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    return content if isinstance(content, str) else json.dumps(content)


def read_completions(answer: Any, count: int) -> list[Completion]:
    """Check an answer of `/v1/completions` and extract what training needs.

    Raises:
        BadAnswer: there are too few completions, no token ids, or no usable log-probs.
        ServerUnavailable: completions were aborted, since the server is shutting down.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != count:
        found = len(choices) if isinstance(choices, list) else "none"
        raise BadAnswer(f"the vLLM server was asked for {count} completions and sent {found}.")
    return [read_choice(choice) for choice in sorted(choices, key=lambda choice: choice["index"])]


def read_choice(choice: dict[str, Any]) -> Completion:
    """Check one choice of an answer; see `read_completions`."""
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise ServerUnavailable(f"a completion was aborted (finish_reason {reason!r})")
    tokens = choice.get("token_ids")
    if tokens is None:
        raise BadAnswer(
            "the vLLM server sent a completion without token ids, and the sampled tokens cannot be "
            "recovered from text; the server is too old for `return_token_ids`: install vLLM 0.22 "
            "or newer."
        )
    log_probs = (choice.get("logprobs") or {}).get("token_logprobs")
    if log_probs is None or len(log_probs) != len(tokens):
        found = "no" if log_probs is None else str(len(log_probs))
        raise BadAnswer(
            f"the vLLM server sent {len(tokens)} tokens with {found} log-probs; without them the "
            "importance ratio is unknown."
        )
    if not tokens:
        raise BadAnswer("the vLLM server sent a completion without any token.")
    for position, value in enumerate(log_probs):
        if value is None or not math.isfinite(value) or not CLAMPED_LOG_PROB < value <= 1e-3:
            raise BadAnswer(
                f"the vLLM server sent the log-prob {value} for token {tokens[position]} at "
                f"position {position} of its completion, but a token of that probability cannot "
                "have been sampled. Its weights or activations overflow (float16?), or it filters "
                "tokens (a logits processor?)."
            )
    return Completion([int(token) for token in tokens], [float(p) for p in log_probs], reason)


def read_scores(answer: Any, tokens: Sequence[int]) -> list[float]:
    """Log-probs of a prompt's tokens, except the first.

    Raises:
        BadAnswer: they are missing.
    """
    try:
        entries = answer["choices"][0]["prompt_logprobs"]
        return [
            float(entry[str(token)]["logprob"])
            for entry, token in zip(entries[1:], tokens[1:], strict=True)
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadAnswer(
            "the vLLM server was asked for the log-probs of a prompt but sent something else: "
            f"{answer!r:.300}"
        ) from error
