"""The command `hf-ebft`, also `python -m hf_ebft` and `accelerate launch -m hf_ebft`.

Each command is a module in `hf_ebft/commands/`, imported when it is called: `hf-ebft --help` needs
neither torch nor any extra.
"""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from hf_ebft.version import __version__

#: Command -> what `hf-ebft --help` says about it. Its module has the same name.
COMMANDS = {
    "train": "fine-tune a model: hf-ebft train --config run.yaml",
    "evaluate": "measure one or several models on held-out text, side by side",
    "report": "one page about one or several runs",
    "serve": "start the vLLM server that a run samples from",
    "convert": "turn an axolotl configuration (rl: ebft) into one of hf-ebft train",
    "demo": "fine-tune a small model on text that Python carries; nothing is downloaded",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Args:
        argv: the command's name and its arguments; default: the process'.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv or ["--help"])
    name, *rest = argv
    if name not in COMMANDS:
        parser.error(f"there is no command {name!r}; choose one of {', '.join(COMMANDS)}.")
    try:  # a missing extra is told like any other mistake, so that the import is inside
        importlib.import_module(f"hf_ebft.commands.{name}").main(rest)
    except (OSError, ValueError, ImportError) as error:
        print(f"hf-ebft {name}: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


def sentence(error: Exception) -> str:
    """What is wrong, without Python's own prefixes."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def make_parser() -> ArgumentParser:
    """What tells of the commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{what}" for name, what in COMMANDS.items())
    parser = ArgumentParser(
        prog="hf-ebft",
        usage="hf-ebft COMMAND [options]",
        description="Energy-based fine-tuning of language models.",
        epilog=f"commands:\n{lines}\n\n`hf-ebft COMMAND --help` explains one.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser
