"""What every test runs under: no network, one thread, a fixed seed, no deprecated calls."""

import logging
import os
from collections.abc import Iterator

# Read when the libraries are imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Give each test the same random numbers, alone or in any order."""
    torch.manual_seed(0)


class _RaiseOnDeprecation(logging.Handler):
    """Turn a logged deprecation notice into a failure, where it was caused."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message:
            raise AssertionError(f"deprecated use, logged by {record.name}: {message}")


@pytest.fixture(autouse=True, scope="session")
def _no_deprecated_calls() -> Iterator[None]:
    """Let no deprecation notice pass that a library sends through logging instead of warnings."""
    handler = _RaiseOnDeprecation(level=logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
