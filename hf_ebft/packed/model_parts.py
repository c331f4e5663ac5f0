"""Finds parts of a transformers model: the bare model, backbone, decoder layers and vocabulary."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

# Names of the forward's argument for the cache, in models and layers, newest first.
CACHE_ARGUMENTS = ("cache", "past_key_values")


def bare_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper (PEFT's forward hides the argument names)."""
    get_base_model = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, get_base_model() if callable(get_base_model) else model)


def active_adapter_configs(model: nn.Module) -> list[Any]:
    """The `PeftConfig` of every active adapter of a PEFT model; none for any other model."""
    peft_model: Any = model
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return []
    return [peft_model.peft_config[name] for name in peft_model.active_adapters]


def tokens_with_adapters(model: nn.Module) -> list[int]:
    """Ids of tokens that an active adapter treats specially (trained embeddings, aLoRA)."""
    found: set[int] = set()
    for adapter in active_adapter_configs(model):
        for name in ("token_indices", "trainable_token_indices", "alora_invocation_tokens"):
            ids = getattr(adapter, name, None) or []
            for each in ids.values() if isinstance(ids, dict) else [ids]:
                found.update(each)
    return sorted(found)


def backbone(model: nn.Module) -> PreTrainedModel:
    """The model without its head: the outermost transformers model inside it that reads tokens."""
    base = bare_model(model)
    readers = [
        module
        for module in base.modules()
        if isinstance(module, PreTrainedModel)
        and _reads_tokens(module, base)
        and "position_ids" in inspect.signature(module.forward).parameters
    ]
    return readers[1] if len(readers) > 1 else base


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on (newer releases call it activation checkpointing)."""
    base = bare_model(model)
    new_name = hasattr(type(base), "is_activation_checkpointing")
    name = "is_activation_checkpointing" if new_name else "is_gradient_checkpointing"
    return bool(getattr(base, name))


def cache_argument(model: nn.Module) -> str:
    """The name of the forward's argument for the keys and values of earlier tokens.

    transformers 5.24 renamed the argument and warns about the older name.
    """
    parameters = inspect.signature(bare_model(model).forward).parameters
    newest, older = CACHE_ARGUMENTS
    return newest if newest in parameters else older


def shares_keys(config: Any) -> bool:
    """Whether the highest layers of a model use keys and values of lower ones."""
    return bool(getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0))


def keeping_every_state(model: nn.Module, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument that makes a model return the states of all tokens; empty if it needs none.

    In newer releases, a model that shares keys between its layers uses `logits_to_keep` in its
    layers, too. If it is a number (even the number that keeps all tokens), the model slices the
    masks. Its attention functions then get other masks than the model was given. A tensor of
    indices avoids this.

    Args:
        model: a model or its backbone.
        input_ids: (B, Q), the tokens that the model will read.
    """
    readers = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not shares_keys(readers[0].config) or all(
        "logits_to_keep" not in forward_inputs(part) for part in readers
    ):
        return {}
    return {"logits_to_keep": torch.arange(input_ids.shape[1], device=input_ids.device)}


def _reads_tokens(module: nn.Module, base: PreTrainedModel) -> bool:
    """Whether a module contains the input embeddings (a vision tower does not)."""
    embeddings = base.get_input_embeddings()
    return any(inner is embeddings for inner in module.modules())


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers model: its first module list of the configured length.

    Lists inside towers for other modalities do not count.

    Raises:
        ValueError: the model has no such list, or its layers do not each have one hidden state.
    """
    base = bare_model(model)
    name, config = type(base).__name__, base.config.get_text_config(decoder=True)
    if hasattr(config, "altup_num_inputs"):
        raise ValueError(
            f"{name} keeps several hidden states per token side by side, but features need one "
            "hidden state per layer. Pass another model as feature_network."
        )
    if getattr(config, "cross_attention_layers", None):
        raise ValueError(
            f"{name} skips its cross-attention layers if there is no image, so feature layers "
            "cannot be chosen by depth. Pass another model as feature_network."
        )
    if getattr(config, "n_recurrent_loops", 1) > 1:
        raise ValueError(
            f"{name} runs some of its layers several times, so feature layers cannot be chosen by "
            "depth. Pass another model as feature_network."
        )
    # Layers with two attention modules count as two in num_hidden_layers but as one in num_layers.
    counts = {config.num_hidden_layers, getattr(config, "num_layers", config.num_hidden_layers)}
    towers = [
        module
        for module in base.modules()
        if isinstance(module, PreTrainedModel)
        and module.config is not config
        and not _reads_tokens(module, base)
    ]
    in_towers = {inner for tower in towers for inner in tower.modules()}
    for module in base.modules():
        if not isinstance(module, nn.ModuleList) or module in in_towers:
            continue
        if len(module) in counts:
            return module
    raise ValueError(
        f"{name} has no list of {config.num_hidden_layers} layers to take features from. Pass "
        "another model as feature_network."
    )


def end_of_text_id(model: nn.Module, processing_class: Any = None) -> int | None:
    """Id of the token that ends a document: the tokenizer's EOS, or else the model's first EOS."""
    from_tokenizer = getattr(processing_class, "eos_token_id", None)
    if from_tokenizer is not None:
        return int(from_tokenizer)
    eos = bare_model(model).config.get_text_config(decoder=True).eos_token_id
    return eos[0] if isinstance(eos, list) else eos


def forward_inputs(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that the model's own forward takes."""
    return frozenset(inspect.signature(bare_model(model).forward).parameters)


def vocabulary_size(model: nn.Module) -> int:
    """Number of token ids that the model embeds."""
    weight = bare_model(model).get_input_embeddings().weight
    return cast(torch.Tensor, weight).shape[0]
