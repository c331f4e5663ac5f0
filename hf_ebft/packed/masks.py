"""The attention masks of a packed row, in the form that a model's attention takes.

The one definition of visibility (`hf_ebft.rows.visibility`) becomes a plan for split attention, a
boolean mask for sdpa, an additive mask for eager attention or, where it is worth compiling, a block
mask for flex_attention. A model's configuration and code say how far its layers see. Sliding
windows and chunks are measured in position ids, not in row indices: tokens that are neighbours in
the row need not be neighbours in the text.

Dimension letters: B rows of the batch, Q queries and C keys of a pass, S document tokens, K blocks,
n samples, T tokens fed of every rollout, O own keys of a rollout.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_ebft.packed.attention_functions import changes_of_scores, in_autocast_dtype
from hf_ebft.packed.block_masks import BlockMaskCache, VisibleKeys, block_mask
from hf_ebft.packed.flex import FLEX
from hf_ebft.packed.model_code import mask_functions
from hf_ebft.packed.split_attention import (
    AttentionPlan,
    Section,
    Stretches,
    Tile,
    make_tiles,
    split_attention,
)
from hf_ebft.rows.anchors import Blocks
from hf_ebft.rows.layout import PackedLayout, PackedPart
from hf_ebft.rows.visibility import Coordinates, sees

logger = logging.getLogger(__name__)

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# Types of layers that depend on other tokens only through an attention mask.
MASKABLE_LAYERS = frozenset({FULL, SLIDING, CHUNKED})
# Our own implementation, under the name by which transformers' models find it.
SPLIT = "ebft_split"
PACKABLE_IMPLEMENTATIONS = (SPLIT, "sdpa", "eager", FLEX)

Mask = Tensor | BlockMask
Masks = Mask | dict[str, Mask]


@dataclass(frozen=True)
class MaskRecipe:
    """How to build the `attention_mask` argument of one model.

    Attributes:
        implementation: one of `PACKABLE_IMPLEMENTATIONS`.
        layer_types: the kinds of layers the model has.
        by_layer_type: whether the model takes a dict of masks (one per kind) or a single mask.
        window: sliding window in positions, for sliding layers.
        chunk: chunk size in positions, for chunked layers.
        dtype: dtype of additive masks; it must be the dtype in which the model computes.
    """

    implementation: str
    layer_types: tuple[str, ...]
    by_layer_type: bool
    window: int | None
    chunk: int | None
    dtype: torch.dtype

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> MaskRecipe:
        """Derive the recipe from a (bare) transformers model.

        Raises:
            ValueError: the model has a layer type whose visibility no mask can express.
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
                    "a state along the row or select keys by themselves. A mask cannot keep blocks "
                    "that share a row apart in such layers. Use a model "
                    f"whose layers are all of type {', '.join(sorted(MASKABLE_LAYERS))}."
                )
            kinds = tuple(sorted(set(layer_types)))
        else:
            made = mask_functions(model)
            # If the model's code makes its masks itself, the configuration is trusted.
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

    def masks_for(self, part: PackedPart) -> Masks:
        """Masks of one forward pass over the packed row, made once per recipe and then kept."""
        in_blocks = self.implementation == FLEX and _pays_to_compile(part)
        key = (self, in_blocks)
        if key not in part.masks:
            if self.implementation == SPLIT:
                part.masks[key] = self._as_argument(lambda kind: self._packed_mask(kind, part))
            elif in_blocks:
                part.masks[key] = self._as_argument(lambda kind: self.block_mask(kind, part))
            else:
                part.masks[key] = self.build(part.queries, part.keys)
        return part.masks[key]

    def prepare(self, part: PackedPart) -> None:
        """Make the masks of a later pass now, unless they are large."""
        if self.implementation == SPLIT:
            self.masks_for(part)

    def build(self, queries: Coordinates, keys: Coordinates) -> Masks:
        """Masks of any `queries` (B, Q) over any `keys` (B, C), as a model's forward takes them."""
        return self._as_argument(lambda kind: self._dense_mask(kind, queries, keys))

    def _as_argument(self, make: Callable[[str], Mask]) -> Masks:
        masks = {kind: make(kind) for kind in self.layer_types}
        return masks if self.by_layer_type else next(iter(masks.values()))

    def first_visible(self, kind: str, position: Tensor) -> Tensor:
        """The first position that a token at `position` sees in a layer of this kind."""
        if kind == SLIDING and self.window:
            return (position - self.window + 1).clamp(min=0)
        if kind == CHUNKED and self.chunk:
            return position // self.chunk * self.chunk
        return torch.zeros_like(position)

    def allowed(self, kind: str, query: Coordinates, key: Coordinates) -> Tensor:
        """Whether each query sees each key in a layer of this kind (coordinates broadcast)."""
        return sees(query, key) & (key.position >= self.first_visible(kind, query.position))

    def _packed_mask(self, kind: str, part: PackedPart) -> PackedMask:
        # The part refers to the mask. If the mask also referred to the part, only Python's cyclic
        # garbage collector would free them, some steps later.
        copy = replace(part, masks={})
        rows, n_queries = part.queries.slot.shape
        return PackedMask.from_plan(
            self.plan(kind, part),
            shape=(rows, 1, n_queries, part.n_keys),
            device=part.queries.slot.device,
            make_dense=lambda: self._dense_mask(kind, copy.queries, copy.keys),
        )

    def plan(self, kind: str, part: PackedPart) -> AttentionPlan:
        """The visibility as a range of document columns and own tokens, for split attention."""
        layout = part.layout
        n_queries = part.queries.slot.shape[1]
        sections = []
        if part.has_documents:
            tiles = self._tiles(partial(self._document_stretches, kind), layout, (1, 1))
            sections.append(Section(slice(0, layout.document_width), (1, 1), tiles))
        if len(part.steps) > 0:
            per_group = (layout.n_samples, len(part.steps))
            sections.append(
                Section(
                    queries=slice(layout.document_width if part.has_documents else 0, n_queries),
                    per_group=per_group,
                    tiles=self._rollout_tiles(kind, part, per_group),
                    n_own=len(part.own_steps),
                    own_hidden=self._own_hidden(kind, part, layout.blocks),
                )
            )
        return AttentionPlan(
            sections=tuple(sections),
            n_queries=n_queries,
            n_keys=part.n_keys,
            document_width=layout.document_width,
            step_major=part.step_major,
        )

    def _tiles(
        self,
        stretches: Callable[[PackedLayout], Stretches],
        layout: PackedLayout,
        per_group: tuple[int, int],
    ) -> tuple[Tile, ...]:
        on_device = stretches(layout)
        on_host = on_device if layout.on_host is layout else stretches(layout.on_host)
        return tuple(make_tiles(on_device, on_host, per_group))

    def _rollout_tiles(
        self, kind: str, part: PackedPart, per_group: tuple[int, int]
    ) -> tuple[Tile, ...]:
        stretches = partial(self._rollout_stretches, kind, part.steps)
        if kind != FULL:
            return self._tiles(stretches, part.layout, per_group)
        # Every token of a rollout sees the whole prefix, so all decoding steps share their tiles.
        known = part.layout.cache
        if (FULL, per_group) not in known:
            known[FULL, per_group] = self._tiles(stretches, part.layout, per_group)
        tiles: tuple[Tile, ...] = known[FULL, per_group]
        return tiles

    def _document_stretches(self, kind: str, layout: PackedLayout) -> Stretches:
        """Which document columns the S document tokens see."""
        documents = layout.documents
        column = torch.arange(layout.document_width, device=documents.position.device)
        real = documents.document >= 0
        first = column - documents.position + self.first_visible(kind, documents.position)
        # The output of padding is ignored, so it may see any column. Column 0 widens no tile.
        low = torch.where(real, first, 0)[:, :, None]
        return Stretches(low, (column + 1).expand_as(real), real)

    def _rollout_stretches(self, kind: str, steps: range, layout: PackedLayout) -> Stretches:
        """Which document columns these steps of each block's rollouts see."""
        blocks = layout.blocks
        low = (blocks.column - blocks.position)[:, :, None]
        if kind != FULL:
            step = torch.arange(steps.start, steps.stop, device=low.device)
            first = self.first_visible(kind, blocks.position[:, :, None] + step)
            low = low + torch.minimum(first, blocks.position[:, :, None])
        return Stretches(low, blocks.column, blocks.exists)

    def _own_hidden(self, kind: str, part: PackedPart, blocks: Blocks) -> Tensor | None:
        """(B or 1, 1, K or 1, 1, T, O) bool: own tokens that are later or outside the window.

        None: no own token is hidden.
        """
        device = blocks.position.device
        # In a layer without a window, a rollout's newest token sees all tokens of the rollout.
        if kind == FULL and len(part.steps) == 1 and part.steps.stop == part.own_steps.stop:
            return None
        step = torch.arange(part.steps.start, part.steps.stop, device=device)
        own_step = torch.arange(part.own_steps.stop, device=device)
        hidden = (own_step > step[:, None])[None, None, None, None]
        if kind != FULL:
            first = self.first_visible(kind, blocks.position[:, :, None] + step)
            own_position = blocks.position[:, :, None] + own_step
            too_early = own_position[:, :, None, :] < first[:, :, :, None]
            hidden = hidden | too_early[:, None, :, None]
        return hidden

    def block_mask(self, kind: str, part: PackedPart) -> BlockMask:
        """The visibility as a block mask, reused for later batches with the same layout."""
        host, device = part.layout.on_host, part.queries.slot.device
        numbers = (
            host.documents.document,
            host.documents.position,
            host.blocks.column,
            host.blocks.position,
            host.blocks.exists,
        )
        key = (
            (self, kind, device, part.has_documents, part.steps, part.own_steps),
            (host.n_samples, host.length, tuple(host.blocks.exists.shape)),
            tuple(number.numpy().tobytes() for number in numbers),
        )
        return _BLOCK_MASKS.get(key, lambda: block_mask(self.visible_keys(kind, part), device))

    def visible_keys(self, kind: str, part: PackedPart) -> VisibleKeys:
        """The visibility of each query, in the host's memory."""
        host = part.layout.on_host
        rows, n_samples, n_blocks, _ = host.rollout_shape
        low, high = [np.zeros((rows, 0), dtype=np.int64)] * 2
        n_own, n_rollouts = len(part.own_steps), n_blocks * n_samples
        if part.has_documents:
            stretches = self._document_stretches(kind, host)
            high = stretches.high.numpy()
            # Padding sees itself.
            low = np.where(stretches.exists.numpy(), stretches.low[:, :, 0].numpy(), high - 1)
        own = np.zeros((rows, low.shape[1], n_own), dtype=bool)
        place = np.zeros((low.shape[1], n_own), dtype=np.int64)
        if len(part.steps) > 0:
            shape = (rows, n_blocks, n_samples, len(part.steps))
            stretches = self._rollout_stretches(kind, part.steps, host)
            exists = stretches.exists.numpy()[:, :, None, None]
            first, end = stretches.low.numpy()[:, :, None, :], stretches.high.numpy()
            hidden = self._own_hidden(kind, part, host.blocks)
            seen = np.ones((1,) * 6, dtype=bool) if hidden is None else ~hidden.numpy()
            # A token of a block that does not exist sees itself.
            itself = np.equal.outer(np.array(part.steps), np.array(part.own_steps))
            seen = np.where(exists[..., None], seen[:, 0], itself)
            low = np.concatenate([low, _queries(np.where(exists, first, 0), shape)], axis=1)
            ends = np.where(exists, end[:, :, None, None], 0)
            high = np.concatenate([high, _queries(ends, shape)], axis=1)
            by_query = np.broadcast_to(seen, (*shape, n_own)).reshape(rows, -1, n_own)
            own = np.concatenate([own, by_query], axis=1)
            index = np.arange(n_rollouts)[:, None], np.arange(n_own)
            stride = (1, n_rollouts) if part.step_major else (n_own, 1)
            places = host.document_width + index[0] * stride[0] + index[1] * stride[1]
            place = np.concatenate([place, places.repeat(len(part.steps), axis=0)])
        n_documents = host.document_width if part.has_documents else 0
        has_own = np.arange(low.shape[1]) >= n_documents
        return VisibleKeys(low, high, own, place, has_own, part.n_keys)

    def _dense_mask(self, kind: str, queries: Coordinates, keys: Coordinates) -> Tensor:
        """(B, 1, Q, C): additive for eager, else boolean."""
        allowed = self.allowed(
            kind,
            queries.map(lambda f: f[:, None, :, None]),
            keys.map(lambda f: f[:, None, None, :]),
        )
        if self.implementation != "eager":
            return allowed
        # Eager attention adds the mask to its scores in the model's dtype.
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill_(~allowed, lowest)


_BLOCK_MASKS = BlockMaskCache()


def _pays_to_compile(part: PackedPart) -> bool:
    """Whether a pass is worth compiling flex_attention for its shape.

    It is for whole rows and for chunks of rollouts. It is for documents in a pass with gradient,
    if the batch has rollouts. It is not for batches without rollouts, which have many shapes.
    """
    if len(part.steps) > 0:
        return not part.decodes
    return part.layout.length > 1 and torch.is_grad_enabled()


def _queries(by_rollout: np.ndarray, shape: tuple[int, int, int, int]) -> np.ndarray:
    """(B, K, 1, 1 or T) -> (B, K * n * T)."""
    return np.broadcast_to(by_rollout, shape).reshape(shape[0], -1)


class PackedMask(Tensor):
    """A boolean mask (B, 1, Q, C) whose values are computed only when they are needed.

    A transformers model passes its mask to its attention function, and split attention reads the
    plan from it. If the model does anything else with the mask (slice it, add to it, convert it),
    the dense mask is computed at that moment. This may be slow but gives the right result.
    """

    plan: AttentionPlan
    _make_dense: Callable[[], Tensor]
    _dense: Tensor | None

    @classmethod
    def from_plan(
        cls,
        plan: AttentionPlan,
        *,
        shape: tuple[int, ...],
        device: torch.device,
        make_dense: Callable[[], Tensor],
    ) -> PackedMask:
        """A mask of this shape that holds a plan and a function that makes the dense mask."""
        mask = torch.ones((), dtype=torch.bool, device=device).expand(shape).as_subclass(cls)
        mask.plan, mask._make_dense, mask._dense = plan, make_dense, None
        return mask

    def dense(self) -> Tensor:
        """The dense mask, computed at the first call."""
        if self._dense is None:
            self._dense = self._make_dense()
        return self._dense

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "detach":  # as gradient checkpointing does with every tensor argument
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            if name in _ABOUT_A_TENSOR:
                found = func(*args, **(kwargs or {}))
                if not isinstance(found, Tensor):
                    return found
            args, kwargs = tree_map(_materialized, (args, dict(kwargs or {})))
            return func(*args, **kwargs)


# Functions that answer from a tensor's metadata, without its values (__get__: attributes).
_ABOUT_A_TENSOR = frozenset(
    {"__get__", "__set__", "dim", "get_device", "is_floating_point", "numel", "size"}
)


def _materialized(value: Any) -> Any:
    return value.dense() if isinstance(value, PackedMask) else value


def _split_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Split attention as a transformers attention function; sdpa for masks that are not packed.

    Args:
        query: (B, query heads, Q, E).
        key, value: (B, key heads, C, E), (B, key heads, C, F).
    """
    if isinstance(attention_mask, PackedMask):
        plan = attention_mask.plan
        changes = changes_of_scores(kwargs)
        if dropout > 0.0:
            changes.append("dropout")
        if (query.shape[2], key.shape[2]) != (plan.n_queries, plan.n_keys):
            changes.append("queries or keys that the packed row does not have")
        if not changes:
            query, key, value = in_autocast_dtype(query, key, value)
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            with torch.autocast(query.device.type, enabled=False):
                return split_attention(query, key, value, plan, scaling), None
        _log_dense_mask(type(module).__name__, ", ".join(changes))
        attention_mask = attention_mask.dense()
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


@cache
def _log_dense_mask(attention: str, changes: str) -> None:
    """Log once per class of attention that it cannot be split, and why."""
    logger.warning(
        "%s uses %s, which split attention does not support. It uses sdpa with a mask of the whole "
        "packed row instead, which needs more memory and time.",
        attention,
        changes,
    )


AttentionInterface.register(SPLIT, _split_attention_forward)
AttentionMaskInterface.register(SPLIT, sdpa_mask)
