"""A cache with fixed shapes and addresses for decoding steps, and the attention that reads it.

The documents' keys and values are the tensors of the pass over the documents, unchanged. The
rollouts' keys and values have a slot for every step. The attention of a step writes into its slot
by index. So nothing is copied from step to step, and no tensor changes its shape or address.

A transformers model passes the tensors that its cache returns to its attention function. Our
attention function recognises these tensors and the mask by identity. If a model changes one of them
in between, it cannot be decoded this way, and its first step raises `CannotDecodeStatically`.

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

# The name under which the attention of decoding steps is registered in transformers.
DECODING = "ebft_decoding"


class CannotDecodeStatically(RuntimeError):
    """A model's keys, values, masks or attention are used in a way that a static cache excludes."""


@dataclass
class Slot:
    """The slot into which a step writes the keys and values of the tokens that it feeds.

    Attributes:
        index: (1,) int64, number of the slot, on the device.
        number: the same number on the host; None if the host does not know it, because one CUDA
            graph serves all steps.
    """

    index: Tensor
    number: int | None = None


class StaticLayer(CacheLayerMixin):
    """The keys and values of one layer.

    Args:
        document: keys (B, H, S, E) and values (B, H, S, F).
        n_rollouts: m.
        n_slots: O.
        slot: the current step's slot.
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
        """Do nothing: the memory is already allocated."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take keys and values (B, H, m, E or F). Attention later writes them into the step's slot.

        Returns:
            Keys and values of all slots, (B, m, H, O, E or F).
        """
        assert self.keys is not None and self.values is not None
        slot = self.slot.index if self.slot.number is None else self.slot.number
        self._fed = Fed(key_states, value_states, slot)
        return self.keys, self.values

    def take_fed(self) -> Fed | None:
        """The keys and values not yet written into their slot; None if they have been taken.

        Layers that share keys call attention several times; the first call takes them.
        """
        fed, self._fed = self._fed, None
        return fed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of a mask that the model would make itself. It is not used: the model gets one."""
        return self.document_width + query_length, 0

    def get_seq_length(self) -> int:
        """Next position for a model without position ids. It is not used: the model gets them."""
        return self.document_width

    def get_max_length(self) -> int:
        """-1: the cache has no maximum length."""
        return -1


class StaticCache(Cache):
    """Keys and values of all layers, and which of them the queries of a step see.

    Args:
        documents: keys and values of every layer, (B, H, S, E or F) each.
        n_rollouts: m.
        n_slots: O, number of steps that feed a token.
        slot: see `StaticLayer`.
        views: what a step sees, by kind of layer.
        changes_scores: whether attention applies soft caps and sinks. It must not if training uses
            sdpa, which ignores them.
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
        # Not real masks: the attention function only recognises them by identity.
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
    """Finds the cache's layer and view that belong to the tensors given to an attention function.

    Attributes:
        layers: the layers that the keys and values may come from.
        seen: pairs of a mask and what a layer with this mask sees.
        changes_scores: see `StaticCache`.
    """

    layers: list[StaticLayer]
    seen: list[tuple[Tensor, StepView]]
    changes_scores: bool

    def layer_of(self, key: Tensor, value: Tensor) -> StaticLayer:
        """The cache layer that returned these keys and values.

        Several decoder layers may use the keys and values of one cache layer.
        """
        for layer in self.layers:
            if layer.keys is key and layer.values is value:
                return layer
        raise CannotDecodeStatically("it changes the keys or values that its cache returns")

    def view_of(self, mask: Tensor | None) -> StepView:
        """What a layer with this mask sees."""
        for own, view in self.seen:
            if own is mask:
                return view
        raise CannotDecodeStatically("it changes the attention mask that it is given")


_current: Attended | None = None


@contextmanager
def decoding_against(config: Any, cache: StaticCache) -> Iterator[None]:
    """Switch a model to the attention of decoding steps, within the context.

    Args:
        config: the model's configuration.
        cache: the cache that is passed to the model's calls.
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
        key, value: the tensors that the cache returned.
        attention_mask: the cache's tensor in `masks` for this kind of layer.
    """
    attended = _current
    assert attended is not None
    layer, view = attended.layer_of(key, value), attended.view_of(attention_mask)
    known = KNOWN_CHANGES if attended.changes_scores else ()
    for name in changes_of_scores(kwargs):
        if name not in known:
            raise CannotDecodeStatically(f"its attention uses {name}")
    if kwargs.get("dropout"):
        raise CannotDecodeStatically("its attention uses dropout in evaluation mode")
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
