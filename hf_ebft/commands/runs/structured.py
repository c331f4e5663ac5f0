"""Structured mode of `hf-ebft train`: prompts with ground truths, on top of TRL's GRPOTrainer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_ebft.commands.runs.adapters import lora_config
from hf_ebft.commands.runs.console import say
from hf_ebft.commands.runs.data import DATA_SEED, load_text, shuffled
from hf_ebft.commands.runs.ending import finish, require_two_rows, write_report
from hf_ebft.commands.runs.model import load_model, load_tokenizer
from hf_ebft.commands.runs.options import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    ReportArguments,
)
from hf_ebft.data import RawDataset, Table
from hf_ebft.evaluation import PairedDifference, format_table, paired_bootstrap
from hf_ebft.structured import EBFTGRPOConfig, EBFTGRPOTrainer, VLLMRollouts
from hf_ebft.structured.columns import ground_truth_column
from hf_ebft.structured.datasets import refuse_columns
from hf_ebft.structured.multi_turn import MultiTurnRollouts, generate_on_server
from hf_ebft.watching.console import use_compact_progress

logger = logging.getLogger(__name__)

GROUND_TRUTH = "ground_truth"
# Column that says whether the thinking of reasoning models is embedded; the transforms make it.
EMBED_THINKING = "embed_thinking"
# Options of the groups in options.py that only strided mode uses.
STRIDED_ONLY = (
    "streaming",
    "sequence_len",
    "pack",
    "keep_short",
    "text_column",
    "report_stride",
    "report_n_samples",
    "report_draws",
    "report_samples",
    "report_sample_len",
    "card_samples",
)
METRICS = ("cfm_loss", "alignment", "diversity")


def run(
    data: DataArguments,
    names: ModelArguments,
    lora: LoraArguments,
    report: ReportArguments,
    args: EBFTGRPOConfig,
    train: Table | None,
    checkpoint: str | None,
) -> None:
    """Load, measure, train, save, measure, report.

    Args:
        data, names, lora, report, args: the options.
        train: the training data, if it has been opened already.
        checkpoint: the checkpoint to resume from, or None.
    """
    refuse_strided_options(data, report)
    tokenizer = load_tokenizer(names, args)
    tokenizer.padding_side = "left"  # TRL requires it
    with args.main_process_first(desc="loading the data"):
        prompts, held_out = load_prompts(
            data, args, wants_eval=report.report_rows > 0 or args.do_eval, train=train
        )
    model = load_model(names, len(tokenizer), lora, args)
    trainer = EBFTGRPOTrainer(
        model=model,
        args=args,
        train_dataset=prompts,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora_config(lora, model),
        rollout_func=rollouts_for(prompts, args),
    )
    use_compact_progress(trainer)

    comparison = Comparison(trainer, held_out, report)
    comparison.measure()
    trainer.train(resume_from_checkpoint=checkpoint)
    finish(trainer, comparison, lora, data)


def refuse_strided_options(data: DataArguments, report: ReportArguments) -> None:
    """Raise if an option was set that has no effect in this mode."""
    for group in (data, report):
        for field in dataclasses.fields(group):
            if field.name in STRIDED_ONLY and getattr(group, field.name) != field.default:
                raise ValueError(
                    f"{field.name}={getattr(group, field.name)!r} is for strided mode and would "
                    "have no effect in structured mode. Leave it out. Here, max_completion_length "
                    "sets lengths, and log_completions prints samples."
                )


# ---- Prompts ----------------------------------------------------------------------------------


def load_prompts(
    data: DataArguments, args: EBFTGRPOConfig, *, wants_eval: bool, train: Table | None = None
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Prompts with ground truths to train on and, if they are wanted, held-out prompts."""
    prompts, held_out = load_text(
        data, wants_eval, lambda table: read_prompts(table, data, args), train
    )
    if data.max_train_rows is not None:
        prompts = shuffled(prompts).select(range(min(data.max_train_rows, len(prompts))))
    say(args, f"Training data, {prompts.name}: {len(prompts)} prompts")
    if held_out is None:
        return prompts.records, None
    if data.max_eval_rows is not None:
        held_out = shuffled(held_out).select(range(min(data.max_eval_rows, len(held_out))))
    say(args, f"Held-out data, {held_out.name}: {len(held_out)} prompts")
    return prompts.records, held_out.records


def read_prompts(table: Table, data: DataArguments, args: EBFTGRPOConfig) -> RawDataset:
    """A table's prompts and ground truths, in columns `prompt` and `ground_truth`.

    Raises:
        ValueError: a column is missing, or a value is blank (unless such rows are skipped).
    """
    if "prompt" not in table.columns:
        raise ValueError(
            f"{table.name} has no column 'prompt', only {', '.join(map(repr, table.columns))}. "
            "Set transform to make prompts from these columns, or use --mode strided for text."
        )
    try:
        truth = ground_truth_column(table.columns, args.ground_truth_column)
    except ValueError as error:
        raise ValueError(f"{table.name}: {error}") from error
    refuse_columns(table.columns, table.name)  # the next lines would drop them silently
    kept = [name for name in ("prompt", truth, EMBED_THINKING) if name in table.columns]
    records = table.take(tuple(kept)).records
    if not isinstance(records, datasets.Dataset):
        records = datasets.Dataset.from_list(records)
    if truth != GROUND_TRUTH:
        records = records.rename_column(truth, GROUND_TRUTH)
    records = without_blanks(records, table.name, skip=data.bad_rows == "skip")
    args.ground_truth_column = None  # the column has its default name now
    return RawDataset(records, tuple(records.column_names), table.name)


def without_blanks(records: datasets.Dataset, name: str, *, skip: bool) -> datasets.Dataset:
    """The rows that have a prompt and a ground truth.

    Args:
        records: all rows.
        name: name of the data set, for messages.
        skip: leave out rows without a prompt or a ground truth, with a warning that counts them.

    Raises:
        ValueError: there are such rows and `skip` is False, or all rows are such rows.
    """
    columns = ("prompt", GROUND_TRUTH)
    blank = {
        number: column
        for column in reversed(columns)
        for number, value in enumerate(records[column])
        if not (value.strip() if isinstance(value, str) else value)
    }
    if not blank:
        return records
    rows = sorted(blank)
    listed = ", ".join(f"{number} ({blank[number]!r})" for number in rows[:5])
    counted = (
        f"{name}: {len(rows)} of {len(records)} rows have no prompt or no ground truth: "
        f"{listed}{', ...' if len(rows) > 5 else ''}"
    )
    if not skip or len(rows) == len(records):
        raise ValueError(
            f"{counted}. Fill them in, or leave such rows out with --bad_rows skip."
            if len(rows) < len(records)
            else f"{counted}. No row is left to train on; fill them in, or name other data."
        )
    logger.warning("%s. These rows are left out.", counted)
    return records.select([number for number in range(len(records)) if number not in blank])


def rollouts_for(prompts: datasets.Dataset, args: EBFTGRPOConfig) -> Callable[..., Any] | None:
    """The rollout function for chats of several turns; None, the trainer's default, for others."""
    truth = prompts[0][GROUND_TRUTH]
    if not isinstance(truth, list) or not isinstance(truth[0], str):
        return None
    generate = generate_on_server(VLLMRollouts(args)) if args.samples_on_server else None
    return MultiTurnRollouts(generate)


# ---- Results ----------------------------------------------------------------------------------


class Comparison:
    """Measures completions of held-out prompts before and after training, and compares them.

    Args:
        trainer: holds the policy and the reward.
        held_out: held-out prompts; up to `report.report_rows` of them are measured.
        report: the options of the report.
    """

    def __init__(
        self, trainer: EBFTGRPOTrainer, held_out: datasets.Dataset | None, report: ReportArguments
    ) -> None:
        self.trainer = trainer
        self.rows = None
        if held_out is not None and report.report_rows:
            count = min(report.report_rows, len(held_out))
            require_two_rows(count, report)
            self.rows = held_out.shuffle(seed=DATA_SEED).select(range(count))
        self.measured: list[dict[str, NDArray[np.float64]]] = []
        self.cross_entropy: list[float] = []

    def measure(self) -> None:
        """Measure the policy as it is now: on the same prompts in the same order, with one seed."""
        if self.rows is None:
            return
        say(self.trainer.args, f"Measuring {len(self.rows)} held-out prompts ...")
        reward: Any = self.trainer.reward
        score, scored = reward.score, []

        def record(*args: Any, **options: Any) -> Any:
            scored.append(score(*args, **options))
            return scored[-1]

        # Evaluation keeps only means, but intervals need the score of every prompt.
        reward.score = record
        try:
            metrics = self.trainer.evaluate(eval_dataset=self.rows)
        finally:
            reward.score = score
        self.cross_entropy.append(metrics["eval_ebft/ce_loss"])
        # (P, n, 1) of each batch, P prompts; the CFM loss is (P, 1).
        self.measured.append(
            {
                name: np.concatenate(
                    [
                        getattr(scores.rewards, name).flatten(1).mean(1).double().cpu().numpy()
                        for scores in scored
                    ]
                )
                for name in METRICS
            }
        )

    def show(self) -> None:
        """Print the differences, and write them to report.json."""
        if self.rows is None:
            return
        args = self.trainer.args
        before, after = self.measured
        differences: dict[str, PairedDifference] = {
            name: paired_bootstrap(before[name], after[name]) for name in METRICS
        }
        say(
            args,
            f"\n{len(self.rows)} held-out prompts before and after training, with the same random "
            "numbers and feature network.\nIntervals are by bootstrap over prompts; * marks a "
            "change beyond the noise.\n\n"
            + format_table(differences)
            + "\nCross-entropy of the ground truths, nats/token: {:.4f}, {:.4f}".format(
                *self.cross_entropy
            ),
        )
        if args.process_index == 0:
            write_report(args, differences)
