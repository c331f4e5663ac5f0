"""Structured mode of `hf-ebft train`: prompts with ground truths, on TRL's GRPOTrainer."""

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
from hf_ebft.commands.runs.ending import finish, refuse_lone_row, write_report
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
# Says whether the thinking of reasoning models is embedded; the transforms make it.
EMBED_THINKING = "embed_thinking"
# Options of the groups in options.py that only strided mode reads.
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
        checkpoint: where to go on from, if anywhere.
    """
    refuse_strided_options(data, report)
    tokenizer = load_tokenizer(names, args)
    tokenizer.padding_side = "left"  # TRL asks for it
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
    """Raise if an option was set that this mode would not read."""
    for group in (data, report):
        for field in dataclasses.fields(group):
            if field.name in STRIDED_ONLY and getattr(group, field.name) != field.default:
                raise ValueError(
                    f"{field.name}={getattr(group, field.name)!r} is for strided mode; in "
                    "structured mode nothing would read it. Leave it out; lengths are set by "
                    "max_completion_length, and what is printed by log_completions."
                )


# ---- Prompts ----------------------------------------------------------------------------------


def load_prompts(
    data: DataArguments, args: EBFTGRPOConfig, *, wants_eval: bool, train: Table | None = None
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Prompts with ground truths to train on and, if they are wanted, held-out ones."""
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
    """A table's prompts and ground truths, by these names.

    Raises:
        ValueError: there are none, or one of them is blank (unless such rows are skipped).
    """
    if "prompt" not in table.columns:
        raise ValueError(
            f"{table.name} has no column 'prompt', only {', '.join(map(repr, table.columns))}. "
            "Name a transform that makes prompts of them, or use --mode strided for text."
        )
    try:
        truth = ground_truth_column(table.columns, args.ground_truth_column)
    except ValueError as error:
        raise ValueError(f"{table.name}: {error}") from error
    refuse_columns(table.columns, table.name)  # or they would be taken out, and not be missed
    kept = [name for name in ("prompt", truth, EMBED_THINKING) if name in table.columns]
    records = table.take(tuple(kept)).records
    if not isinstance(records, datasets.Dataset):
        records = datasets.Dataset.from_list(records)
    if truth != GROUND_TRUTH:
        records = records.rename_column(truth, GROUND_TRUTH)
    records = without_blanks(records, table.name, skip=data.bad_rows == "skip")
    args.ground_truth_column = None  # it has the usual name now
    return RawDataset(records, tuple(records.column_names), table.name)


def without_blanks(records: datasets.Dataset, name: str, *, skip: bool) -> datasets.Dataset:
    """The rows that have a prompt and a ground truth.

    Args:
        records: all of them.
        name: of the data set, for messages.
        skip: leave the others out, with a warning that counts them.

    Raises:
        ValueError: there are others, and they are not to be left out, or there are no rows but
            these.
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
            f"{counted}. Fill them in, or leave such rows out by --bad_rows skip."
            if len(rows) < len(records)
            else f"{counted}. There is nothing to learn from."
        )
    logger.warning("%s. They are left out.", counted)
    return records.select([number for number in range(len(records)) if number not in blank])


def rollouts_for(prompts: datasets.Dataset, args: EBFTGRPOConfig) -> Callable[..., Any] | None:
    """Chats of several turns have rollouts of their own; None is what the trainer has by itself."""
    truth = prompts[0][GROUND_TRUTH]
    if not isinstance(truth, list) or not isinstance(truth[0], str):
        return None
    generate = generate_on_server(VLLMRollouts(args)) if args.samples_on_server else None
    return MultiTurnRollouts(generate)


# ---- Results ----------------------------------------------------------------------------------


class Comparison:
    """The policy's completions of held-out prompts, before and after.

    Args:
        trainer: it has the policy as it is, and the reward.
        held_out: prompts, of which some are measured.
        report: how.
    """

    def __init__(
        self, trainer: EBFTGRPOTrainer, held_out: datasets.Dataset | None, report: ReportArguments
    ) -> None:
        self.trainer = trainer
        self.rows = None
        if held_out is not None and report.report_rows:
            count = min(report.report_rows, len(held_out))
            refuse_lone_row(count, report)
            self.rows = held_out.shuffle(seed=DATA_SEED).select(range(count))
        self.measured: list[dict[str, NDArray[np.float64]]] = []
        self.cross_entropy: list[float] = []

    def measure(self) -> None:
        """Measure the policy as it is now: the same prompts in the same order, with one seed."""
        if self.rows is None:
            return
        say(self.trainer.args, f"Measuring {len(self.rows)} held-out prompts ...")
        reward: Any = self.trainer.reward
        score, scored = reward.score, []

        def record(*args: Any, **options: Any) -> Any:
            scored.append(score(*args, **options))
            return scored[-1]

        # Evaluation keeps means; the scores themselves allow for intervals.
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
        """Print the differences, and keep them in report.json."""
        if self.rows is None:
            return
        args = self.trainer.args
        before, after = self.measured
        differences: dict[str, PairedDifference] = {
            name: paired_bootstrap(before[name], after[name]) for name in METRICS
        }
        say(
            args,
            f"\nHeld-out prompts, {len(self.rows)}, before and after training: the same prompts, "
            "random numbers and feature\nnetwork. Intervals by bootstrap over prompts; * marks a "
            "change beyond the noise.\n\n"
            + format_table(differences)
            + "\nCross-entropy of the ground truths, nats/token: {:.4f}, {:.4f}".format(
                *self.cross_entropy
            ),
        )
        if args.process_index == 0:
            write_report(args, differences)
