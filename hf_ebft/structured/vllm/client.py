"""The client of a stock vLLM server: requests completions over HTTP, and lets it load weights.

Every call returns a correct answer or raises a `VLLMServerError`; a completion is never replaced by
an empty one.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from hf_ebft.structured.vllm.answers import (
    Completion,
    ServedModel,
    error_message,
    parse,
    read_completions,
    read_scores,
)
from hf_ebft.structured.vllm.errors import (
    BadAnswer,
    ModelNotServed,
    RequestRefused,
    ServerUnavailable,
    VLLMServerError,
)
from hf_ebft.structured.vllm.settings import SERVE_COMMAND, VLLMServerArguments

logger = logging.getLogger(__name__)

TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which a repeated request may succeed."""
PROGRESS_EVERY = 15.0
"""Seconds between two progress messages while waiting."""
HEALTH_TIMEOUT = 10.0
"""Seconds to wait for an answer of /health."""
CLEANUP_TIMEOUT = 5.0
"""Seconds to wait for each answer at the end of a run; a frozen server never answers."""


@dataclass(frozen=True)
class Sampling:
    """How to sample one prompt.

    Attributes:
        max_tokens: largest number of tokens of a completion.
        temperature: sampling temperature, also that of the log-probs; 0 is greedy.
        stop_token_ids: tokens that end a completion and belong to it.
        seed: seed of the server's random numbers for this prompt.
        ignore_stop: sample `max_tokens` tokens, even after a stop token.
    """

    max_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_stop: bool = False


class VLLMClient:
    """Requests to one server. Safe to use from several threads.

    Args:
        settings: address, timeouts, retries.
        wait: seconds between two checks of a server that is not up yet, and before a request is
            sent for the third time; tests use less.
    """

    def __init__(self, settings: VLLMServerArguments, wait: float = 1.0) -> None:
        # Imported when there is a server: urllib3 is no requirement of the package.
        from hf_ebft.structured.vllm.transport import Transport

        self.url = settings.vllm_url
        self.retries_done = 0
        self._settings = settings
        self._wait = wait
        self._transport = Transport(self.url, settings.vllm_max_concurrent_requests, wait)

    # ---- Is it there, and what is it ---------------------------------------------------------

    def wait_until_ready(self) -> None:
        """Wait until the server answers, and log the progress.

        Raises:
            VLLMServerError: it is not up after `vllm_server_timeout` seconds.
        """
        timeout = self._settings.vllm_server_timeout
        started = time.monotonic()
        reported = started
        while True:
            try:
                patience = min(timeout, HEALTH_TIMEOUT)
                self._request(
                    "GET", "/health", None, "say that it is up", timeout=patience, retries=0
                )
                return
            except (ServerUnavailable, RequestRefused) as error:
                cause = error
            now = time.monotonic()
            if now - started >= timeout:
                raise VLLMServerError(
                    f"no vLLM server is up at {self.url} after {timeout:g} s ({cause}). Start one "
                    f"with `{SERVE_COMMAND} --config YOUR.yaml`, check "
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
            time.sleep(self._wait)

    def base_model(self) -> ServedModel:
        """The base model that the server was started with.

        Raises:
            VLLMServerError: there are several and none is named, or the named one does not exist.
        """
        models = [
            ServedModel(str(entry["id"]), str(entry["root"]), entry.get("max_model_len"))
            for entry in self._models()
            if entry.get("parent") is None
        ]
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
        # Several values of --served-model-name are names of the same model.
        if len({model.path for model in models}) > 1:
            raise VLLMServerError(
                f"the vLLM server at {self.url} serves several models ({names}); name one in "
                "vllm_served_model_name."
            )
        return models[0]

    def adapter_names(self) -> list[str]:
        """Names of the adapters that the server has."""
        return [str(entry["id"]) for entry in self._models() if entry.get("parent") is not None]

    def _models(self) -> list[dict[str, Any]]:
        answer = parse(self._request("GET", "/v1/models", None, "list its models"))
        entries = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(entries, list) or not all({"id", "root"} <= set(one) for one in entries):
            raise BadAnswer(
                f"what answers at {self.url}/v1/models is no vLLM server: {answer!r:.300}"
            )
        return entries

    def start_time(self) -> float | None:
        """The start time of the server's process in seconds since 1970, which a restart changes.

        None if the server does not report it, as with several API server processes.
        """
        try:
            text = self._request("GET", "/metrics", None, "show its metrics")
        except RequestRefused:
            return None
        found = re.search(r"^process_start_time_seconds (\S+)$", text, re.MULTILINE)
        return None if found is None else float(found.group(1))

    def device(self) -> str | None:
        """The kind of device that the server runs on; None unless it is in development mode."""
        path = "/server_info?config_format=json"
        try:
            answer = parse(self._request("GET", path, None, "tell its configuration"))
            return str(answer["vllm_config"]["device_config"]["device"])
        except (RequestRefused, KeyError, TypeError):
            return None

    def tokenize(self, model: str, text: str) -> list[int]:
        """Token ids of a text by the server's tokenizer, without special tokens around it."""
        payload = {"model": model, "prompt": text, "add_special_tokens": False}
        answer = parse(self._request("POST", "/tokenize", payload, "tokenize a text"))
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list):
            raise BadAnswer(f"{self.url}/tokenize answered without tokens: {answer!r:.300}")
        return tokens

    # ---- Weights -----------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str) -> None:
        """Let the server load an adapter from a folder, under a name that is new to it."""
        payload = {"lora_name": name, "lora_path": path}
        try:
            # A server that refuses an adapter also answers with status 500: do not try again.
            self._request(
                "POST",
                "/v1/load_lora_adapter",
                payload,
                f"load the adapter {name} from {path}",
                transient=(),
            )
        except RequestRefused as error:
            # An earlier request succeeded, but its answer was lost.
            if "already been loaded" in error.reason:
                return
            if error.status in (404, 405) and "No adapter found" not in error.reason:
                raise VLLMServerError(
                    f"{error}. The server must run with --enable-lora and with "
                    f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; `{SERVE_COMMAND}` starts it so."
                ) from error
            if "No adapter found" in error.reason:
                raise VLLMServerError(
                    f"{error}. Does the server see this folder? vllm_sync_dir must lie on a disk "
                    "of both machines; where the server's has another path for it, set "
                    "vllm_sync_dir_on_server."
                ) from error
            raise

    def unload_adapter(self, name: str, *, at_the_end: bool = False) -> None:
        """Let the server unload an adapter; it is no error if it does not have it.

        Args:
            name: name of the adapter.
            at_the_end: whether the run is over; then do not wait long for an answer.
        """
        haste: dict[str, Any] = {"timeout": CLEANUP_TIMEOUT, "retries": 0} if at_the_end else {}
        try:
            self._request(
                "POST",
                "/v1/unload_lora_adapter",
                {"lora_name": name},
                f"unload the adapter {name}",
                **haste,
            )
        except RequestRefused as error:
            if error.status != 404:
                raise

    def reload_weights(self, path: str) -> None:
        """Let the server replace its weights by those in a folder, once its requests are done."""
        hint = (
            "Full weights need a server in development mode (VLLM_SERVER_DEV_MODE=1); "
            f"`{SERVE_COMMAND}` starts it so."
        )
        try:
            self._request("POST", "/pause?mode=wait", {}, "pause")
            try:
                self._request(
                    "POST",
                    "/collective_rpc",
                    {"method": "reload_weights", "kwargs": {"weights_path": path}},
                    f"reload its weights from {path}",
                    transient=(),
                )
            except BaseException:
                self._resume_after_failure()
                raise
            self._request("POST", "/resume", {}, "resume")
        except RequestRefused as error:
            raise VLLMServerError(f"{error} {hint}") from error

    def _resume_after_failure(self) -> None:
        """Resume a paused server without waiting long: it may have frozen, or the user pressed
        ctrl-C."""
        try:
            self._request("POST", "/resume", {}, "resume", timeout=CLEANUP_TIMEOUT, retries=0)
        except VLLMServerError as error:
            logger.warning("%s", error)

    # ---- Sampling ----------------------------------------------------------------------------

    def complete(
        self, model: str, prompt: Sequence[int], count: int, sampling: Sampling
    ) -> list[Completion]:
        """Sample completions of one prompt.

        Args:
            model: name of the base model or of an adapter.
            prompt: token ids.
            count: number of completions.
            sampling: how to sample.

        Returns:
            `count` completions.

        Raises:
            ModelNotServed: the server does not know the model (any more).
            RequestRefused: the server refuses the request, with its message.
            BadAnswer: something is missing in the answer.
            ServerUnavailable: there is no answer after all retries.
        """
        # Set every option that the server would otherwise take from the model's
        # generation_config.json: its top_p or repetition_penalty would change the distribution.
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
        return read_completions(self._ask_for_completion(payload, f"sample from {model}"), count)

    def score(self, model: str, tokens: Sequence[int]) -> list[float]:
        """Log-probs of given tokens, each after those before it, in nats at temperature 1.

        Args:
            model: name of the base model or of an adapter.
            tokens: T ids.

        Returns:
            T - 1 of them, for all tokens but the first.

        Raises:
            ServerGone, RequestRefused, BadAnswer: see `complete`.
        """
        payload = {
            "model": model,
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
        }
        answer = self._ask_for_completion(payload, f"score a text by {model}")
        return read_scores(answer, tokens)

    # ---- Requests ----------------------------------------------------------------------------

    def _ask_for_completion(self, payload: dict[str, Any], what: str) -> Any:
        try:
            return parse(self._request("POST", "/v1/completions", payload, what))
        except RequestRefused as error:
            if error.status == 404:
                raise ModelNotServed(error.status, error.reason, what) from error
            raise

    def _request(
        self,
        method: str,
        path: str,
        payload: Any,
        what: str,
        *,
        transient: Collection[int] = TRANSIENT_STATUSES,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> str:
        """The body of an answer.

        Args:
            method: GET or POST.
            path: path below the server's address.
            payload: payload of a POST.
            what: what the server shall do, for messages.
            transient: statuses after which the request is sent again.
            timeout: seconds. Default: `vllm_request_timeout`.
            retries: number of retries. Default: `vllm_request_retries`.

        Raises:
            ServerUnavailable: there is no complete answer, or a transient status after all retries.
            RequestRefused: the answer has another error status.
        """
        failed = f"the vLLM server at {self.url} failed to {what}"
        try:
            answer = self._transport.send(
                method,
                path,
                payload,
                timeout=self._settings.vllm_request_timeout if timeout is None else timeout,
                retries=self._settings.vllm_request_retries if retries is None else retries,
                transient=transient,
            )
        except ServerUnavailable as error:
            raise ServerUnavailable(f"{failed}: {error}") from error
        self.retries_done += answer.retries
        if answer.status < 400:
            return answer.body
        reason = error_message(answer.body)
        if answer.status in transient:
            raise ServerUnavailable(
                f"{failed}, {answer.retries + 1} times in a row; the last time: {answer.status} "
                f"{reason}"
            )
        raise RequestRefused(answer.status, reason, what)
