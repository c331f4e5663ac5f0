"""Keys and values of a decoding step at fixed places, and how a model's attention finds them.

The documents' keys and values are those of the pass over them, as they are. Those of the rollouts
have a slot for every step, and a step's attention writes its own by index. So nothing is copied
from step to step, and nothing changes its shape or place.

A transformers model passes what its cache returns on to its attention function. There, ours
recognises the tensors and the mask by identity. A model that changes either on the way cannot be
decoded so, and says it with its first step.

Dimension letters: B rows of the batch, S document tokens, m rollouts of a row, H heads of keys and
values, E and F widths of a head, O slots for own keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from hf_ebft.packed.attention_functions import changes_of_scores
from hf_ebft.packed.layer_caches import OneLayer
from hf_ebft.packed.step_attention import KNOWN_CHANGES, Fed, StepView, step_attention

# The attention of decoding steps, under the name by which transformers' models find it.
DECODING = "ebft_decoding"


class CannotDecodeStatically(RuntimeError):
    """A model does something with its keys, values or masks that a static cache cannot serve."""


@dataclass
class Slot:
    """Where the tokens that a step feeds have their keys and values.

    Attributes:
        index: (1,) int64.
        number: the same; None where the host does not follow, as a graph serves every step.
    """

    index: Tensor
    number: int | None = None


class StaticLayer(CacheLayerMixin):
    """The keys and values of one layer.

    Args:
        document: keys (B, H, S, E) and values (B, H, S, F).
        n_rollouts: m.
        n_slots: O.
        slot: of the step.
    """

    is_compileable = True

    def __init__(
        self, document: tuple[Tensor, Tensor], n_rollouts: int, n_slots: int, slot: Slot
    ) -> None:
        super().__init__()
        self.document, self.slot = document, slot
        rows, heads, self.document_width, _ = document[0].shape
        self.keys, self.values = (
            part.new_zeros(rows, n_rollouts, heads, n_slots, part.shape[3]) for part in document
        )
        self.is_initialized = True
        self._fed: Fed | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the memory is there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take keys and values (B, H, m, E or F), for attention to put into the step's slot.

        Returns:
            All slots, (B, m, H, O, E or F).
        """
        assert self.keys is not None and self.values is not None
        slot = self.slot.index if self.slot.number is None else self.slot.number
        self._fed = Fed(key_states, value_states, slot)
        return self.keys, self.values

    def take_fed(self) -> Fed | None:
        """What was fed and is not in its slot yet; None for who attends to it after others."""
        fed, self._fed = self._fed, None
        return fed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of a mask that the model would make itself; it is given one."""
        return self.document_width + query_length, 0

    def get_seq_length(self) -> int:
        """Where a model without position ids would go on; it is given them."""
        return self.document_width

    def get_max_length(self) -> int:
        """No limit that a model should look at."""
        return -1


class StaticCache(Cache):
    """Keys and values of all layers, and what the queries of a step see of them.

    Args:
        documents: keys and values of every layer, (B, H, S, E or F) each.
        n_rollouts: m.
        n_slots: O, steps that feed a token.
        slot: see `StaticLayer`.
        views: by kind of layer.
        changes_scores: whether soft caps and sinks count. sdpa, in training, would leave them out.
        few_shapes: see `hf_ebft.packed.layer_caches.CacheByLayer`.
    """

    def __init__(
        self,
        documents: Sequence[Tensor],
        n_rollouts: int,
        n_slots: int,
        slot: Slot,
        views: dict[str, StepView],
        *,
        changes_scores: bool,
        few_shapes: bool,
    ) -> None:
        pairs = zip(documents[::2], documents[1::2], strict=True)
        layers = [StaticLayer(pair, n_rollouts, n_slots, slot) for pair in pairs]
        super().__init__([*layers])
        rows, device = documents[0].shape[0], documents[0].device
        # No mask: a name that the model hands on to its attention function.
        self.masks = {
            kind: torch.ones(rows, 1, n_rollouts, 1, dtype=torch.bool, device=device)
            for kind in views
        }
        self.few_shapes = few_shapes
        seen = [(mask, views[kind]) for kind, mask in self.masks.items()]
        self.attended = Attended(layers, seen, changes_scores)

    @contextmanager
    def of_layer(self, number: int, mask: Tensor) -> Iterator[OneLayer]:
        """See `hf_ebft.packed.layer_caches.CacheByLayer`."""
        global _current
        before, layer = _current, self.attended.layers[number]
        seen = [(mask, self.attended.view_of(mask))]
        _current = Attended([layer], seen, self.attended.changes_scores)
        try:
            yield OneLayer(layer)
        finally:
            _current = before


@dataclass(frozen=True)
class Attended:
    """What an attention function finds by what it is handed.

    Attributes:
        layers: that keys and values may come from.
        seen: masks, and what a layer sees that gets them.
        changes_scores: see `StaticCache`.
    """

    layers: list[StaticLayer]
    seen: list[tuple[Tensor, StepView]]
    changes_scores: bool

    def layer_of(self, key: Tensor, value: Tensor) -> StaticLayer:
        """The layer that returned these; layers may share keys and values with earlier ones."""
        for layer in self.layers:
            if layer.keys is key and layer.values is value:
                return layer
        raise CannotDecodeStatically("it changes the keys or values that its cache returns")

    def view_of(self, mask: Tensor | None) -> StepView:
        """What a layer sees that got this mask."""
        for own, view in self.seen:
            if own is mask:
                return view
        raise CannotDecodeStatically("it changes the attention mask that it is given")


_current: Attended | None = None


@contextmanager
def decoding_against(config: Any, cache: StaticCache) -> Iterator[None]:
    """Let a model's attention be that of a decoding step against a cache.

    Args:
        config: of the model.
        cache: to be given to the model's calls.
    """
    global _current
    configs = {id(part): part for part in (config, config.get_text_config(decoder=True))}
    before = [(part, part._attn_implementation) for part in configs.values()]
    try:
        _current = cache.attended
        for part in configs.values():
            part._attn_implementation_internal = DECODING
        yield
    finally:
        _current = None
        for part, implementation in before:
            part._attn_implementation_internal = implementation


def _decoding_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`step_attention`, as a transformers attention function.

    Args:
        query: (B, query heads, m, E).
        key, value: what the cache returned.
        attention_mask: what the cache holds for this kind of layer.
    """
    attended = _current
    assert attended is not None
    layer, view = attended.layer_of(key, value), attended.view_of(attention_mask)
    known = KNOWN_CHANGES if attended.changes_scores else ()
    for name in changes_of_scores(kwargs):
        if name not in known:
            raise CannotDecodeStatically(f"its attention uses {name}")
    if kwargs.get("dropout"):
        raise CannotDecodeStatically("its attention drops something in evaluation mode")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = step_attention(
        query,
        layer.document,
        (key, value),
        view,
        scaling,
        fed=layer.take_fed(),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return output, None


AttentionInterface.register(DECODING, _decoding_attention_forward)
AttentionMaskInterface.register(DECODING, sdpa_mask)
