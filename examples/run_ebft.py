"""Fine-tune a causal language model by matching features of its rollouts, from the command line.

    accelerate launch examples/run_ebft.py                          # the demo, nothing to fetch
    accelerate launch examples/run_ebft.py --config examples/configs/demo.yaml --max_steps 20
    accelerate launch examples/run_ebft.py --model_name_or_path M --dataset_name_or_path D.jsonl \\
        --sequence_len 1024 --output_dir out --report_to tensorboard
    python examples/run_ebft.py --help                                   # every option
    python examples/run_ebft.py --mode structured --help                 # those of the other mode

There are two modes. `strided` is for raw text, sampled from many places of a document; it is the
code below. `structured` is for prompts with ground truths, sampled as whole completions by TRL's
GRPOTrainer; it is `structured_mode.py` beside this file. Without `--mode` the columns of the data
set decide, and the script says how.

The options are those of the four groups in `run_options.py` and of `hf_ebft.EBFTConfig` (strided:
all of `transformers.TrainingArguments`) or `hf_ebft.structured.EBFTGRPOConfig` (structured: all of
`trl.GRPOConfig`). `--config run.yaml` holds the same names; the command line wins.

Held-out text is measured before and after training on the same rows, with the same random numbers
and the same frozen feature network, and the differences come with bootstrap intervals.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_loading import (
    DATA_SEED,
    finish,
    load_model,
    load_split,
    load_text,
    load_tokenizer,
    lora_config,
    refuse_lone_row,
    resume_from,
    say,
    show_library_log,
    shuffled,
)
from run_options import (
    STDLIB,
    DataArguments,
    Mode,
    ReportArguments,
    check,
    early_options,
    parse_arguments,
)
from transformers import HfArgumentParser, set_seed

from hf_ebft import EBFTConfig, EBFTTrainer
from hf_ebft.conversion.checking import as_arguments
from hf_ebft.data import (
    RawDataset,
    Table,
    TokenizedRows,
    render_prompt,
    tokenize_and_cut,
    tokenize_prompt_completion,
)
from hf_ebft.data.sources import TEXT_COLUMNS
from hf_ebft.evaluation import (
    Continuation,
    DocumentMeasurements,
    compare,
    evaluate_documents,
    format_samples,
    format_table,
    sample_continuations,
)
from hf_ebft.watching.console import use_compact_progress

# The columns that say which mode a data set is for. A `prompt` with a `completion` has always been
# read as text of which only the completion is learned.
GROUND_TRUTHS = ("ground_truth", "answer")
COMPLETION = "completion"
# With fewer documents than this behind the measured rows, rows are resampled instead.
FEWEST_DOCUMENTS = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, measure, train, save, measure, report."""
    argv = sys.argv[1:] if argv is None else argv
    show_library_log()
    mode, why, train = choose_mode(argv)
    # Said before the options are read: an option of the other mode is then no surprise.
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"Mode: {mode} ({why}).", flush=True)
    data, names, lora, report, args = parse_arguments(argv, mode)
    check(names, lora, report)
    checkpoint = resume_from(args)
    set_seed(args.seed)  # adapters start at random
    if mode == "structured":
        import structured_mode  # TRL is needed from here on, and only here

        structured_mode.run(data, names, lora, report, args, train, checkpoint)
        return
    tokenizer = load_tokenizer(names, args)
    with args.main_process_first(desc="loading the text"):
        train_rows, eval_rows = load_rows(
            data, tokenizer, args, wants_eval=report.report_rows > 0 or args.do_eval, train=train
        )
    model = load_model(names, len(tokenizer))
    trainer = EBFTTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=lora_config(lora, model),
    )
    use_compact_progress(trainer)

    comparison = Comparison(trainer, tokenizer, eval_rows, report)
    comparison.measure()
    trainer.train(resume_from_checkpoint=checkpoint)
    finish(trainer, comparison, lora, data)


# ---- Mode -----------------------------------------------------------------------------------


def choose_mode(argv: Sequence[str]) -> tuple[Mode, str, Table | None]:
    """The mode, why it is this one, and the training data if it had to be opened to tell."""
    _, config, mode = early_options(argv)
    if mode is not None:
        return mode, "as --mode says", None
    parser = HfArgumentParser(DataArguments, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]
    wanted = {field.name for field in dataclasses.fields(DataArguments)}
    from_file = {name: value for name, value in config.items() if name in wanted}
    (data, _) = parser.parse_args_into_dataclasses(
        [*as_arguments(from_file), *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if data.dataset_name_or_path.startswith(STDLIB):
        return "strided", f"{data.dataset_name_or_path} is text", None
    if data.text_column is not None:
        return "strided", f"the text is in the column {data.text_column!r}", None
    train = load_split(data.dataset_name_or_path, data.train_split, data)
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
                f"{table.name} has the columns 'prompt' and {truths[0]!r} for structured mode and "
                f"{texts[0]!r} for strided mode; say which by --mode."
            )
        return "structured", f"the columns are 'prompt' and {truths[0]!r}"
    if {"prompt", COMPLETION} <= set(table.columns):
        return "strided", (
            "the columns are 'prompt' and 'completion', blocks lie in the completion; for whole "
            "completions by TRL: --mode structured"
        )
    return "strided", "there are no prompts with ground truths"


# ---- Text -----------------------------------------------------------------------------------


def load_rows(
    data: DataArguments,
    tokenizer: Any,
    args: EBFTConfig,
    *,
    wants_eval: bool,
    train: Table | None = None,
) -> tuple[TokenizedRows, TokenizedRows | None]:
    """Rows to train on and, if they are wanted, held-out ones.

    Args:
        data: which.
        tokenizer: turns text into rows.
        args: lengths of blocks.
        wants_eval: whether held-out rows are wanted.
        train: the training data, if it has been opened already.
    """
    text, held_out = load_text(
        data, wants_eval, lambda table: raw_text(table, data, tokenizer), train
    )
    if data.max_train_rows is not None:  # then it is not the first documents that count
        text = shuffled(text)
    train_rows = tokenize(text, tokenizer, data, args, pack=data.pack, most=data.max_train_rows)
    say(args, f"Training text, {text.name}: {train_rows.counts}")
    if held_out is None:
        return train_rows, None
    eval_rows = tokenize(held_out, tokenizer, data, args)
    say(args, f"Held-out text, {held_out.name}: {eval_rows.counts}")
    if data.max_eval_rows is not None:
        eval_rows = eval_rows.spread(data.max_eval_rows, DATA_SEED)
    return train_rows, eval_rows


def raw_text(table: Table, data: DataArguments, tokenizer: Any) -> RawDataset:
    """What strided mode reads of a table: its text, or its prompts with completions.

    Ground truths of structured mode are completions here, and chats are laid out as text.
    """
    truths = [name for name in GROUND_TRUTHS if name in table.columns]
    if data.text_column is not None or "prompt" not in table.columns or not truths:
        return table.text(data.text_column)
    if COMPLETION in table.columns:
        truths = [COMPLETION]
    pairs = [
        {
            "prompt": render_prompt(record["prompt"], tokenizer, f"The prompt of row {number}"),
            COMPLETION: record[truths[0]],
        }
        for number, record in enumerate(table.records)
    ]
    return RawDataset(pairs, ("prompt", COMPLETION), table.name)


def tokenize(
    raw: RawDataset,
    tokenizer: Any,
    data: DataArguments,
    args: EBFTConfig,
    *,
    pack: bool = False,
    most: int | None = None,
) -> TokenizedRows:
    """Rows of at most `sequence_len` tokens, with labels if there are prompts."""
    min_length = args.context_length + args.generate_max_len
    if raw.has_prompts:
        if pack:
            raise ValueError("pack=True is for text, not for prompts with completions; drop it.")
        return tokenize_prompt_completion(
            raw.pairs(),
            tokenizer,
            sequence_len=data.sequence_len,
            min_length=min_length,
            min_completion=args.min_completion_prefix + args.generate_max_len,
            keep_short=data.keep_short,
            max_rows=most,
        )
    return tokenize_and_cut(
        raw.texts(),
        tokenizer,
        sequence_len=data.sequence_len,
        min_length=min_length,
        pack=pack,
        keep_short=data.keep_short,
        max_rows=most,
    )


# ---- Results ----------------------------------------------------------------------------------


class Comparison:
    """The model on held-out text, before and after.

    Args:
        trainer: it has the model as it is, and the feature network.
        tokenizer: to show samples.
        eval_rows: held-out rows, of which some are measured.
        report: how.
    """

    def __init__(
        self,
        trainer: EBFTTrainer,
        tokenizer: Any,
        eval_rows: TokenizedRows | None,
        report: ReportArguments,
    ) -> None:
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.report = report
        self.rows = None
        if eval_rows is not None and report.report_rows:
            self.rows = eval_rows.spread(report.report_rows, DATA_SEED)
            refuse_lone_row(len(self.rows), report)
        self.measured: list[DocumentMeasurements] = []
        self.samples: list[list[Continuation]] = []

    def measure(self) -> None:
        """Measure the model as it is now.

        Every process does the same, so that none waits for another and sharded models work.
        """
        if self.rows is None:
            return
        report, args = self.report, self.trainer.args
        say(args, f"Measuring {len(self.rows)} held-out rows ...")
        model: Any = self.trainer.model
        self.measured.append(
            evaluate_documents(
                model,
                self.trainer.feature_network,
                self.rows,
                self.trainer.ebft,
                batch_size=args.per_device_eval_batch_size,
                stride=report.report_stride,
                n_samples=report.report_n_samples,
                n_draws=report.report_draws,
                eos_token_id=self.tokenizer.eos_token_id,
                corpus_whitening=self.trainer.corpus_whitening(),
            )
        )
        if report.report_samples:
            self.samples.append(
                sample_continuations(
                    model,
                    self.rows.spread(report.report_samples, DATA_SEED),
                    self.trainer.ebft,
                    length=report.report_sample_len,
                    eos_token_id=self.tokenizer.eos_token_id,
                )
            )

    def show(self) -> None:
        """Print the differences and samples, and keep them in report.json."""
        if self.rows is None:
            return
        args = self.trainer.args
        before, after = self.measured
        documents = [self.rows.sources[row][0] for row in after.row]
        n_documents = len(set(documents))
        by_document = n_documents >= FEWEST_DOCUMENTS
        differences = compare(before, after, groups=documents if by_document else None)
        say(
            args,
            f"\nHeld-out text, {len(self.rows)} rows of {n_documents} documents, before and after "
            "training: the same rows,\nrandom numbers and feature network. Intervals by bootstrap "
            f"over {'documents' if by_document else 'rows'}; * marks a change beyond the noise.\n\n"
            + format_table(differences),
        )
        if self.samples:
            old, new = self.samples
            say(args, "\n" + format_samples(old, new, self.tokenizer.decode))
        if args.process_index == 0:
            path = Path(str(args.output_dir), "report.json")
            numbers = {name: dataclasses.asdict(paired) for name, paired in differences.items()}
            path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
            if self.samples:
                self.write_samples(path.with_name("samples.jsonl"))
            say(args, f"\nThe numbers of the table are in {path}.")

    def write_samples(self, path: Path) -> None:
        """The samples as JSON lines, which `hf_ebft.report` shows."""
        decode = self.tokenizer.decode
        lines = [
            {
                "prefix": decode(old.prefix),
                "before": decode(old.rollout),
                "after": decode(new.rollout),
                "truth": decode(old.ground_truth),
            }
            for old, new in zip(*self.samples, strict=True)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
