"""Strided mode of `hf-ebft train`: raw text, trained on by `EBFTTrainer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_ebft import EBFTConfig, EBFTTrainer
from hf_ebft.commands.runs import streaming
from hf_ebft.commands.runs.adapters import lora_config
from hf_ebft.commands.runs.console import say
from hf_ebft.commands.runs.data import DATA_SEED, load_text, shuffled
from hf_ebft.commands.runs.ending import documents_of, finish, require_two_rows, write_report
from hf_ebft.commands.runs.model import load_model, load_tokenizer
from hf_ebft.commands.runs.options import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    ReportArguments,
)
from hf_ebft.commands.runs.text import raw_text, tokenize
from hf_ebft.data import Table, TokenizedRows
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


def run(
    data: DataArguments,
    names: ModelArguments,
    lora: LoraArguments,
    report: ReportArguments,
    args: EBFTConfig,
    train: Table | None,
    checkpoint: str | None,
) -> None:
    """Load, measure, train, save, measure, report.

    Args:
        data, names, lora, report, args: the options.
        train: the training data, if it has been opened already.
        checkpoint: the checkpoint to resume from, or None.
    """
    wants_eval = report.report_rows > 0 or args.do_eval
    trainer, eval_rows = build_trainer(data, names, lora, args, train, wants_eval=wants_eval)
    tokenizer = trainer.processing_class
    trainer.card_samples = report.card_samples
    use_compact_progress(trainer)

    comparison = Comparison(trainer, tokenizer, eval_rows, report)
    comparison.measure()
    trainer.train(resume_from_checkpoint=checkpoint)
    finish(trainer, comparison, lora, data)


def build_trainer(
    data: DataArguments,
    names: ModelArguments,
    lora: LoraArguments,
    args: EBFTConfig,
    train: Table | None,
    *,
    wants_eval: bool,
) -> tuple[EBFTTrainer, TokenizedRows | None]:
    """The trainer of a run, ready to train, and the held-out rows if they are wanted.

    Args:
        data, names, lora, args: the options.
        train: the training data, if it has been opened already.
        wants_eval: whether held-out rows are wanted.
    """
    tokenizer = load_tokenizer(names, args)
    with args.main_process_first(desc="loading the text"):
        train_rows, eval_rows = load_rows(data, tokenizer, args, wants_eval=wants_eval, train=train)
    model = load_model(names, len(tokenizer), lora, args)
    trainer = EBFTTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=lora_config(lora, model),
    )
    return trainer, eval_rows


# ---- Text -----------------------------------------------------------------------------------


def load_rows(
    data: DataArguments,
    tokenizer: Any,
    args: EBFTConfig,
    *,
    wants_eval: bool,
    train: Table | None = None,
) -> tuple[Any, TokenizedRows | None]:
    """Rows to train on and, if they are wanted, held-out rows.

    Args:
        data: the options.
        tokenizer: turns text into rows.
        args: settings of the blocks.
        wants_eval: whether held-out rows are wanted.
        train: the training data, if it has been opened already.

    Returns:
        Rows to train on (a stream of them with `data.streaming`), and the held-out rows or None.
    """
    if data.streaming:
        return streaming.load_rows(data, tokenizer, args, wants_eval=wants_eval)
    text, held_out = load_text(
        data, wants_eval, lambda table: raw_text(table, data, tokenizer), train
    )
    if data.max_train_rows is not None:  # else the rows would all come from the first documents
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


# ---- Results ----------------------------------------------------------------------------------


class Comparison:
    """Measures the model on held-out text before and after training, and shows the differences.

    Args:
        trainer: holds the model and the feature network.
        tokenizer: decodes the samples.
        eval_rows: held-out rows; up to `report.report_rows` of them are measured.
        report: the options of the report.
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
            require_two_rows(len(self.rows), report)
        self.measured: list[DocumentMeasurements] = []
        self.samples: list[list[Continuation]] = []

    def measure(self) -> None:
        """Measure the model as it is now.

        Every process measures all rows, so that no process waits for another and sharded models
        work.
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
        """Print the differences and samples, and write them to report.json and samples.jsonl."""
        if self.rows is None:
            return
        args = self.trainer.args
        before, after = self.measured
        documents, by_document = documents_of(self.rows, after.row)
        n_documents = len(set(documents))
        differences = compare(before, after, groups=documents if by_document else None)
        say(
            args,
            f"\nHeld-out text, {len(self.rows)} rows of {n_documents} documents, before and after "
            "training, with the same rows,\nrandom numbers and feature network. Intervals are by "
            f"bootstrap over {'documents' if by_document else 'rows'}; * marks a change beyond "
            "the noise.\n\n" + format_table(differences),
        )
        if self.samples:
            old, new = self.samples
            say(args, "\n" + format_samples(old, new, self.tokenizer.decode))
        if args.process_index == 0:
            if self.samples:
                self.write_samples(Path(str(args.output_dir), "samples.jsonl"))
            write_report(args, differences)

    def write_samples(self, path: Path) -> None:
        """Write the samples as JSON lines, which `hf_ebft.report` shows."""
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
