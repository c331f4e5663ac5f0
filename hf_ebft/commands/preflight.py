"""`hf-ebft preflight`: measure a run before it starts, and say what to change.

    hf-ebft preflight --config run.yaml
    hf-ebft preflight --config run.yaml --documents 128 --minutes 15 --processes 8

It takes the options of `hf-ebft train` (--help-all shows them) and those below, trains nothing and
leaves no checkpoint. It writes `preflight.json` and the page `preflight.html` into output_dir.
"""

from __future__ import annotations

import importlib.util
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from hf_ebft.commands.runs import strided
from hf_ebft.commands.runs.console import show_library_log
from hf_ebft.commands.runs.parsing import check, parse_arguments, print_help
from hf_ebft.commands.train import announce_defaults, choose_mode
from hf_ebft.preflight import Preflight, preflight
from hf_ebft.preflight.page import render_preflight
from hf_ebft.preflight.run import DOCUMENTS


def main(argv: Sequence[str]) -> None:
    """Read the options, build the trainer, measure, print the verdict, write JSON and the page."""
    parser = ArgumentParser(
        prog="hf-ebft preflight",
        usage="hf-ebft preflight [--config FILE] [--documents N] [--option value ...]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=DOCUMENTS,
        help="rows of training text to measure on [%(default)s]",
    )
    parser.add_argument(
        "--minutes", type=float, help="minutes after which no further row is begun [no limit]"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="processes that the run will have [%(default)s]"
    )
    if {"--help-all", "--help_all"} & set(argv):
        parser.print_help()
        print("\nOptions of hf-ebft train:\n")
        print_help(argv)
        return
    own, train_argv = parser.parse_known_args(argv)
    found, folder = measure(train_argv, own.documents, own.minutes, own.processes)
    print(format_verdict(found))
    write(found, folder)


def measure(
    argv: Sequence[str], documents: int, minutes: float | None, processes: int
) -> tuple[Preflight, Path]:
    """The preflight of the run that `hf-ebft train` would start with these options.

    Returns:
        The result, and the run's output_dir.

    Raises:
        ValueError: options of structured mode.
    """
    show_library_log()
    mode, why, train = choose_mode(argv)
    if mode == "structured":
        raise ValueError(
            f"preflight measures strided mode only, but this run is in structured mode ({why}). "
            "Add --mode strided: it measures the same prompts and ground truths as text, with "
            "the same features and rewards."
        )
    for line in announce_defaults(argv):
        print(line, flush=True)
    data, names, lora, report, args = parse_arguments(argv, mode)
    check(names, lora, report)
    set_seed(args.seed)  # adapters have random initial weights: the same as in training
    trainer, _ = strided.build_trainer(data, names, lora, args, train, wants_eval=args.do_eval)
    found = preflight(trainer, documents=documents, minutes=minutes, processes=processes, say=print)
    return found, Path(str(args.output_dir))


def format_verdict(found: Preflight) -> str:
    """The verdict, for the terminal."""
    lines = [f"\n{found.signal.rows} {found.settings.unit}, {found.machine}, "]
    lines[0] += f"{sum(found.seconds.values()):.0f} s\n"
    for finding in found.findings:
        head = f"{finding.severity.upper()}: {finding.title}."
        lines += [head, f"  {finding.evidence}", f"  {finding.advice}", ""]
    if (nothing := found.nothing_against) is not None:
        lines.append(nothing)
    cost = found.cost
    if cost.hours is not None and cost.fits:
        lines.append(
            f"The run: {cost.steps:,} steps of {cost.seconds:.3g} s, {cost.hours:.3g} hours, "
            f"{cost.memory / 2**30:.2f} GiB ({cost.memory_of})."
        )
    return "\n".join(lines)


def write(found: Preflight, folder: Path) -> None:
    """Write the JSON file, and the page if matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    found.write_json(folder / "preflight.json")
    print(f"All numbers are in {folder / 'preflight.json'}.")
    if importlib.util.find_spec("matplotlib") is None:
        print("For a page with charts: pip install matplotlib, or hf_ebft with its extra 'plots'.")
        return
    page = folder / "preflight.html"
    page.write_text(render_preflight(found), encoding="utf-8")
    print(f"The page is {os.fspath(page)}; open it in any browser.")
