"""Data, model and tokenizer of a run, and what both modes do at its end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stdlib_functions
import stdlib_text
import torch
import transformers
from peft import LoraConfig
from run_options import (
    STDLIB,
    STDLIB_FUNCTIONS,
    DataArguments,
    LoraArguments,
    ModelArguments,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from hf_ebft import EBFTTrainer
from hf_ebft.data import TRANSFORMS, RawDataset, Table, hold_out, load_table, transform_rows

# The data must not depend on --seed, or runs with different seeds could not be compared.
DATA_SEED = 0


def load_text(
    data: DataArguments,
    wants_eval: bool,
    read: Callable[[Table], RawDataset],
    opened: Table | None,
) -> tuple[RawDataset, RawDataset | None]:
    """Raw training text and, if it is wanted, held-out text; ``read`` takes it from the columns."""
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


def lora_config(lora: LoraArguments) -> LoraConfig | None:
    """What PEFT is to wrap the model with, if anything."""
    if not lora.use_peft:
        return None
    modules = lora.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=modules[0] if modules == ["all-linear"] else modules,
    )


def save(trainer: Trainer, lora: LoraArguments, data: DataArguments) -> None:
    """The model (or its adapters), the tokenizer, the card and the log, into output_dir."""
    if isinstance(trainer, EBFTTrainer):
        name = data.dataset_name_or_path
        trainer.create_model_card(dataset=Path(name).name if Path(name).exists() else name)
    if lora.lora_merge:
        adapted: Any = trainer.model
        trainer.model = adapted.merge_and_unload()
    trainer.save_model()
    trainer.save_state()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


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
        f"One page about the run: python -m hf_ebft.report {args.output_dir} "
        f"--output {Path(str(args.output_dir), 'report.html')}",
    )
    say(args, f"The model is in {args.output_dir}: AutoModelForCausalLM.from_pretrained loads it.")


def say(args: TrainingArguments, message: str) -> None:
    """Print in one process only."""
    if args.process_index == 0:
        print(message, flush=True)
