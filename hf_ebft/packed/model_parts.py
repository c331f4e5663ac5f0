"""Where the parts of a transformers model are: its bare model, backbone, layers and vocabulary."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

# What forwards of models and layers call their cache, newest name first.
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
    """Token ids that an active adapter treats unlike others: those whose embeddings it trains."""
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
    """Whether gradient (or, as newer releases say, activation) checkpointing is on."""
    base = bare_model(model)
    new_name = hasattr(type(base), "is_activation_checkpointing")
    name = "is_activation_checkpointing" if new_name else "is_gradient_checkpointing"
    return bool(getattr(base, name))


def cache_argument(model: nn.Module) -> str:
    """What the model's own forward calls the keys and values of earlier tokens.

    transformers 5.24 has renamed the argument, and warns of the older name.
    """
    parameters = inspect.signature(bare_model(model).forward).parameters
    newest, older = CACHE_ARGUMENTS
    return newest if newest in parameters else older


def shares_keys(config: Any) -> bool:
    """Whether the highest layers of a model use keys and values of lower ones."""
    return bool(getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0))


def keeping_every_state(model: nn.Module, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument by which a model returns the states of all tokens, if it has to be told.

    Newer releases tell a model that shares keys between its layers which logits are kept. Where
    that is a number, be it for all of them, the model cuts masks to these tokens, so that its
    attention functions get other masks than the model was given.

    Args:
        model: a model or its backbone.
        input_ids: (B, Q), that it will read.
    """
    readers = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not shares_keys(readers[0].config) or all(
        "logits_to_keep" not in forward_inputs(part) for part in readers
    ):
        return {}
    return {"logits_to_keep": torch.arange(input_ids.shape[1], device=input_ids.device)}


def _reads_tokens(module: nn.Module, base: PreTrainedModel) -> bool:
    """Whether the input embeddings lie inside a module, as they do not in a vision tower."""
    embeddings = base.get_input_embeddings()
    return any(inner is embeddings for inner in module.modules())


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers model: its first list of as many modules.

    Lists inside towers for other modalities do not count.

    Raises:
        ValueError: no such list, or layers without one hidden state each.
    """
    base = bare_model(model)
    name, config = type(base).__name__, base.config.get_text_config(decoder=True)
    if hasattr(config, "altup_num_inputs"):
        raise ValueError(
            f"{name} keeps several hidden states per token side by side, so that a layer has no "
            "one hidden state to take features from. Pass another model as feature_network."
        )
    if getattr(config, "cross_attention_layers", None):
        raise ValueError(
            f"{name} skips its cross-attention layers where there is no image, so that layers "
            "cannot be counted by depth. Pass another model as feature_network."
        )
    if getattr(config, "n_recurrent_loops", 1) > 1:
        raise ValueError(
            f"{name} runs some of its layers several times, so that layers cannot be counted by "
            "depth. Pass another model as feature_network."
        )
    # Some layers hold two attentions and count as two in num_hidden_layers, not in num_layers.
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
    """Token that ends a document: the tokenizer's EOS, else the first one of the model's."""
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
