"""Counts the multiply-adds that a step needs, and the time that they take at full speed.

A pass needs each token whose result is used, once. Padding is not counted. The passes are:

- sampling: the document up to the last prefix's end, and the tokens of each rollout but its last;
- features: the document up to the last window's end and all rollout tokens, in the layers up to the
  highest feature layer, without the head;
- training forward: the tokens of each rollout but its last and, with a cross-entropy, the whole
  document but its last token. Results that sampling has computed of the document are not needed
  again;
- backward: the document tokens that sampling and training need, the rollouts' tokens, and the head
  for tokens that predict a target.

The cost of a token is that of the linear layers that it goes through (the weights' inputs times
outputs). In addition, there are two products of the head dimension per attention head for each
token that it sees, itself included. Normalisation, softmax, embedding, optimizer and recomputation
are not counted. The backward pass of a linear layer costs as much as its forward pass for the
gradient of its input, if that is needed, and as much again for the gradient of its weight, if that
is trained (so a frozen layer under LoRA costs half). The backward pass of attention costs twice its
forward pass.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_ebft.feature_network.shared_base import adapters_off
from hf_ebft.packed.model_parts import bare_model, decoder_layers
from hf_ebft.rows.layout import PackedLayout


@dataclass(frozen=True)
class Work:
    """The amount of work of a pass.

    Attributes:
        tokens: tokens that go through the layers.
        pairs: (token, token that it sees) pairs.
        head_rows: tokens that go through the head.
    """

    tokens: int
    pairs: int
    head_rows: int


@dataclass(frozen=True)
class Cost:
    """Multiply-adds per unit of `Work`, forward or backward.

    Attributes:
        per_token: one entry per layer, its linear layers.
        per_pair: one layer's attention.
        per_head_row: the head.
    """

    per_token: tuple[int, ...]
    per_pair: int
    per_head_row: int

    def multiply_adds(self, work: Work, n_layers: int | None = None) -> int:
        """Multiply-adds of a pass over the first `n_layers` layers (default: all)."""
        layers = self.per_token[:n_layers]
        in_layers = work.tokens * sum(layers) + work.pairs * self.per_pair * len(layers)
        return in_layers + work.head_rows * self.per_head_row


def count_work(layout: PackedLayout, *, with_cross_entropy: bool) -> dict[str, Work]:
    """What the passes of a step need of a batch, by phase.

    Embeddings are taken to read the last token of blocks and windows (as `last_token` and
    `mean_pooling` do).
    """
    where = layout.coordinates
    real = where.document >= 0
    in_rollout = where.rollout > 0
    # Per row and document: the end of its last prefix (0 without blocks). Padding has a slot of
    # its own.
    slot = torch.where(real, where.document, where.document.shape[1])
    ends = torch.where(in_rollout & real, where.prefix_end, 0)
    last_end = torch.zeros(slot.shape[0], slot.shape[1] + 1, dtype=torch.long, device=slot.device)
    last_end = last_end.scatter_reduce(1, slot, ends, reduce="amax").gather(1, slot)
    step = where.position - where.prefix_end  # of rollout tokens

    unfinished = real & in_rollout & (step < layout.length - 1)
    document = real & ~in_rollout
    predicts = document & (where.position < last_end)
    # The last token of a document predicts nothing.
    length = torch.zeros_like(where.position)
    length[:, : layout.document_width] = layout.documents.length
    trained = document & (where.position < length - 1) if with_cross_entropy else predicts
    in_windows = document & (last_end > 0) & (where.position < last_end + layout.length)

    ends_of_prefixes = _distinct_prefix_ends(layout)
    n_trained = int(trained.sum()) if with_cross_entropy else ends_of_prefixes
    newly = trained & ~predicts
    n_newly = n_trained - ends_of_prefixes
    return {
        "sampling": _work(where.position, predicts | unfinished, ends_of_prefixes, unfinished),
        "features": _work(where.position, in_windows | (real & in_rollout), 0, None),
        "training_forward": _work(where.position, newly | unfinished, n_newly, unfinished),
        "backward": _work(where.position, trained | unfinished, n_trained, unfinished),
    }


def _work(position: Tensor, needed: Tensor, head_rows: int, more_head_rows: Tensor | None) -> Work:
    if more_head_rows is not None:
        head_rows += int(more_head_rows.sum())
    # A token sees its document up to itself, in a rollout as in the document: position + 1 tokens.
    pairs = int(((position + 1) * needed).sum())
    return Work(tokens=int(needed.sum()), pairs=pairs, head_rows=head_rows)


def _distinct_prefix_ends(layout: PackedLayout) -> int:
    first = layout.predictor[:, 0, :, 0]
    return sum(
        int(torch.unique(places[exists]).numel())
        for places, exists in zip(first, layout.blocks.exists, strict=True)
    )


def measure_costs(model: nn.Module, *, adapters: bool = True) -> tuple[Cost, Cost]:
    """Forward and backward cost of a model, read off a forward pass over two tokens.

    Hooks note which linear layers run and which gradients they need.

    Args:
        model: a causal language model, or a PEFT model of one, whose layers see the whole prefix.
        adapters: False: with the adapters of a PEFT model off.

    Raises:
        ValueError: layers that see less than the whole prefix.
    """
    base = bare_model(model)
    config = base.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if window or kinds:
        raise ValueError(
            f"{type(base).__name__} has layers that see less than the whole prefix "
            f"(sliding_window={window}, layer_types {sorted(kinds)}), which are not counted here."
        )
    layers, head = decoder_layers(model), base.get_output_embeddings()
    assert head is not None
    counts: dict[nn.Module, list[int]] = {owner: [0, 0] for owner in [*layers, head]}
    hooks = [
        module.register_forward_pre_hook(_counter(counts[owner], module))
        for owner in counts
        for module in owner.modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    switch = not adapters and isinstance(model, PeftModel)
    off = adapters_off(model) if switch else contextlib.nullcontext()
    try:
        with off, torch.enable_grad():
            ids = torch.zeros(1, _PROBE, dtype=torch.long, device=base.device)
            # A mask of one's own: to make one, transformers would look into the values of others.
            mask = torch.zeros(1, 1, _PROBE, _PROBE, dtype=base.dtype, device=base.device)
            model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * width * config.num_attention_heads
    forward, backward = (
        Cost(
            per_token=tuple(counts[layer][way] for layer in layers),
            per_pair=attention * (1 + way),
            per_head_row=counts[head][way],
        )
        for way in (0, 1)
    )
    return forward, backward


_PROBE = 2


def _counter(count: list[int], module: nn.Module) -> Any:
    """A hook that adds a module's multiply-adds per token, forward and backward, to `count`."""
    weight: Any = module.weight

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].shape[:-1].numel()
        forward = weight.numel() * rows // _PROBE
        count[0] += forward
        count[1] += forward * (int(args[0].requires_grad) + int(weight.requires_grad))

    return hook


def count_step(
    layout: PackedLayout,
    model: nn.Module,
    *,
    n_feature_layers: int,
    with_cross_entropy: bool,
) -> dict[str, int]:
    """Multiply-adds by phase of a step: sampling, features, training_forward, backward.

    Args:
        layout: the batch.
        model: the policy; without its adapters, if it has any, it is the feature network. Its
            weights are not looked at: it may live on the meta device.
        n_feature_layers: layers that the feature network has to run.
        with_cross_entropy: whether the loss has a cross-entropy term.
    """
    work = count_work(layout, with_cross_entropy=with_cross_entropy)
    forward, backward = measure_costs(model)
    features, _ = measure_costs(model, adapters=False)
    return {
        "sampling": forward.multiply_adds(work["sampling"]),
        "features": features.multiply_adds(work["features"], n_feature_layers),
        "training_forward": forward.multiply_adds(work["training_forward"]),
        "backward": backward.multiply_adds(work["backward"]),
    }


class MatrixProduct:
    """A large square matrix product, as a measure of what the machine can do.

    Args:
        device: where.
        dtype: the dtype that the model computes in.
        size: its rows; None: 2048 on a CPU, 8192 elsewhere.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int | None = None) -> None:
        # Some tenths of a second on two CPU cores, some milliseconds on a GPU.
        self.size = size or (2048 if device.type == "cpu" else 8192)
        self._device = device
        shape = (self.size, self.size)
        self._a, self._b = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        self._c = torch.empty(shape, device=device, dtype=dtype)
        torch.mm(self._a, self._b, out=self._c)

    def speed(self) -> float:
        """Multiply-adds per second, measured now."""
        with torch.no_grad():
            self._wait()
            start = time.perf_counter()
            torch.mm(self._a, self._b, out=self._c)
            self._wait()
        return self.size**3 / (time.perf_counter() - start)

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
