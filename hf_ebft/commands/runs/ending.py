"""From the checkpoint that a run goes on from to the model that it leaves."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_ebft import EBFTTrainer
from hf_ebft.commands.runs.console import say
from hf_ebft.commands.runs.options import DataArguments, LoraArguments, ReportArguments
from hf_ebft.data import TokenizedRows
from hf_ebft.evaluation import PairedDifference

logger = logging.getLogger(__name__)

# With fewer documents than this behind the measured rows, rows are resampled instead.
FEWEST_DOCUMENTS = 8


def resume_from(args: TrainingArguments) -> str | None:
    """The checkpoint to go on from, if any; `true` means the newest one in output_dir.

    Raises:
        ValueError: there is none.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        folder = str(args.output_dir)
        checkpoint = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        if checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint=true finds no checkpoint in {folder}; name the folder of "
                "one, or leave the option out to start anew."
            )
        return str(checkpoint)
    if not Path(wanted).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={wanted} is no folder; name that of a checkpoint, or write "
            "true for the newest one in output_dir."
        )
    return str(wanted)


def refuse_lone_row(measured: int, report: ReportArguments) -> None:
    """Refuse, before training, a report that could show no interval after it.

    Raises:
        ValueError: with what gives more rows.
    """
    if measured < 2:
        raise ValueError(
            f"report_rows={report.report_rows} leaves {measured} held-out row to measure, and an "
            "interval of the difference takes 2. Hold out more text (eval_fraction, "
            "max_eval_rows, eval_dataset_name_or_path), or set report_rows=0."
        )


def documents_of(rows: TokenizedRows, indices: Iterable[int]) -> tuple[list[int], bool]:
    """The document that each measured row was cut from, and whether to resample by document.

    Rows of one document resemble each other, so that intervals are over documents, except where
    there are too few of them.

    Args:
        rows: all that could be measured.
        indices: of those that were.
    """
    documents = [rows.sources[index][0] for index in indices]
    return documents, len(set(documents)) >= FEWEST_DOCUMENTS


def write_report(args: TrainingArguments, differences: Mapping[str, PairedDifference]) -> None:
    """Write the numbers of the table to report.json, and say where; in the main process."""
    path = Path(str(args.output_dir), "report.json")
    numbers = {name: dataclasses.asdict(paired) for name, paired in differences.items()}
    path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    say(args, f"\nThe numbers of the table are in {path}.")


class Comparison(Protocol):
    """The model on held-out data, before and after training."""

    def measure(self) -> None:
        """Measure the model as it is now."""

    def show(self) -> None:
        """Print the differences, and write them to output_dir."""


def finish(
    trainer: Trainer, comparison: Comparison, lora: LoraArguments, data: DataArguments
) -> None:
    """Save the model, measure it, show the comparison, write the card, say where everything is.

    A step that fails stops no other that can do without it: a full disk must not cost the table,
    and no report the model.

    Args:
        trainer: it has trained.
        comparison: measured before training.
        lora: whether adapters are merged.
        data: for the card.

    Raises:
        Exception: the first error of a step, after all others.
    """
    errors: list[Exception] = []

    def attempt(what: str, step: Callable[[], Any]) -> bool:
        try:
            step()
        except Exception as error:
            logger.exception("%s failed. The run goes on with what comes after it.", what)
            errors.append(error)
            return False
        return True

    if lora.lora_merge:  # measured first: a shared feature network is the model without adapters
        measured = attempt("Measuring the model", comparison.measure)
        saved = attempt("Saving the model", lambda: save(trainer, lora))
    else:
        saved = attempt("Saving the model", lambda: save(trainer, lora))
        measured = attempt("Measuring the model", comparison.measure)
    if measured:
        attempt("The report", comparison.show)
    attempt("Saving the trainer's state", trainer.save_state)
    if saved:
        attempt("The model card", lambda: write_card(trainer, data))
        if trainer.args.push_to_hub:
            attempt("Pushing to the hub", trainer.push_to_hub)
        say_where(trainer)
    end(trainer)
    if errors:
        raise errors[0]


def save(trainer: Trainer, lora: LoraArguments) -> None:
    """The model, or its adapters, with the tokenizer, into output_dir."""
    if lora.lora_merge:
        adapted: Any = trainer.model
        trainer.model = adapted.merge_and_unload()
    trainer.save_model()


def write_card(trainer: Trainer, data: DataArguments) -> None:
    """The model card, with the name of the data."""
    if isinstance(trainer, EBFTTrainer):
        names = [
            Path(name).name if Path(name).exists() else name for name in data.dataset_name_or_path
        ]
        trainer.create_model_card(dataset=names if len(names) > 1 else names[0])


def end(trainer: Trainer) -> None:
    """Close TensorBoard's file and the process group.

    Evaluation after training opens the file again. A process group that is open when Python exits
    sometimes aborts the process, though its work is done.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
    trainer.accelerator.end_training()


def say_where(trainer: Trainer) -> None:
    """Where curves and model are, and how to open them."""
    args = trainer.args
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            say(
                args,
                f"The curves are in {callback.logging_dir}; to see them: "
                f"tensorboard --logdir {args.output_dir}",
            )
    say(
        args,
        f"One page about the run: hf-ebft report {args.output_dir} "
        f"--output {Path(str(args.output_dir), 'report.html')}",
    )
    say(args, f"The model is in {args.output_dir}: AutoModelForCausalLM.from_pretrained loads it.")
