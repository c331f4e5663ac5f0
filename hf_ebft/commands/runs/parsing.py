"""How the options of a run are read from a file and the command line, and checked together."""

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
    """Takes whole option names only, and raises for mistakes instead of printing 200 options."""

    #: What to add where an option is unknown: where there are others.
    elsewhere = ""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise the message.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}\n--help explains the options.")

    def refuse_unread(self, argv: Sequence[str], where: str = "command line") -> None:
        """Raise if something in a command line is no option and belongs to none.

        Raises:
            ValueError: of the first such thing.
        """
        unread = self.parse_known_args(list(argv))[1]
        names = [text[2:].partition("=")[0] for text in unread if text.startswith("--")]
        self.refuse_unknown((name.replace("-", "_") for name in names), where)
        if unread:
            self.error(f"{where}: {' '.join(unread)!r} belongs to no option.")

    def refuse_unknown(self, names: Iterable[str], where: str) -> None:
        """Raise if one of the names is no option, with the names that it may have been meant for.

        Raises:
            ValueError: of the first such name.
        """
        known = {action.dest for action in self._actions}
        for name in names:
            if name not in known:
                begun = sorted(option for option in known if name and option.startswith(name))
                near = [*begun, *difflib.get_close_matches(name, known, n=3)]
                near = list(dict.fromkeys(near))[:3]
                hint = f"; did you mean {' or '.join(near)}?" if near else "."
                self.error(f"{where}: there is no option {name!r}{hint}{self.elsewhere}")


class Parser(OptionParser):
    """The options of a run in one of the two modes."""

    def __init__(self, mode: Mode = "strided") -> None:
        self.mode = mode
        other = get_args(Mode)[mode == "strided"]
        self.elsewhere = f" (Options of {mode} mode; --mode {other} has others.)"
        self.config_class: Any = EBFTConfig
        model: Any = ModelArguments
        if mode == "structured":
            from hf_ebft.structured import EBFTGRPOConfig

            model, self.config_class = StructuredModelArguments, EBFTGRPOConfig
        super().__init__((DataArguments, model, LoraArguments, ReportArguments, self.config_class))

    def format_help(self) -> str:
        """The options that matter first."""
        return first_options(self._actions, self.mode)

    def format_all(self) -> str:
        """Every option."""
        return all_options(self._actions, self.config_class)


def early_options(argv: Sequence[str]) -> tuple[str, dict[str, Any], Mode | None]:
    """The file that `--config` names, what it holds, and the mode if one of the two gives it.

    Raises:
        OSError: there is no such file.
        ValueError: it is no YAML of options, or the mode is unknown.
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
    """Print help if it is asked for, of the mode that `--mode` or the file says; whether it was."""
    if not {"-h", "--help", "--help-all", "--help_all"} & set(argv):
        return False
    parser = Parser(early_options(argv)[2] or "strided")
    brief = {"-h", "--help"} & set(argv)
    print(parser.format_help() if brief else parser.format_all(), end="")
    return True


def parse_arguments(
    argv: Sequence[str], mode: Mode | None = None
) -> tuple[DataArguments, ModelArguments, LoraArguments, ReportArguments, Any]:
    """Options from the file that `--config` names and from the command line, which wins.

    Without any option it is the demo.

    Args:
        argv: the command line.
        mode: whose options there are. Default: as file or command line say, else strided.

    Returns:
        The four groups above, and an `EBFTConfig` or `EBFTGRPOConfig`.

    Raises:
        OSError, ValueError: what is wrong with file or options, naming the option.
    """
    path, options, said = early_options(argv)
    parser = Parser(mode or said or "strided")
    parser.refuse_unknown(map(str, options), path)
    if "config" in options:
        parser.error(f"--config {path} names another config file; put all options into one.")
    from_file = as_arguments(options)
    given = [*from_file, *argv]
    # Before the groups check their values, which may lack what a misspelt option was to say.
    parser.refuse_unread(given)
    data, model, lora, report, args = parser.parse_args_into_dataclasses(
        given, look_for_args_file=False
    )
    data.mode = parser.mode
    if parser.mode == "structured":
        model.trust_remote_code = args.trust_remote_code
    return data, model, lora, report, args


def check(names: ModelArguments, lora: LoraArguments, report: ReportArguments) -> None:
    """Refuse combinations that would only fail, or be ignored, after training."""
    check_adapters(lora)
    if lora.quantizes and names.gguf_file:
        raise ValueError(
            f"gguf_file={names.gguf_file} is quantized in a way of its own and is loaded as full "
            "weights; drop load_in_4bit and load_in_8bit, or name the original model."
        )
    if lora.use_peft and names.gguf_file and not lora.lora_merge:
        raise ValueError(
            f"Adapters of a model from a GGUF file ({names.gguf_file}) cannot be loaded by "
            "AutoModelForCausalLM, which would look for the model without gguf_file; add "
            "lora_merge."
        )
    for name, least in LEAST.items():
        if getattr(report, name) < least:
            raise ValueError(f"{name}={getattr(report, name)} must be at least {least}.")
