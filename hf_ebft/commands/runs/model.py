"""Loading the model and the tokenizer of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_ebft.commands.runs.adapters import quantization
from hf_ebft.commands.runs.console import say
from hf_ebft.commands.runs.options import LoraArguments, ModelArguments
from hf_ebft.feature_network.loading import naming_option


def load_tokenizer(names: ModelArguments, args: TrainingArguments) -> Any:
    """Load the tokenizer; it gets a pad token if it has none.

    Raises:
        OSError: there is no such model.
        ValueError: the folder has no tokenizer, or one with neither a pad nor an EOS token.
    """
    option = "tokenizer_name_or_path" if names.tokenizer_name_or_path else "model_name_or_path"
    path = names.tokenizer_name_or_path or names.model_name_or_path
    tokenizer = read_tokenizer(option, path, **loading_options(names))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{option}={path!r} has a tokenizer with neither a pad nor an EOS token; add one, "
                "save the tokenizer, and set tokenizer_name_or_path to its folder."
            )
        tokenizer.pad_token = tokenizer.eos_token
        say(args, f"The tokenizer has no pad token; rows are padded with {tokenizer.eos_token!r}.")
    return tokenizer


def read_tokenizer(option: str, path: str, **options: Any) -> Any:
    """Load a tokenizer; errors name the option that names it.

    Args:
        option: name of the option, for errors.
        path: its value, a local folder or a name on the hub.
        options: keyword arguments of `from_pretrained`.

    Raises:
        OSError: there is no such folder, and no such name on the hub.
        ValueError: there is no tokenizer in it.
    """
    try:
        with naming_option(option, path):
            return AutoTokenizer.from_pretrained(path, **options)
    except ValueError as error:
        if not Path(path).is_dir() or any(Path(path).glob("tokenizer*")):
            raise
        # For a folder without tokenizer files, transformers asks for optional packages.
        raise ValueError(
            f"{option}={path!r} is a folder from which no tokenizer can be loaded; save one there "
            "(tokenizer.save_pretrained). With hf-ebft train, tokenizer_name_or_path can name "
            "another folder instead."
        ) from error


def load_model(
    names: ModelArguments,
    n_tokens: int,
    lora: LoraArguments | None = None,
    args: TrainingArguments | None = None,
) -> Any:
    """Load the model to train; a quantized one is prepared for adapters.

    Args:
        names: the model, and how its weights are stored.
        n_tokens: size of the tokenizer's vocabulary.
        lora: says whether to quantize the model. Default: no.
        args: the training arguments, for precision and device of a quantized model.

    Raises:
        ValueError: the tokenizer has tokens that the model does not embed.
        ImportError: the model is to be quantized, but bitsandbytes is not installed.
    """
    options = loading_options(names)
    if names.attn_implementation is not None:
        options["attn_implementation"] = names.attn_implementation
    if names.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Releases that have this class keep the weights packed by default, which cannot be trained.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    dtype: Any = "auto" if names.dtype == "auto" else getattr(torch, names.dtype)
    quantizes = lora is not None and lora.quantizes
    if quantizes:
        assert lora is not None and args is not None
        options["quantization_config"] = quantization(lora, args, dtype)
        options["device_map"] = {"": args.device}  # quantized weights cannot be moved later
    model: Any = AutoModelForCausalLM.from_pretrained(
        names.model_name_or_path, dtype=dtype, **options
    )
    embedded = model.get_input_embeddings().weight.shape[0]
    if n_tokens > embedded:
        raise ValueError(
            f"The tokenizer has {n_tokens} tokens, but {names.model_name_or_path} has embeddings "
            f"for {embedded} only; use the model's own tokenizer, or resize the model's embeddings "
            "and save it first."
        )
    if quantizes:
        # This freezes the weights and keeps norms and head in float32. Gradient checkpointing is
        # left to the trainer, which switches it on if it is set.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def loading_options(names: ModelArguments) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for model and tokenizer: the options that are set."""
    options = {
        "revision": names.model_revision,
        "gguf_file": names.gguf_file,
        "trust_remote_code": names.trust_remote_code or None,
    }
    return {name: value for name, value in options.items() if value is not None}
