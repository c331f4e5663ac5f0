"""Printing and logging of a run."""

from __future__ import annotations

import logging

from transformers import TrainingArguments


def say(args: TrainingArguments, message: str) -> None:
    """Print in the main process only."""
    if args.process_index == 0:
        print(message, flush=True)


def show_library_log() -> None:
    """Show the library's log, such as where the feature network is placed."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_ebft").setLevel(logging.INFO)
