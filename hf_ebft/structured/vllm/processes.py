"""Actions that all processes of a run take together, so that an error on one stops all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hf_ebft.structured.vllm.errors import ServerGone, VLLMServerError

T = TypeVar("T")


def on_main_process(action: Callable[[], T]) -> T:
    """Run an action on the main process and return its result on all.

    All processes must call this together.

    Raises:
        VLLMServerError: on every process, if the action failed (`ServerGone` if it failed with
            that); the main process raises the original error.
    """
    outcome: list[Any] = [None, None, False]  # result, message of a failure, whether it is gone
    error: Exception | None = None
    if PartialState().is_main_process:
        try:
            outcome[0] = action()
        except Exception as failure:
            error = failure
            outcome[1] = f"{type(failure).__name__}: {failure}"
            outcome[2] = isinstance(failure, ServerGone)
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        kind = ServerGone if outcome[2] else VLLMServerError
        raise kind(f"the main process failed: {outcome[1]}")
    return outcome[0]


def on_every_process(action: Callable[[], T]) -> T:
    """Run an action on every process; all must call this together.

    Returns:
        The result of this process.

    Raises:
        VLLMServerError: on every process, if the action failed on any; processes on which it failed
            raise their own error.
    """
    result: Any = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as failure:
        error = failure
    message = None if error is None else f"{type(error).__name__}: {error}"
    messages = [text for text in gather_object([message]) if text is not None]
    if error is not None:
        raise error
    if messages:
        raise VLLMServerError(f"another process failed: {messages[0]}")
    return result


def raise_together(failure: Exception | None) -> None:
    """Raise on every process if any process has failed; all must call this together."""

    def fail() -> None:
        if failure is not None:
            raise failure

    on_every_process(fail)
