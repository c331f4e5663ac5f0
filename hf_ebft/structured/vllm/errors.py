"""Errors between the trainer and the vLLM server."""

from __future__ import annotations


class VLLMServerError(RuntimeError):
    """The base of all errors here. Its message is for the user."""


class ServerGone(VLLMServerError):
    """The server went away. Once it is up again, the weights can be sent again."""


class ServerUnavailable(ServerGone):
    """No usable answer, after all retries: the server is down, restarting or out of reach."""


class RequestRefused(VLLMServerError):
    """The server understood the request and refused it.

    Attributes:
        status: status of the HTTP answer.
        reason: the server's own message.
    """

    def __init__(self, status: int, reason: str, what: str) -> None:
        super().__init__(f"the vLLM server refused to {what} ({status}): {reason}")
        self.status = status
        self.reason = reason


class ModelNotServed(RequestRefused, ServerGone):
    """The server does not know a model or adapter that it had earlier: it was restarted."""


class BadAnswer(VLLMServerError):
    """The server's answer lacks something that training needs."""
