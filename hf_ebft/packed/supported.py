"""Which models can be trained on packed rows, and which attention they need for it.

Each rule refuses, before training, a model whose results would be silently wrong. If a model is
wrong only beyond some length, the limit is returned and checked against each batch.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_ebft.packed.attention_choice import (
    NAMED,
    AttentionChoice,
    AttentionFacts,
    choose_attention,
)
from hf_ebft.packed.flex import FLEX
from hf_ebft.packed.masks import MASKABLE_LAYERS, SPLIT
from hf_ebft.packed.model_code import (
    calls_chosen_attention,
    looks_at_block_masks,
    mask_functions,
    why_not_sdpa,
    why_not_split,
)
from hf_ebft.packed.model_parts import active_adapter_configs, bare_model
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout

logger = logging.getLogger(__name__)

# Arguments that a model's forward must take for packed rows.
REQUIRED_ARGUMENTS = ("input_ids", "attention_mask", "position_ids")
# Model types whose forward takes these arguments but does not use them as a packed row needs.
REFUSED_TYPES = {
    "blt": "groups bytes into patches by their order in the row",
    "openai-gpt": "takes no attention mask with one entry per query and key",
    "reformer": "sorts the row into chunks by hashing and takes no attention mask with one entry "
    "per query and key",
    "xlm": "takes no attention mask with one entry per query and key",
}
# PEFT methods whose effect on a token depends on the other tokens in the forward pass.
REFUSED_ADAPTERS = {
    "LILY": "mixes its experts by the mean over all tokens of a forward pass",
    "POLY": "needs a task id for every row, and EBFT batches have none",
    "SHADOW": "runs a second network beside the layers, which gets neither mask nor positions",
    "XLORA": "computes the weights of its experts in an extra pass over the whole row",
}
# Options of a `LoraConfig` with such an effect, by the name of their field.
REFUSED_LORA = {
    "alora_invocation_tokens": "is active from the invocation tokens on, in the order of tokens in "
    "the row, but in a packed row that is not the order of the text",
    "monteclora_config": "draws new weights for every forward pass, so rollouts would be scored "
    "with other weights than they were sampled with",
    "velora_config": "approximates its gradient by an average over the tokens of a forward pass",
}


@dataclass(frozen=True)
class RowLimits:
    """Lengths beyond which a model is no longer exact on packed rows.

    Attributes:
        document: the most tokens that a document may have, and the reason; None: no limit.
        row: the most tokens that a packed row may have, and the reason; None: no limit.
    """

    document: tuple[int, str] | None = None
    row: tuple[int, str] | None = None

    def check(self, layout: PackedLayout) -> None:
        """Raise a ValueError if a document or the packed row is too long for the model."""
        if self.row is not None and layout.row_width > self.row[0]:
            raise ValueError(
                f"The packed row has {layout.row_width} tokens, but {self.row[1]} beyond "
                f"{self.row[0]} tokens. Use shorter documents, fewer samples or a larger stride."
            )
        if self.document is not None:
            self.check_documents(layout.documents)

    def check_documents(self, documents: Documents) -> None:
        """Raise a ValueError if a document is too long for the model."""
        assert self.document is not None
        per_row = documents.length.amax(dim=1)
        row, longest = int(per_row.argmax()), int(per_row.max())
        if longest > self.document[0]:
            raise ValueError(
                f"A document has {longest} tokens (in row {row} of the batch), but "
                f"{self.document[1]} beyond {self.document[0]} tokens. Cut the "
                "documents shorter (sequence_len in hf-ebft train)."
            )


def check_supported(model: nn.Module) -> RowLimits:
    """Raise if a model cannot be exact on packed rows; return its length limits.

    Args:
        model: the policy or feature network, bare or wrapped by PEFT, before it is distributed.

    Raises:
        ValueError: the model or an adapter cannot be exact; the message gives the reason and what
            to use instead.
    """
    refuse_adapters(model)
    base = bare_model(model)
    name = type(base).__name__
    if not hasattr(base, "config") or not hasattr(base.config, "get_text_config"):
        raise ValueError(
            f"{name} is not a transformers model (it has no config); EBFT reads its layers and "
            "attention from there. Pass an AutoModelForCausalLM."
        )
    config = base.config.get_text_config(decoder=True)
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; EBFT needs a causal language model.")
    if base.config.model_type in REFUSED_TYPES:
        raise ValueError(
            f"{name} {REFUSED_TYPES[base.config.model_type]}, so rollouts that share a row cannot "
            "be kept apart. Use another architecture."
        )
    _refuse_other_outputs(config, name)
    layer_types = set(getattr(config, "layer_types", None) or ())
    # A hybrid model's class may also be configured with attention layers only.
    only_attention = bool(layer_types) and layer_types <= MASKABLE_LAYERS
    if getattr(base, "_is_stateful", False) and not only_attention:
        raise ValueError(
            f"{name} carries a recurrent state along the row, so rollouts that share a row would "
            "leak into each other. Use a model whose layers are all attention layers."
        )
    if _sees_the_future(base, config):
        raise ValueError(
            f"{name} is configured with bidirectional attention: a token sees the text after it. "
            "Use a causal language model (for BERT and its relatives, one with is_decoder=True)."
        )
    parameters = inspect.signature(base.forward).parameters
    missing = [argument for argument in REQUIRED_ARGUMENTS if argument not in parameters]
    if missing:
        raise ValueError(
            f"{name}.forward takes no {', '.join(missing)}. It derives positions from the order of "
            "tokens in the row (as ALiBi does, for example), but in a packed row that is not the "
            "order of the text. Use a model with rotary or learned position embeddings."
        )
    if getattr(config, "alibi", False):
        raise ValueError(
            f"{name} uses ALiBi, whose positions follow the order of tokens in the row, but in a "
            "packed row that is not the order of the text. Use a model with rotary or learned "
            "position embeddings."
        )
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in base.modules()):
        raise ValueError(
            f"{name} starts its position ids after its padding id and skips padding ids in the "
            "text; a packed row counts each document from 0. Use a model whose position ids start "
            "at 0."
        )
    return _row_limits(config, name)


def refuse_adapters(model: nn.Module) -> None:
    """Raise a ValueError if an active adapter's effect on a token depends on the rest of the pass.

    Such an adapter has another effect in training than on a single text. This is true for packed
    rows and for batches of plain rows.

    Args:
        model: with or without PEFT adapters.
    """
    for adapter in active_adapter_configs(model):
        method = adapter.peft_type.value
        if adapter.is_prompt_learning:
            raise ValueError(
                f"PEFT method {method} puts virtual tokens before every row, which shifts the "
                "packed row's mask. Use an adapter method such as LoRA."
            )
        if method in REFUSED_ADAPTERS:
            raise ValueError(
                f"PEFT method {method} {REFUSED_ADAPTERS[method]}. Use an adapter method that only "
                "changes weights, such as LoRA."
            )
        for field, reason in REFUSED_LORA.items():
            value = getattr(adapter, field, None)
            if value:
                raise ValueError(
                    f"LoRA with {field}={value!r} {reason}. Leave {field} out of the LoraConfig."
                )


def _refuse_other_outputs(config: Any, name: str) -> None:
    """Raise a ValueError if the configuration changes what a forward pass returns."""
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"{name} has output_router_logits=True in its configuration, so its forward adds a "
            "load-balancing loss. That loss needs a mask of two dimensions, and EBFT would not "
            "train on it. Set model.config.output_router_logits = False."
        )
    if not getattr(config, "return_dict", True):
        raise ValueError(
            f"{name} has return_dict=False in its configuration, so its forward returns a tuple "
            "without names. Set model.config.return_dict = True."
        )


def refuse_headless(model: nn.Module) -> None:
    """Raise a ValueError if a model has no language-model head and so computes no logits."""
    base = bare_model(model)
    if base.get_output_embeddings() is None:
        raise ValueError(
            f"{type(base).__name__} has no language-model head, so it predicts no tokens. Load it "
            "with AutoModelForCausalLM."
        )


def _sees_the_future(base: PreTrainedModel, config: Any) -> bool:
    """Whether one of the settings that configurations have for it makes attention bidirectional."""
    if not getattr(config, "is_causal", True):
        return True
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return True
    # Some decoders have is_decoder=False but are causal all the same: their code makes only causal
    # masks.
    knows = mask_functions(base)
    always_causal = "create_causal_mask" in knows and "create_bidirectional_mask" not in knows
    return not getattr(config, "is_decoder", True) and not always_causal


def _row_limits(config: Any, name: str) -> RowLimits:
    documents: list[tuple[int, str]] = []
    rows: list[tuple[int, str]] = []
    positions: Any = getattr(config, "max_position_embeddings", None)
    ropes = _rope_parameters(config)
    for rope in ropes:
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind in ("dynamic", "longrope"):
            # "dynamic" rescales beyond the configured length, "longrope" beyond the original one.
            original = None if kind == "dynamic" else rope.get("original_max_position_embeddings")
            reason = f"{name} rescales its {kind} rotary embedding by the length of the whole row"
            documents.append((original or positions, reason))
    if positions and not ropes:
        documents.append((positions, f"{name} has no position embeddings"))
    without_rope = 0 in (getattr(config, "no_rope_layers", None) or (0,))
    if getattr(config, "attn_temperature_tuning", False) and without_rope:
        reason = f"{name} scales its attention temperature by a token's index in the row"
        rows.append((int(config.floor_scale) - 1, reason))
    if config.model_type == "gpt_neo":
        rows.append((positions, f"{name} has no causal mask"))
        if "local" in config.attention_layers:
            reason = f"{name} measures the windows of its local layers in tokens of the row"
            rows.append((config.window_size, reason))
    if config.model_type == "big_bird":
        rows.append((positions, f"{name} has no token types"))
    return RowLimits(
        document=min(documents, default=None),
        row=min(rows, default=None),
    )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Rotary settings: none, one, or one for each type of layer.

    Older configurations call them `rope_scaling`.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or ([rope] if rope else [])


def sequence_limit(model: nn.Module) -> tuple[int, str] | None:
    """The most tokens of a plain row that a model can read, whatever the rest of the batch is.

    Args:
        model: bare or wrapped by PEFT, before it is distributed.

    Returns:
        The number of tokens and the reason for it; None: no limit.
    """
    base = bare_model(model)
    config = base.config.get_text_config(decoder=True)
    if getattr(config, "alibi", False):
        return None
    return _row_limits(config, type(base).__name__).document


def set_packed_attention(
    model: nn.Module,
    choice: str,
    *,
    device_type: str | None = None,
    trains: bool = False,
    compiles: bool = False,
) -> str:
    """Switch a model to an attention implementation that can express the packed mask.

    Args:
        model: the policy or feature network, bare or wrapped by PEFT.
        choice: "auto", "split", "sdpa", "eager" or "flex_attention", see `choose_attention`.
        device_type: type of the device on which the model will compute; default: that of its
            weights.
        trains: whether the model is trained.
        compiles: whether TorchDynamo compiles its layers.

    Returns:
        The implementation in use, by transformers' name.

    Raises:
        ValueError: the model cannot use the chosen implementation, or has none that takes the
            packed mask.
    """
    base = bare_model(model)
    facts = gather_facts(base, device_type=device_type, trains=trains, compiles=compiles)
    chosen, before = choose_attention(choice, facts), facts.before
    reasons: list[str] = []
    taken = next((name for name in chosen.candidates if _takes(base, name, reasons)), None)
    if taken is None:
        raise ValueError(
            f"{type(base).__name__} runs with attn_implementation={before!r} and cannot be "
            f"switched to one of {', '.join(chosen.candidates)}, which takes the packed mask "
            f"({'; '.join(reasons)}). Load it with attn_implementation='sdpa' or 'eager'."
        )
    if choice == "auto":
        _log_choice(type(base).__name__, facts, chosen, taken, why_not_split(base))
    return taken


def attention_of(model: nn.Module) -> str:
    """The attention that a model uses now, by its name in the setting `packed_attention`."""
    name = bare_model(model).config.get_text_config(decoder=True)._attn_implementation or "eager"
    return next((choice for choice, own in NAMED.items() if own == name), name)


def gather_facts(
    base: PreTrainedModel, *, device_type: str | None, trains: bool, compiles: bool
) -> AttentionFacts:
    """Collect the facts by which `choose_attention` decides.

    Arguments: see `set_packed_attention`.
    """
    config = base.config.get_text_config(decoder=True)
    weights = next(base.parameters()).device.type
    dropout = [
        value
        for name, value in vars(config).items()
        if isinstance(value, float) and "att" in name and "drop" in name
    ]
    # Layers may differ, so the widths are read from the modules, not from the configuration.
    widths = [
        width
        for module in base.modules()
        for name in ("head_dim", "qk_head_dim", "v_head_dim")
        if isinstance(width := vars(module).get(name), int)
    ]
    if not widths and (heads := getattr(config, "num_attention_heads", 0)):
        widths = [config.hidden_size // heads]
    return AttentionFacts(
        device=device_type or ("cpu" if weights == "meta" else weights),
        before=config._attn_implementation or "eager",
        supports_sdpa=bool(base._supports_sdpa) and why_not_sdpa(base) is None,
        takes_flex=bool(base._supports_flex_attn)
        and calls_chosen_attention(base)
        and not looks_at_block_masks(base),
        head_dim=min(widths, default=0),
        widest_head=max(widths, default=0),
        dropout=max(dropout, default=0.0) if trains else 0.0,
        trains=trains,
        has_triton=importlib.util.find_spec("triton") is not None,
        compiles=compiles,
    )


def _log_choice(
    name: str, facts: AttentionFacts, chosen: AttentionChoice, taken: str, unsplit: str | None
) -> None:
    """Log which attention "auto" chose, and why."""
    if taken == FLEX:
        logger.info(
            "%s uses flex_attention for packed rows, compiled for each shape of the rows, because "
            "it computes on %s.",
            name,
            facts.device,
        )
    elif chosen.reason is not None:
        logger.warning(
            "%s uses %s attention with a mask of the whole row for packed rows, because %s.",
            name,
            taken,
            chosen.reason,
        )
    elif SPLIT in chosen.candidates and unsplit is not None:
        logger.warning(
            "%s cannot use split attention, because %s. It gets a mask of the whole packed row, "
            "which takes more memory and time.",
            name,
            unsplit,
        )
    if facts.before not in ("sdpa", SPLIT, FLEX, taken):
        logger.warning(
            "The attention of %s was switched from %s to %s, which can express the packed mask.",
            name,
            facts.before,
            taken,
        )


def _takes(base: PreTrainedModel, implementation: str, reasons: list[str]) -> bool:
    """Switch a model to an attention implementation; if it cannot, append the reason.

    Returns:
        Whether the model now uses the implementation.
    """
    config = base.config.get_text_config(decoder=True)
    if implementation == "sdpa" and (reason := why_not_sdpa(base)):
        reasons.append(f"sdpa: {reason}")
        return False
    if config._attn_implementation == implementation:
        return True
    if implementation == SPLIT and (reason := why_not_split(base)):
        reasons.append(f"split: {reason}")
        return False
    try:
        base.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        reasons.append(f"{implementation}: {error}")
        return False
    if config._attn_implementation == implementation:
        return True
    reasons.append(f"{implementation}: the model did not switch to it")
    return False
