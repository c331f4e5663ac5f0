"""HTTP with urllib3, and the rule when a request is sent again.

urllib3 is used, and not requests, which is built on it: urllib3 also repeats a request whose answer
breaks off in its body, threads may share its connections, and it reads no proxy or password from
the environment (the server is the user's own machine).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, MaxRetryError

from hf_ebft.structured.vllm.errors import ServerUnavailable

logger = logging.getLogger(__name__)

LONGEST_WAIT = 30.0
"""Largest number of seconds between two tries of a request."""
CONNECT_TIMEOUT = 10.0


@dataclass(frozen=True)
class Response:
    """An HTTP answer, whatever its status.

    Attributes:
        status: HTTP status.
        body: the body as text.
        retries: number of times that the request was sent again.
    """

    status: int
    body: str
    retries: int


class Transport:
    """Sends requests to one server. Safe to use from several threads.

    Args:
        url: address of the server.
        connections: number of connections to keep open.
        wait: seconds before a request is sent for the third time; they double before each further
            time, and are 0 before the second.
    """

    def __init__(self, url: str, connections: int, wait: float) -> None:
        self._url = url
        self._wait = wait
        self._pool = urllib3.PoolManager(maxsize=connections)

    def send(
        self,
        method: str,
        path: str,
        payload: Any,
        *,
        timeout: float,
        retries: int,
        transient: Collection[int],
    ) -> Response:
        """Send a request; send it again after a broken connection, a timeout or a transient status.

        If the server refuses connections, it is not sent again: the caller waits until it is up.

        Args:
            method: GET or POST.
            path: path below the server's address.
            payload: JSON of a POST; None sends none.
            timeout: seconds to wait for an answer.
            retries: number of times that it is sent again.
            transient: statuses after which it is sent again.

        Raises:
            ServerUnavailable: there is no complete answer.
        """
        headers = {}
        if "VLLM_API_KEY" in os.environ:  # the variable that vLLM itself reads
            headers["Authorization"] = f"Bearer {os.environ['VLLM_API_KEY']}"
        policy = urllib3.Retry(
            total=retries,
            connect=0,
            redirect=0,
            allowed_methods=None,
            status_forcelist=transient,
            raise_on_status=False,
            backoff_factor=self._wait / 2,
            backoff_max=LONGEST_WAIT,
        )
        try:
            answer = self._pool.request(
                method,
                self._url + path,
                json=payload,
                headers=headers,
                timeout=urllib3.Timeout(connect=min(CONNECT_TIMEOUT, timeout), read=timeout),
                retries=policy,
            )
        except MaxRetryError as error:
            cause = error.reason or error
            refused = isinstance(cause, ConnectTimeoutError)
            tries = "" if refused or retries == 0 else f"{retries + 1} times in a row, "
            raise ServerUnavailable(f"{tries}{type(cause).__name__}: {cause}") from error
        except HTTPError as error:
            raise ServerUnavailable(f"{type(error).__name__}: {error}") from error
        history = () if answer.retries is None else answer.retries.history
        if history:
            causes = ", ".join(str(entry.status or entry.error) for entry in history)
            logger.warning(
                "%s %s of the vLLM server at %s was sent again %d times (%s)",
                method,
                path,
                self._url,
                len(history),
                causes,
            )
        return Response(answer.status, answer.data.decode(errors="replace"), len(history))
