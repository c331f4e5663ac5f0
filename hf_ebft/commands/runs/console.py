"""What a run prints."""

from __future__ import annotations

import logging

from transformers import TrainingArguments


def say(args: TrainingArguments, message: str) -> None:
    """Print in one process only."""
    if args.process_index == 0:
        print(message, flush=True)


def show_library_log() -> None:
    """Let the library say what it decided, such as where the feature network lives."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_ebft").setLevel(logging.INFO)
