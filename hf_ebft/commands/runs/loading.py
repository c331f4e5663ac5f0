"""Data, model and tokenizer of a run, and what both modes do at its end."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_ebft import EBFTTrainer
from hf_ebft.commands.runs.options import (
    STDLIB,
    STDLIB_FUNCTIONS,
    DataArguments,
    LoraArguments,
    ModelArguments,
    ReportArguments,
)
from hf_ebft.data import (
    TRANSFORMS,
    RawDataset,
    Table,
    hold_out,
    load_table,
    stdlib_functions,
    stdlib_text,
    transform_rows,
)

logger = logging.getLogger(__name__)

# A module's name, or its end, as opposed to a regular expression.
NAME = re.compile(r"[\w.-]+")
# The data must not depend on --seed, or runs with different seeds could not be compared.
DATA_SEED = 0


def load_text(
    data: DataArguments,
    wants_eval: bool,
    read: Callable[[Table], RawDataset],
    opened: Table | None,
) -> tuple[RawDataset, RawDataset | None]:
    """Raw training text and, if it is wanted, held-out text; `read` takes it from the columns."""
    train = read(opened or load_split(data.dataset_name_or_path, data.train_split, data))
    if not wants_eval:
        return train, None
    eval_name = data.eval_dataset_name_or_path or data.dataset_name_or_path
    eval_split = data.eval_split
    if eval_split is None and eval_name.startswith((STDLIB, STDLIB_FUNCTIONS)):
        eval_split = "report"
    if eval_split is None and data.eval_dataset_name_or_path is not None:
        eval_split = "train"
    if eval_split is not None:
        if (eval_name, eval_split) == (data.dataset_name_or_path, data.train_split):
            raise ValueError(
                f"eval_split={eval_split!r} of {eval_name} is what is trained on; name another "
                "split."
            )
        return train, read(load_split(eval_name, eval_split, data))
    if data.eval_fraction == 0:
        raise ValueError(
            "There is no held-out text to measure on; set eval_split, eval_dataset_name_or_path or "
            "eval_fraction, or report_rows=0 and eval_strategy='no'."
        )
    return hold_out(train, data.eval_fraction)


def shuffled(text: RawDataset) -> RawDataset:
    """The rows in another order, the same every time."""
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(DATA_SEED))
    return text.select(order.tolist())


def load_split(name: str, split: str, data: DataArguments) -> Table:
    """One split, of the standard library or of any dataset, transformed if that is asked for."""
    if name.startswith(STDLIB):
        corpus = stdlib_text.load(name.removeprefix(STDLIB), split)
        records: Any = [{"text": document.text} for document in corpus.documents]
        table = Table(records, ("text",), f"{name}/{split}")
    elif name.startswith(STDLIB_FUNCTIONS):
        records = stdlib_functions.load(name.removeprefix(STDLIB_FUNCTIONS), split)
        table = Table(records, ("prompt", "ground_truth"), f"{name}/{split}")
    else:
        table = load_table(
            name, split, config_name=data.dataset_config_name, column=data.text_column
        )
    return transformed(table, data)


def transformed(table: Table, data: DataArguments) -> Table:
    """The prompts and ground truths that the transform makes, or the table as it is."""
    settings = json.loads(data.transform_args or "{}")
    if data.transform is None:
        if settings:
            raise ValueError(f"transform_args={data.transform_args} needs a transform; name one.")
        return table
    if data.transform not in TRANSFORMS:
        raise ValueError(
            f"transform={data.transform!r} is unknown; choose one of {', '.join(TRANSFORMS)}."
        )
    try:
        records = transform_rows(
            table.records, TRANSFORMS[data.transform], bad_rows=data.bad_rows, **settings
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{table.name}, transform {data.transform}: {error}") from error
    return Table(records, tuple(records[0]), table.name)


def load_tokenizer(names: ModelArguments, args: TrainingArguments) -> Any:
    """The model's tokenizer, with a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(
        names.tokenizer_name_or_path or names.model_name_or_path, **loading_options(names)
    )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {names.model_name_or_path} has neither a pad nor an EOS token; "
                "add one and save it, then give it as tokenizer_name_or_path."
            )
        tokenizer.pad_token = tokenizer.eos_token
        say(args, f"The tokenizer has no pad token; rows are padded with {tokenizer.eos_token!r}.")
    return tokenizer


def load_model(names: ModelArguments, n_tokens: int) -> Any:
    """The model to train; it must know all the tokenizer's tokens."""
    options = loading_options(names)
    if names.attn_implementation is not None:
        options["attn_implementation"] = names.attn_implementation
    if names.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Packed weights, the default of releases that know this class, cannot be trained.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    dtype = "auto" if names.dtype == "auto" else getattr(torch, names.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        names.model_name_or_path, dtype=dtype, **options
    )
    embedded = model.get_input_embeddings().weight.shape[0]
    if n_tokens > embedded:
        raise ValueError(
            f"The tokenizer has {n_tokens} tokens, {names.model_name_or_path} embeds {embedded}; "
            "use the model's own tokenizer, or resize the model's embeddings and save it first."
        )
    return model


def loading_options(names: ModelArguments) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for model and tokenizer; only what was set."""
    options = {
        "revision": names.model_revision,
        "gguf_file": names.gguf_file,
        "trust_remote_code": names.trust_remote_code or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def lora_config(lora: LoraArguments, model: Any) -> LoraConfig | None:
    """What PEFT is to wrap the model with, if anything.

    Raises:
        ValueError: a name or a regular expression that matches no module of the model.
    """
    if not lora.use_peft:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=target_modules(lora.lora_target_modules, model),
    )


def target_modules(modules: list[str], model: Any) -> str | list[str]:
    """Names as a list, or one regular expression as the text that PEFT takes for one.

    Raises:
        ValueError: a name or a regular expression that matches no module of the model.
    """
    if modules == ["all-linear"]:
        return modules[0]
    full_names = [name for name, _ in model.named_modules()]
    if len(modules) == 1 and not NAME.fullmatch(modules[0]):
        (pattern,) = modules
        try:
            matches = any(re.fullmatch(pattern, name) for name in full_names)
        except re.error as error:
            raise ValueError(
                f"lora_target_modules={pattern!r} is no regular expression: {error}."
            ) from error
        if not matches:
            raise ValueError(_matches_nothing(pattern, "regular expression", model))
        return pattern
    for wanted in modules:
        if not any(f".{name}".endswith(f".{wanted}") for name in full_names):
            raise ValueError(_matches_nothing(wanted, "name", model))
    return modules


def _matches_nothing(wanted: str, kind: str, model: Any) -> str:
    linear = {
        name.rpartition(".")[2]: name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    example = next(iter(linear.values()), "none")
    return (
        f"lora_target_modules: the {kind} {wanted!r} matches no module of the model. Its linear "
        f"layers are called {', '.join(linear)}, {example!r} in full; write a list of such names, "
        "one regular expression for the full names, or all-linear."
    )


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
        name = data.dataset_name_or_path
        trainer.create_model_card(dataset=Path(name).name if Path(name).exists() else name)


def end(trainer: Trainer) -> None:
    """Close TensorBoard's file and the process group.

    Evaluation after training opens the file again. A process group that is open when Python exits
    sometimes aborts the process, though its work is done.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
    trainer.accelerator.end_training()


def show_library_log() -> None:
    """Let the library say what it decided, such as where the feature network lives."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_ebft").setLevel(logging.INFO)


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


def say(args: TrainingArguments, message: str) -> None:
    """Print in one process only."""
    if args.process_index == 0:
        print(message, flush=True)
