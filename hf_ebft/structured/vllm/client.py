"""Talks to a stock vLLM server over HTTP: bounded retries, checked answers, clear errors.

Whatever goes wrong ends in a right answer or in a `VLLMServerError`; a completion is never replaced
by an empty one. Only the standard library is used, and no proxy of the environment: the server is a
machine of one's own.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_ebft.structured.vllm.settings import VLLMServerArguments

logger = logging.getLogger(__name__)

LONGEST_WAIT = 30.0
"""Seconds between two tries of a request, at most; the first wait is one second."""
POLL = 1.0
"""Seconds between two looks at a server that is not up yet."""
PROGRESS_EVERY = 15.0
"""Seconds between two progress messages while waiting."""
TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
CLAMPED_LOG_PROB = -9999.0
"""What vLLM writes for log-probs at or below it, minus infinity among them."""


class VLLMServerError(RuntimeError):
    """Something between the trainer and the vLLM server went wrong, in words for its user."""


class ServerGone(VLLMServerError):
    """The server went away; when it is back, the weights can be sent again."""


class ServerUnavailable(ServerGone):
    """No usable answer, after all retries: the server is down, restarting or out of reach."""


class RequestRefused(VLLMServerError):
    """The server understood the request and will not do it.

    Attributes:
        status: of the HTTP answer.
        reason: the server's own message.
    """

    def __init__(self, status: int, reason: str, what: str) -> None:
        super().__init__(f"the vLLM server refused to {what} ({status}): {reason}")
        self.status = status
        self.reason = reason


class ModelNotServed(RequestRefused, ServerGone):
    """The server does not know a model or adapter that it was given earlier: it was restarted."""


class BadAnswer(VLLMServerError):
    """The server answered, and the answer lacks something that training needs."""


@dataclass(frozen=True)
class Sampling:
    """How to sample one prompt.

    Attributes:
        max_tokens: most tokens of a completion.
        temperature: log-probs are at it, too; 0 is greedy.
        stop_token_ids: tokens that end a completion and belong to it.
        seed: of the server's random numbers for this prompt.
        ignore_stop: sample ``max_tokens`` tokens whatever they are.
    """

    max_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_stop: bool = False


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        token_ids: with the stop token, if it ended by one; never empty.
        log_probs: of these tokens under the sampled distribution, in nats, as many as tokens.
        finish_reason: "stop" or "length".
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str

    def beginning(self, tokens: int) -> Completion:
        """Its first tokens, at most so many."""
        return replace(self, token_ids=self.token_ids[:tokens], log_probs=self.log_probs[:tokens])


@dataclass(frozen=True)
class ServedModel:
    """The base model of a server."""

    name: str
    path: str
    max_length: int | None


class VLLMClient:
    """Requests to one server. Safe to use from several threads.

    Args:
        settings: address, timeouts, retries.
        pause: sleeps for so many seconds; tests hand in something faster.
    """

    def __init__(
        self, settings: VLLMServerArguments, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self.url = settings.vllm_url
        self._settings = settings
        self._pause = pause
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.retries_done = 0

    # ---- Is it there, and what is it ---------------------------------------------------------

    def wait_until_ready(self) -> None:
        """Wait for the server to answer, with a message now and then.

        Raises:
            VLLMServerError: it is not up after ``vllm_server_timeout`` seconds.
        """
        timeout = self._settings.vllm_server_timeout
        started = time.monotonic()
        reported = started
        while True:
            try:
                self._once("GET", "/health", None, min(timeout, 10.0))
                return
            except (ServerUnavailable, RequestRefused) as error:
                cause = error
            now = time.monotonic()
            if now - started >= timeout:
                raise VLLMServerError(
                    f"no vLLM server is up at {self.url} after {timeout:g} s ({cause}). Start one "
                    "with `python examples/serve_vllm.py --config YOUR.yaml`, check "
                    "vllm_server_base_url, or raise vllm_server_timeout for a model that loads "
                    "slowly."
                )
            if now - reported >= PROGRESS_EVERY:
                reported = now
                logger.warning(
                    "waiting for the vLLM server at %s: %.0f of %g s (%s)",
                    self.url,
                    now - started,
                    timeout,
                    cause,
                )
            self._pause(POLL)

    def base_model(self) -> ServedModel:
        """The base model that the server was started with.

        Raises:
            VLLMServerError: there are several and none is named, or the named one is not there.
        """
        answer = self._request("GET", "/v1/models", None, "list its models")
        try:
            models = [
                ServedModel(str(entry["id"]), str(entry["root"]), entry.get("max_model_len"))
                for entry in answer["data"]
                if entry.get("parent") is None
            ]
        except (KeyError, TypeError) as error:
            raise BadAnswer(
                f"what answers at {self.url}/v1/models is no vLLM server: {answer!r:.300}"
            ) from error
        wanted = self._settings.vllm_served_model_name
        names = ", ".join(model.name for model in models)
        if wanted is not None:
            models = [model for model in models if model.name == wanted]
            if not models:
                raise VLLMServerError(
                    f"the vLLM server at {self.url} serves {names}, not "
                    f"vllm_served_model_name={wanted!r}."
                )
        if not models:
            raise BadAnswer(f"the vLLM server at {self.url} serves no base model.")
        # Several --served-model-name are names of one model.
        if len({model.path for model in models}) > 1:
            raise VLLMServerError(
                f"the vLLM server at {self.url} serves several models ({names}); name one in "
                "vllm_served_model_name."
            )
        return models[0]

    def start_time(self) -> float | None:
        """When the server's process started (seconds since 1970); tells a restarted one.

        None where the server does not say, as behind several API server processes.
        """
        try:
            text = self._request("GET", "/metrics", None, "show its metrics", as_text=True)
        except RequestRefused:
            return None
        found = re.search(r"^process_start_time_seconds (\S+)$", text, re.MULTILINE)
        return None if found is None else float(found.group(1))

    def device(self) -> str | None:
        """The kind of device that the server computes on; None where it does not say.

        Only a server in development mode says.
        """
        path = "/server_info?config_format=json"
        try:
            answer = self._request("GET", path, None, "tell its configuration")
            return str(answer["vllm_config"]["device_config"]["device"])
        except (RequestRefused, KeyError, TypeError):
            return None

    def tokenize(self, model: str, text: str) -> list[int]:
        """Token ids of a text by the server's tokenizer, without special tokens around it."""
        payload = {"model": model, "prompt": text, "add_special_tokens": False}
        answer = self._request("POST", "/tokenize", payload, "tokenize a text")
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list):
            raise BadAnswer(f"{self.url}/tokenize answered without tokens: {answer!r:.300}")
        return tokens

    # ---- Weights -----------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str) -> None:
        """Let the server load an adapter from a folder, under a name it has not had yet."""
        payload = {"lora_name": name, "lora_path": path}
        try:
            # A refusal of an adapter comes as status 500 as well: trying again would not help.
            self._request(
                "POST",
                "/v1/load_lora_adapter",
                payload,
                f"load the adapter {name} from {path}",
                transient=(),
                as_text=True,
            )
        except RequestRefused as error:
            # The answer to an earlier try was lost on its way.
            if "already been loaded" in error.reason:
                return
            if error.status in (404, 405) and "No adapter found" not in error.reason:
                raise VLLMServerError(
                    f"{error}. The server must run with --enable-lora and with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; examples/serve_vllm.py starts it so."
                ) from error
            if "No adapter found" in error.reason:
                raise VLLMServerError(
                    f"{error}. Does the server see this folder? vllm_sync_dir must lie on a disk "
                    "of both machines; where the server's has another path for it, set "
                    "vllm_sync_dir_on_server."
                ) from error
            raise

    def unload_adapter(self, name: str) -> None:
        """Let the server forget an adapter; one that it does not know is fine."""
        try:
            self._request(
                "POST",
                "/v1/unload_lora_adapter",
                {"lora_name": name},
                f"unload the adapter {name}",
                as_text=True,
            )
        except RequestRefused as error:
            if error.status != 404:
                raise

    def reload_weights(self, path: str) -> None:
        """Replace the server's weights by those in a folder, while no request is under way."""
        hint = (
            "Full weights need a server in development mode (VLLM_SERVER_DEV_MODE=1); "
            "examples/serve_vllm.py starts it so."
        )
        try:
            self._request("POST", "/pause?mode=wait", {}, "pause", as_text=True)
            try:
                self._request(
                    "POST",
                    "/collective_rpc",
                    {"method": "reload_weights", "kwargs": {"weights_path": path}},
                    f"reload its weights from {path}",
                    transient=(),
                    as_text=True,
                )
            finally:
                self._request("POST", "/resume", {}, "resume", as_text=True)
        except RequestRefused as error:
            raise VLLMServerError(f"{error} {hint}") from error

    # ---- Sampling ----------------------------------------------------------------------------

    def complete(
        self, model: str, prompt: Sequence[int], count: int, sampling: Sampling
    ) -> list[Completion]:
        """Sample completions of one prompt.

        Args:
            model: name of the base model or of an adapter.
            prompt: token ids.
            count: how many completions.
            sampling: how.

        Returns:
            ``count`` completions.

        Raises:
            ModelNotServed: the server does not know the model (any more).
            RequestRefused: the server will not do it, with its message.
            BadAnswer: something is missing in the answer.
            ServerUnavailable: no answer after all retries.
        """
        # Everything that the server would otherwise take from the model's generation_config.json
        # is said: its top_p or repetition_penalty would make another distribution.
        payload = {
            "model": model,
            "prompt": list(prompt),
            "n": count,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": sampling.seed,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": sampling.ignore_stop,
            "logprobs": 0,
            "return_token_ids": True,
            "stream": False,
        }
        return self._request(
            "POST",
            "/v1/completions",
            payload,
            f"sample from {model}",
            read=lambda answer: read_completions(answer, count),
        )

    # ---- Requests ----------------------------------------------------------------------------

    def _request(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None,
        what: str,
        *,
        transient: Sequence[int] = TRANSIENT_STATUSES,
        as_text: bool = False,
        read: Callable[[Any], Any] | None = None,
    ) -> Any:
        """One request, sent again after failures that may pass.

        Args:
            method: GET or POST.
            path: below the server's address.
            payload: of a POST.
            what: the server is asked to do, for messages.
            transient: statuses after which it is sent again.
            as_text: return the body as it is, not parsed.
            read: turns the parsed answer into what is returned; may raise `ServerUnavailable` for
                an answer that another try may mend.
        """
        retries = self._settings.vllm_request_retries
        for attempt in range(retries + 1):
            try:
                body = self._once(method, path, payload, self._settings.vllm_request_timeout)
                answer = body if as_text else parse(body)
                return answer if read is None else read(answer)
            except RequestRefused as error:
                if error.status not in transient:
                    if path == "/v1/completions" and error.status == 404:
                        raise ModelNotServed(error.status, error.reason, what) from error
                    raise RequestRefused(error.status, error.reason, what) from error
                cause: VLLMServerError = error
            except ServerUnavailable as error:
                cause = error
            if attempt < retries:
                wait = min(2.0**attempt, LONGEST_WAIT)
                self.retries_done += 1
                logger.warning(
                    "the vLLM server at %s failed to %s (%s); try %d of %d in %g s",
                    self.url,
                    what,
                    cause,
                    attempt + 2,
                    retries + 1,
                    wait,
                )
                self._pause(wait)
        raise ServerUnavailable(
            f"the vLLM server at {self.url} failed to {what}, {retries + 1} times in a row; the "
            f"last time: {cause}"
        ) from cause

    def _once(self, method: str, path: str, payload: dict[str, Any] | None, timeout: float) -> str:
        """One request, once: the body of its answer.

        Raises:
            RequestRefused: any status that is an error.
            ServerUnavailable: no whole answer.
        """
        request = urllib.request.Request(self.url + path, method=method)
        if payload is not None:
            request.data = json.dumps(payload).encode()
            request.add_header("Content-Type", "application/json")
        if "VLLM_API_KEY" in os.environ:  # the variable that vLLM itself reads
            request.add_header("Authorization", f"Bearer {os.environ['VLLM_API_KEY']}")
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                raise RequestRefused(error.code, message_of(error), f"{method} {path}") from error
        except TimeoutError as error:
            raise ServerUnavailable(f"no answer within {timeout:g} s") from error
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
            raise ServerUnavailable(f"{type(error).__name__}: {error}") from error


def parse(body: str) -> Any:
    """The JSON of an answer; one that was cut short may be whole the next time."""
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise ServerUnavailable(f"an answer that is no JSON: {body!r:.200}") from error


def message_of(error: urllib.error.HTTPError) -> str:
    """The server's own words in an error answer."""
    try:
        body = error.read().decode()
    except (OSError, http.client.HTTPException, UnicodeDecodeError):
        return str(error.reason)
    try:
        content = json.loads(body)
    except json.JSONDecodeError:
        return body.strip() or str(error.reason)
    for key in ("error", "message", "detail"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    return content if isinstance(content, str) else json.dumps(content)


def read_completions(answer: Any, count: int) -> list[Completion]:
    """Check an answer of ``/v1/completions`` and take out what training needs.

    Raises:
        BadAnswer: too few completions, no token ids, no or unusable log-probs.
        ServerUnavailable: completions that were broken off (the server is going down).
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
        raise ServerUnavailable(f"a completion was broken off (finish_reason {reason!r})")
    tokens = choice.get("token_ids")
    if tokens is None:
        raise BadAnswer(
            "the vLLM server sent a completion without token ids, and text cannot be turned back "
            "into the tokens that were sampled; it is too old for `return_token_ids`: install vLLM "
            "0.22 or newer."
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
                f"the vLLM server sent the log-prob {value} for token {tokens[position]}, number "
                f"{position} of its completion: nothing can be sampled with that. Its weights or "
                "activations overflow (float16?) or it filters tokens (a logits processor?)."
            )
    return Completion([int(token) for token in tokens], [float(p) for p in log_probs], reason)
