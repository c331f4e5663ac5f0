"""The checkpoint that a run resumes from, and what happens after training: saving and reporting."""

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

# The bootstrap resamples documents, or rows if they come from fewer documents than this.
FEWEST_DOCUMENTS = 8


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint of `resume_from_checkpoint`; `true` means the newest one in output_dir.

    Raises:
        ValueError: there is no such checkpoint.
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
                "a checkpoint, or leave the option out to start anew."
            )
        return str(checkpoint)
    if not Path(wanted).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={wanted} is not a folder; name the folder of a checkpoint, or "
            "write true for the newest one in output_dir."
        )
    return str(wanted)


def require_two_rows(measured: int, report: ReportArguments) -> None:
    """Raise, before training, if the report after it could not compute an interval.

    Raises:
        ValueError: fewer than two rows; the message says which options give more.
    """
    if measured < 2:
        raise ValueError(
            f"report_rows={report.report_rows} leaves {measured} held-out row to measure, but a "
            "confidence interval needs at least 2. Hold out more text (eval_fraction, "
            "max_eval_rows, eval_dataset_name_or_path), or set report_rows=0."
        )


def documents_of(rows: TokenizedRows, indices: Iterable[int]) -> tuple[list[int], bool]:
    """The document that each measured row was cut from, and whether to resample by document.

    Rows of one document resemble each other, so the bootstrap resamples documents, unless there
    are too few of them.

    Args:
        rows: all rows.
        indices: indices of the measured ones.
    """
    documents = [rows.sources[index][0] for index in indices]
    return documents, len(set(documents)) >= FEWEST_DOCUMENTS


def write_report(args: TrainingArguments, differences: Mapping[str, PairedDifference]) -> None:
    """Write the numbers of the table to report.json; call it in the main process only."""
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
    """Save the model, measure it, show the comparison, write the card, print where everything is.

    If a step fails, the steps that do not depend on it are still done: a full disk must not cost
    the user the table, nor a failing report the model.

    Args:
        trainer: the trainer, after training.
        comparison: has measured the model before training.
        lora: says whether adapters are merged.
        data: names of the data, for the card.

    Raises:
        Exception: the first error of a step, raised after all other steps.
    """
    errors: list[Exception] = []

    def attempt(what: str, step: Callable[[], Any]) -> bool:
        try:
            step()
        except Exception as error:
            logger.exception("%s failed. The run continues with the remaining steps.", what)
            errors.append(error)
            return False
        return True

    if lora.lora_merge:  # measure first, since merging changes a feature network that is shared
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
        print_locations(trainer)
    close(trainer)
    if errors:
        raise errors[0]


def save(trainer: Trainer, lora: LoraArguments) -> None:
    """Save the model or its adapters, with the tokenizer, in output_dir."""
    if lora.lora_merge:
        adapted: Any = trainer.model
        trainer.model = adapted.merge_and_unload()
    trainer.save_model()


def write_card(trainer: Trainer, data: DataArguments) -> None:
    """Write the model card, with the name of the data."""
    if isinstance(trainer, EBFTTrainer):
        names = [
            Path(name).name if Path(name).exists() else name for name in data.dataset_name_or_path
        ]
        trainer.create_model_card(dataset=names if len(names) > 1 else names[0])


def close(trainer: Trainer) -> None:
    """Close TensorBoard's file and the process group.

    Evaluation after training has opened the file again. A process group that is still open when
    Python exits sometimes aborts the process, though its work is done.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
    trainer.accelerator.end_training()


def print_locations(trainer: Trainer) -> None:
    """Print where the curves and the model are, and how to open them."""
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
