"""On the device of these tests nothing falls back in silence."""

import logging
from collections.abc import Iterator

import pytest


class _RaiseOnFallback(logging.Handler):
    """Make a warning a failure; the error that it tells of is part of the traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


@pytest.fixture(autouse=True)
def _no_fallback() -> Iterator[None]:
    """Decoding goes on more slowly after any error of a step or a capture, and warns of it."""
    handler = _RaiseOnFallback(level=logging.WARNING)
    loggers = [logging.getLogger(f"hf_ebft.packed.{name}") for name in ("decoding", "cuda_graphs")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
