"""Which models can be trained on packed rows, and what has to be changed in them first.

Every rule refuses up front what would be silently wrong later. Where a model is only wrong for long
rows, the limit is returned and checked against each batch.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_ebft.attention import PACKABLE_IMPLEMENTATIONS
from hf_ebft.documents import Documents
from hf_ebft.layout import PackedLayout

logger = logging.getLogger(__name__)

# What a packed row asks of a model's forward.
REQUIRED_ARGUMENTS = ("input_ids", "attention_mask", "position_ids")


def bare_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper (PEFT's forward hides the argument names)."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


@dataclass(frozen=True)
class RowLimits:
    """Lengths beyond which a model is no longer exact on packed rows.

    Attributes:
        document: most tokens of a document, with the reason.
        row: most tokens of a packed row, with the reason.
    """

    document: tuple[int, str] | None = None
    row: tuple[int, str] | None = None

    def check(self, layout: PackedLayout) -> None:
        """Raise a ValueError if a document or the packed row is too long for the model."""
        if self.row is not None and layout.row_width > self.row[0]:
            raise ValueError(
                f"The packed row has {layout.row_width} tokens, but {self.row[1]} from {self.row[0]} "
                "tokens on. Use shorter documents, fewer samples or a larger stride."
            )
        if self.document is not None:
            self.check_documents(layout.documents)

    def check_documents(self, documents: Documents) -> None:
        """Raise a ValueError if a document is too long for the model."""
        assert self.document is not None
        longest = int(documents.length.max())
        if longest > self.document[0]:
            raise ValueError(
                f"A document has {longest} tokens, but {self.document[1]} beyond {self.document[0]} "
                "tokens. Cut the documents shorter (sequence_len in examples/run_ebft.py)."
            )


def check_supported(model: nn.Module) -> RowLimits:
    """Refuse a model that cannot be exact on packed rows, and return its length limits.

    Args:
        model: the policy or feature network, bare or wrapped by PEFT, not yet distributed.

    Raises:
        ValueError: saying what in the model stands in the way and what to use instead.
    """
    if getattr(model, "active_peft_config", None) is not None:
        peft_config = model.active_peft_config
        if getattr(peft_config, "is_prompt_learning", False):
            raise ValueError(
                f"PEFT method {peft_config.peft_type} puts virtual tokens before every row, which shifts "
                "the packed row's mask. Use an adapter method such as LoRA."
            )
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
    if getattr(base, "_is_stateful", False):
        raise ValueError(
            f"{name} carries a recurrent state along the row, so rollouts that share a row would "
            "leak into each other. Use a model whose layers are all attention layers."
        )
    parameters = inspect.signature(base.forward).parameters
    missing = [argument for argument in REQUIRED_ARGUMENTS if argument not in parameters]
    if missing:
        raise ValueError(
            f"{name}.forward takes no {', '.join(missing)}: it derives positions from the order of the "
            "row (ALiBi, for example), which is not the order of the text in a packed row. Use a "
            "model with rotary or learned position ids."
        )
    if getattr(config, "alibi", False):
        raise ValueError(
            f"{name} uses ALiBi, whose positions follow the order of the row, which is not the order "
            "of the text in a packed row. Use a model with rotary or learned position ids."
        )
    return _row_limits(config, name)


def _row_limits(config: Any, name: str) -> RowLimits:
    document = row = None
    positions = getattr(config, "max_position_embeddings", None)
    rope = _rope_parameters(config)
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings") or positions
        if original:
            document = (original, f"{name} rescales its {kind} rotary embedding by the whole row")
    elif positions and not rope:
        document = (positions, f"{name} has no position embeddings")
    if getattr(config, "attn_temperature_tuning", False) and getattr(config, "floor_scale", None):
        document = (
            int(config.floor_scale) - 1,
            f"{name} tunes its attention temperature by the place in the row",
        )
    if "local" in (getattr(config, "attention_layers", None) or ()):
        row = (config.window_size, f"{name}'s local layers measure their window along the row")
    return RowLimits(document=document, row=row)


def _rope_parameters(config: Any) -> dict[str, Any]:
    """Rotary settings; nested per layer type in some models, of which any decides."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    scaled = [value for value in nested if value.get("rope_type", "default") != "default"]
    return (scaled or nested or [rope])[0]


def set_packed_attention(model: nn.Module, choice: str) -> str:
    """Give the model an attention implementation that can express the packed mask.

    Args:
        model: the policy or feature network, bare or wrapped by PEFT.
        choice: an implementation, or "auto".

    Returns:
        The implementation in use.

    Raises:
        ValueError: the model has no implementation that takes the mask, or not the chosen one.
    """
    base = bare_model(model)
    config = base.config.get_text_config(decoder=True)
    current = config._attn_implementation or "eager"
    if choice == current or (choice == "auto" and current in ("sdpa", "eager")):
        return current
    wanted = [choice] if choice != "auto" else ["sdpa", "eager"]
    reasons = []
    for implementation in wanted:
        try:
            base.set_attn_implementation(implementation)
        except (ValueError, ImportError) as error:
            reasons.append(f"{implementation}: {error}")
            continue
        if config._attn_implementation == implementation:
            logger.warning(
                "Attention of %s switched from %s to %s, which can express the packed mask.",
                type(base).__name__,
                current,
                implementation,
            )
            return implementation
        reasons.append(f"{implementation}: not taken")
    raise ValueError(
        f"{type(base).__name__} runs with attn_implementation={current!r} and cannot be switched to one "
        f"of {', '.join(PACKABLE_IMPLEMENTATIONS)} that takes the packed mask ({'; '.join(reasons)}). "
        "Load it with attn_implementation='sdpa' or 'eager'."
    )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers model: its first list of ``num_hidden_layers`` modules.

    Raises:
        ValueError: no such list.
    """
    base = bare_model(model)
    n_layers = base.config.get_text_config(decoder=True).num_hidden_layers
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise ValueError(
        f"{type(base).__name__} has no list of {n_layers} layers to take features from."
    )


def vocabulary_size(model: nn.Module) -> int:
    """Number of token ids that the model embeds."""
    embeddings = bare_model(model).get_input_embeddings()
    weight: torch.Tensor = embeddings.weight
    return weight.shape[0]
