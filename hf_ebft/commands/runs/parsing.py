"""Reads the options of a run from a file and the command line, and checks them together."""

from __future__ import annotations

import difflib
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, get_args

from transformers import HfArgumentParser

from hf_ebft import EBFTConfig
from hf_ebft.commands.runs.adapters import check_adapters
from hf_ebft.commands.runs.demo_files import DEMO_CONFIG
from hf_ebft.commands.runs.help import all_options, first_options
from hf_ebft.commands.runs.options import (
    DataArguments,
    LoraArguments,
    Mode,
    ModelArguments,
    ReportArguments,
    StructuredModelArguments,
)
from hf_ebft.commands.yaml_files import read_mapping
from hf_ebft.conversion.checking import as_arguments

LEAST = {"report_rows": 0, "report_samples": 0, "report_sample_len": 1, "card_samples": 0}


class OptionParser(HfArgumentParser):
    """A parser without abbreviations that raises for mistakes, instead of printing all options."""

    #: Added to the message about an unknown option: where to find other options.
    hint_about_other_options = ""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise the message.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}\n--help explains the options.")

    def refuse_unread(self, argv: Sequence[str], where: str = "command line") -> None:
        """Raise if a command line contains an unknown option, or a value that belongs to none.

        Raises:
            ValueError: naming the first one.
        """
        unread = self.parse_known_args(list(argv))[1]
        names = [text[2:].partition("=")[0] for text in unread if text.startswith("--")]
        self.refuse_unknown((name.replace("-", "_") for name in names), where)
        if unread:
            self.error(f"{where}: {' '.join(unread)!r} belongs to no option.")

    def refuse_unknown(self, names: Iterable[str], where: str) -> None:
        """Raise if one of the names is not an option; the message proposes similar options.

        Raises:
            ValueError: naming the first one.
        """
        known = {action.dest for action in self._actions}
        for name in names:
            if name not in known:
                longer = sorted(option for option in known if name and option.startswith(name))
                near = [*longer, *difflib.get_close_matches(name, known, n=3)]
                near = list(dict.fromkeys(near))[:3]
                hint = f"; did you mean {' or '.join(near)}?" if near else "."
                self.error(
                    f"{where}: there is no option {name!r}{hint}{self.hint_about_other_options}"
                )


class Parser(OptionParser):
    """The options of a run in one of the two modes."""

    def __init__(self, mode: Mode = "strided") -> None:
        self.mode = mode
        other = get_args(Mode)[mode == "strided"]
        self.hint_about_other_options = (
            f" (These are the options of {mode} mode; --mode {other} has others.)"
        )
        self.config_class: Any = EBFTConfig
        model: Any = ModelArguments
        if mode == "structured":
            from hf_ebft.structured import EBFTGRPOConfig

            model, self.config_class = StructuredModelArguments, EBFTGRPOConfig
        super().__init__((DataArguments, model, LoraArguments, ReportArguments, self.config_class))

    def format_help(self) -> str:
        """The most used options."""
        return first_options(self._actions, self.mode)

    def format_all(self) -> str:
        """Every option."""
        return all_options(self._actions, self.config_class)


def early_options(argv: Sequence[str]) -> tuple[str, dict[str, Any], Mode | None]:
    """What must be known before the other options can be parsed.

    Returns:
        The file that `--config` names, the options in that file, and the mode if the command line
        or the file sets it.

    Raises:
        OSError: there is no such file.
        ValueError: the file is not a YAML mapping, or the mode is unknown.
    """
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=None if argv else str(DEMO_CONFIG))
    finder.add_argument("--mode")
    early = finder.parse_known_args(argv)[0]
    options = {} if early.config is None else read_mapping(early.config)
    mode = early.mode or options.get("mode")
    if mode is not None and mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} is unknown; choose {' or '.join(get_args(Mode))}.")
    return str(early.config), options, mode


def print_help(argv: Sequence[str]) -> bool:
    """Print the help of the chosen mode if the command line asks for help.

    Returns:
        Whether help was printed.
    """
    if not {"-h", "--help", "--help-all", "--help_all"} & set(argv):
        return False
    parser = Parser(early_options(argv)[2] or "strided")
    brief = {"-h", "--help"} & set(argv)
    print(parser.format_help() if brief else parser.format_all(), end="")
    return True


def parse_arguments(
    argv: Sequence[str], mode: Mode | None = None
) -> tuple[DataArguments, ModelArguments, LoraArguments, ReportArguments, Any]:
    """Parse the options in the file that `--config` names and on the command line, which wins.

    Without any option, the options are the demo's.

    Args:
        argv: the command line.
        mode: the mode whose options are known. Default: the one that the command line or the file
            sets, else strided.

    Returns:
        The four groups above, and an `EBFTConfig` or `EBFTGRPOConfig`.

    Raises:
        OSError, ValueError: a mistake in the file or the options; the message names the option.
    """
    path, options, chosen_mode = early_options(argv)
    parser = Parser(mode or chosen_mode or "strided")
    parser.refuse_unknown(map(str, options), path)
    if "config" in options:
        parser.error(f"--config {path} names another config file; put all options into one file.")
    from_file = as_arguments(options)
    all_argv = [*from_file, *argv]
    # Before the groups check their values: an error about an unset option would be misleading if
    # that option was misspelt.
    parser.refuse_unread(all_argv)
    data, model, lora, report, args = parser.parse_args_into_dataclasses(
        all_argv, look_for_args_file=False
    )
    data.mode = parser.mode
    if parser.mode == "structured":
        model.trust_remote_code = args.trust_remote_code
    return data, model, lora, report, args


def check(names: ModelArguments, lora: LoraArguments, report: ReportArguments) -> None:
    """Raise for combinations that would fail after training, or have no effect.

    Raises:
        ValueError: naming the options and what to write instead.
    """
    check_adapters(lora)
    if lora.quantizes and names.gguf_file:
        raise ValueError(
            f"gguf_file={names.gguf_file} has a quantization of its own and is loaded as full "
            "weights; drop load_in_4bit and load_in_8bit, or name the original model."
        )
    if lora.use_peft and names.gguf_file and not lora.lora_merge:
        raise ValueError(
            f"gguf_file={names.gguf_file} with use_peft: the saved adapters could not be loaded by "
            "AutoModelForCausalLM, which would look for the base model without gguf_file; add "
            "lora_merge to save the whole model."
        )
    for name, least in LEAST.items():
        if getattr(report, name) < least:
            raise ValueError(f"{name}={getattr(report, name)} must be at least {least}.")
