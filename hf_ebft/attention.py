"""From visibility to the attention masks that a transformers model takes.

Which layers of a model see how far is read off its configuration and code; sliding windows and
chunks are measured in position ids, never in places of the row, because neighbours in the row are
not neighbours in the text. The same visibility makes boolean masks (sdpa), additive masks (eager)
and block masks (flex_attention).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from hf_ebft.layout import Coordinates, sees

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# Layers that look through a mask and depend on the rest of the row in no other way.
MASKABLE_LAYERS = frozenset({FULL, SLIDING, CHUNKED})
PACKABLE_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
# How transformers' models make their masks (transformers.masking_utils).
MASK_FUNCTIONS = frozenset(
    {
        "create_bidirectional_mask",
        "create_causal_mask",
        "create_chunked_causal_mask",
        "create_masks_for_generate",
        "create_sliding_window_causal_mask",
    }
)

Mask = Tensor | BlockMask
Masks = Mask | dict[str, Mask]


def mask_functions(model: PreTrainedModel) -> set[str]:
    """Which of transformers' mask functions the model's own code uses; empty if it makes its own.

    A configuration may name a window that the model never looks at. The code does not lie.
    """
    sources = {
        ancestor.__module__
        for part in model.modules()
        for ancestor in type(part).__mro__
        if issubclass(ancestor, PreTrainedModel) and ancestor is not PreTrainedModel
    }
    known = sources & sys.modules.keys()
    return {name for source in known for name in vars(sys.modules[source])} & MASK_FUNCTIONS


@dataclass(frozen=True)
class MaskRecipe:
    """How to build the ``attention_mask`` argument of one model.

    Attributes:
        implementation: "sdpa", "eager" or "flex_attention".
        layer_types: the kinds of layers the model has.
        by_layer_type: whether the model takes a dict of masks (one per kind) or a single mask.
        window: sliding window in positions, where there are sliding layers.
        chunk: chunk size in positions, where there are chunked layers.
        dtype: dtype of additive masks, which must be the one the model computes in.
    """

    implementation: str
    layer_types: tuple[str, ...]
    by_layer_type: bool
    window: int | None
    chunk: int | None
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel) -> MaskRecipe:
        """Read the recipe off a (bare) transformers model.

        Raises:
            ValueError: a layer type whose visibility cannot be expressed by a mask.
        """
        config = model.config.get_text_config(decoder=True)
        layer_types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        chunk = getattr(config, "attention_chunk_size", None)
        if layer_types:
            unknown = sorted(set(layer_types) - MASKABLE_LAYERS)
            if unknown:
                raise ValueError(
                    f"{type(model).__name__} has layers of type {', '.join(unknown)}, which carry "
                    "a state along the row or choose among its tokens instead of only looking "
                    "through a mask; blocks that share a row cannot be kept apart. Use a model "
                    f"whose layers are all of type {', '.join(sorted(MASKABLE_LAYERS))}."
                )
            kinds = tuple(sorted(set(layer_types)))
        else:
            made = mask_functions(model)
            # Code that makes its masks itself is taken to mean what its configuration says.
            trusted = not made or "create_masks_for_generate" in made
            slides = trusted or "create_sliding_window_causal_mask" in made
            chunks = trusted or "create_chunked_causal_mask" in made
            kinds = (SLIDING,) if window and slides else (CHUNKED,) if chunk and chunks else (FULL,)
        return cls(
            implementation=config._attn_implementation or "eager",
            layer_types=kinds,
            by_layer_type=bool(layer_types),
            window=window,
            chunk=chunk,
            dtype=model.dtype,
        )

    def build(self, queries: Coordinates, keys: Coordinates) -> Masks:
        """Masks for ``queries`` (B, Q) over ``keys`` (B, C), as the model's forward takes them."""
        make = self._block_mask if self.implementation == "flex_attention" else self._dense_mask
        masks = {kind: make(kind, queries, keys) for kind in self.layer_types}
        return masks if self.by_layer_type else next(iter(masks.values()))

    def allowed(self, kind: str, query: Coordinates, key: Coordinates) -> Tensor:
        """Who attends to whom in a layer of this kind, elementwise (coordinates broadcast)."""
        visible = sees(query, key)
        if kind == SLIDING and self.window:
            visible = visible & (query.position - key.position < self.window)
        elif kind == CHUNKED and self.chunk:
            visible = visible & (query.position // self.chunk == key.position // self.chunk)
        return visible

    def _dense_mask(self, kind: str, queries: Coordinates, keys: Coordinates) -> Tensor:
        """(B, 1, Q, C): boolean for sdpa, additive for eager."""
        allowed = self.allowed(
            kind,
            queries.map(lambda f: f[:, None, :, None]),
            keys.map(lambda f: f[:, None, None, :]),
        )
        if self.implementation == "sdpa":
            return allowed
        # Eager attention adds the mask to its scores, in the model's own dtype.
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill_(~allowed, lowest)

    def _block_mask(self, kind: str, queries: Coordinates, keys: Coordinates) -> BlockMask:
        def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.allowed(
                kind, queries.map(lambda f: f[row, query]), keys.map(lambda f: f[row, key])
            )

        rows, n_queries = queries.slot.shape
        return create_block_mask(
            mask_mod, rows, None, n_queries, keys.slot.shape[1], device=queries.slot.device
        )
