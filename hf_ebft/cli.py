"""The command `hf-ebft`, also `python -m hf_ebft` and `accelerate launch -m hf_ebft`.

Each command is a module in `hf_ebft/commands/`, imported when it is called: `hf-ebft --help` needs
neither torch nor any extra.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from hf_ebft.version import __version__

#: Command -> its line in `hf-ebft --help`. Its module has the same name.
COMMANDS = {
    "train": "fine-tune a model: hf-ebft train --config run.yaml",
    "preflight": "measure in minutes what a run costs, and whether its gradient is above the noise",
    "evaluate": "measure one or several models on held-out text, side by side",
    "report": "one page about one or several runs",
    "serve": "start the vLLM server that a run samples from",
    "convert": "turn an axolotl configuration (rl: ebft) into one of hf-ebft train",
    "demo": "fine-tune a small model on text that Python carries; nothing is downloaded",
}
#: Errors of other packages whose cause is the data, the settings or the machine.
USER_ERRORS = {
    "datasets.exceptions.DatasetsError",
    "hf_ebft.structured.vllm.errors.VLLMServerError",
    "jinja2.exceptions.TemplateError",  # a chat template that does not fit the messages
    "safetensors._safetensors_rust.SafetensorError",  # a weight file that was cut off
    "torch.OutOfMemoryError",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command's name and its arguments. Default: those of the process.

    Returns:
        The exit status: 0, or 2 for data and settings that cannot work.

    Raises:
        Exception: a fault of the program itself, or any error with `--debug`.
    """
    argv, debug = split_debug(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv or ["--help"])
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}."
        parser.error(f"there is no command {name!r}; {hint}")
    try:  # the import is inside, so that a missing extra is reported like any other mistake
        importlib.import_module(f"hf_ebft.commands.{name}").main(rest)
    except Exception as error:
        if debug or not is_user_error(error):
            raise
        rank = os.environ.get("RANK", "0")
        process = "" if rank == "0" else f" (process {rank})"
        print(f"hf-ebft {name}{process}: {error_text(error)}", file=sys.stderr)
        return 2
    return 0


def split_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without a bare `--debug`, and whether there was one.

    `--debug VALUE` is an option of transformers' training arguments and stays.
    """
    kept, debug = [], False
    for index, argument in enumerate(argv):
        following = argv[index + 1] if index + 1 < len(argv) else "-"
        if argument == "--debug" and (following.startswith("-") or index == 0):
            debug = True
        else:
            kept.append(argument)
    return kept, debug


def is_user_error(error: Exception) -> bool:
    """Whether data, settings or the machine are the cause, as opposed to the program."""
    if isinstance(error, (OSError, ValueError, ImportError)):
        return True
    # By name, since the packages that define these errors need not be installed.
    return any(
        f"{kind.__module__}.{kind.__qualname__}" in USER_ERRORS for kind in type(error).__mro__
    )


def error_text(error: Exception) -> str:
    """The message of an error, without the number that Python puts before an `OSError`'s."""
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"There is no file or folder {error.filename}; check the path."
    if isinstance(error, FileExistsError) and error.filename:
        return f"{error.filename} exists already and is not a folder; give another path."
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def make_parser() -> ArgumentParser:
    """The parser whose help lists the commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{what}" for name, what in COMMANDS.items())
    parser = ArgumentParser(
        prog="hf-ebft",
        usage="hf-ebft COMMAND [options]",
        description="Energy-based fine-tuning of language models.",
        epilog=f"commands:\n{lines}\n\n`hf-ebft COMMAND --help` explains one. "
        "With --debug, errors show where they were raised.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser
