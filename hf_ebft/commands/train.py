"""`hf-ebft train`: fine-tune a causal language model by matching features of its rollouts.

    hf-ebft train --model_name_or_path M --dataset_name_or_path D.jsonl --output_dir out
    hf-ebft train --config run.yaml --max_steps 20
    accelerate launch -m hf_ebft train --config run.yaml             # on several devices
    hf-ebft train --help                                             # the most used options
    hf-ebft train --mode structured --help-all                       # all options of the other mode

There are two modes. `strided` is for raw text: rollouts start at many places of a document.
`structured` is for prompts with ground truths: TRL's GRPOTrainer samples whole completions. Without
`--mode` the columns of the data set decide, and the command prints why.

The options are those of the four groups in `runs/options.py` and of `hf_ebft.EBFTConfig` (strided:
all of `transformers.TrainingArguments`) or `hf_ebft.structured.EBFTGRPOConfig` (structured: all of
`trl.GRPOConfig`). `--config run.yaml` holds the same names; the command line wins.

The model is measured on held-out text before and after training: on the same rows, with the same
random numbers and the same frozen feature network. The differences have bootstrap intervals.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from transformers import HfArgumentParser, set_seed

from hf_ebft.commands.runs import strided
from hf_ebft.commands.runs.console import show_library_log
from hf_ebft.commands.runs.data import load_split
from hf_ebft.commands.runs.demo_files import DEMO_CONFIG, require_demo_files
from hf_ebft.commands.runs.ending import checkpoint_to_resume
from hf_ebft.commands.runs.options import GROUND_TRUTHS, STDLIB, DataArguments, Mode
from hf_ebft.commands.runs.parsing import check, early_options, parse_arguments, print_help
from hf_ebft.commands.runs.text import COMPLETION
from hf_ebft.conversion.checking import as_arguments
from hf_ebft.data import Table
from hf_ebft.data.sources import TEXT_COLUMNS


def main(argv: Sequence[str]) -> None:
    """Parse, load, measure, train, save, measure, report."""
    if print_help(argv):
        return
    if not argv:
        require_demo_files()
    show_library_log()
    mode, why, train = choose_mode(argv)
    # Printed before the options are read, since an option of the other mode is an error there.
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"Mode: {mode} ({why}).", flush=True)
        for line in announce_defaults(argv):
            print(line, flush=True)
    data, names, lora, report, args = parse_arguments(argv, mode)
    check(names, lora, report)
    checkpoint = checkpoint_to_resume(args)
    set_seed(args.seed)  # adapters have random initial weights
    if mode == "structured":
        from hf_ebft.commands.runs import structured  # TRL is needed from here on, and only here

        structured.run(data, names, lora, report, args, train, checkpoint)
    else:
        strided.run(data, names, lora, report, args, train, checkpoint)


def announce_defaults(argv: Sequence[str]) -> list[str]:
    """Lines that say, loudly, that no data or no model was named and what is used instead."""
    if not argv:
        return [
            "NO OPTIONS WERE GIVEN: this is the demo (hf-ebft demo), a small model on text that "
            "Python carries. hf-ebft train --help names the options of a run of your own."
        ]
    path, config, _ = early_options(argv)
    if Path(path).resolve() == DEMO_CONFIG.resolve():  # the demo is meant to use these defaults
        return []
    named = {*config, *(text[2:].partition("=")[0].replace("-", "_") for text in argv)}
    lines = []
    if "dataset_name_or_path" not in named:
        lines.append(
            f"NO DATA WAS NAMED: training on {DataArguments().shown_name}, prose that "
            "Python carries, which shows that everything works. For text of your own, set "
            "--dataset_name_or_path."
        )
    if "model_name_or_path" not in named:
        lines.append(
            "NO MODEL WAS NAMED: training the demo's model, which has 1.9 million parameters and "
            "was trained on Python's own source only. For another one, set --model_name_or_path."
        )
    return lines


# ---- Mode -----------------------------------------------------------------------------------


def choose_mode(argv: Sequence[str]) -> tuple[Mode, str, Table | None]:
    """The mode, the reason for it, and the training data if it had to be opened to decide."""
    _, config, mode = early_options(argv)
    if mode is not None:
        return mode, "as --mode says", None
    parser = HfArgumentParser(DataArguments, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]
    wanted = {field.name for field in dataclasses.fields(DataArguments)}
    from_file = {name: value for name, value in config.items() if name in wanted}
    (data, _) = parser.parse_args_into_dataclasses(
        [*as_arguments(from_file), *argv], return_remaining_strings=True, look_for_args_file=False
    )
    first = data.dataset_name_or_path[0]
    if first.startswith(STDLIB):
        return "strided", f"{first} is text", None
    if data.streaming:
        return "strided", "only strided mode can stream", None
    if data.text_column is not None:
        return "strided", f"the text is in the column {data.text_column!r}", None
    train = load_split(first, data.train_split, data)
    return *mode_of(train), train


def mode_of(table: Table) -> tuple[Mode, str]:
    """The mode that a data set's columns are for, and why.

    Raises:
        ValueError: columns for both modes.
    """
    truths = [name for name in GROUND_TRUTHS if name in table.columns]
    texts = [name for name in TEXT_COLUMNS if name in table.columns]
    if "prompt" in table.columns and truths:
        if texts:
            raise ValueError(
                f"{table.name} has the columns 'prompt' and {truths[0]!r} for structured mode, and "
                f"{texts[0]!r} for strided mode; choose with --mode structured or --mode strided."
            )
        return "structured", f"the columns are 'prompt' and {truths[0]!r}"
    if {"prompt", COMPLETION} <= set(table.columns):
        return "strided", (
            "the columns are 'prompt' and 'completion', and blocks lie in the completion; to "
            "sample whole completions with TRL: --mode structured"
        )
    return "strided", "the data has no prompts with ground truths"
