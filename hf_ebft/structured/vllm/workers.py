"""Threads for requests that do not keep the process alive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class DaemonPool:
    """Runs calls in a bounded number of daemon threads.

    Python waits at its exit for the calls of a `ThreadPoolExecutor`. With a frozen server, it would
    wait after ctrl-C for `vllm_request_timeout` times the number of tries.

    Args:
        size: largest number of calls at a time.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._threads: list[threading.Thread] = []
        self._calls: SimpleQueue[Call | None] = SimpleQueue()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Make a call as soon as a thread is free."""
        future: Future[Any] = Future()
        self._calls.put((future, function, arguments))
        if len(self._threads) < self._size:
            thread = threading.Thread(target=self._work, name="vllm", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def close(self) -> None:
        """Cancel calls that have not begun; others continue, but nobody waits for them."""
        try:
            while (call := self._calls.get_nowait()) is not None:
                call[0].cancel()
        except Empty:
            pass
        for _ in self._threads:
            self._calls.put(None)
        self._threads.clear()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function(*arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
