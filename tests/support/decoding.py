"""A decoder of one batch, as sampling makes it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from hf_ebft.packed.decoding import StaticDecoder
from hf_ebft.packed.drawing import Sampler, uniform_numbers
from hf_ebft.packed.flex import FLEX
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.sampling import make_generator
from hf_ebft.rows.layout import PackedLayout


def decoder_for(
    model: nn.Module,
    forward: PackedForward,
    layout: PackedLayout,
    seed: int = 0,
    *,
    static: bool = True,
    by_blocks: bool = False,
) -> StaticDecoder:
    """Before its first step, after random first tokens.

    Args:
        by_blocks: whether the documents' part is flex_attention's, whatever the model's passes use.
    """
    rows, n_samples, n_blocks, length = layout.rollout_shape
    shape = (rows, n_blocks * n_samples)
    cache, kept = forward.new_cache(), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        forward.logits(model, layout.documents.input_ids, layout.document_part, kept, cache=cache)
    generator = make_generator(torch.device("cpu"), seed)
    first = [torch.randint(5, 60, shape, generator=generator), torch.zeros(shape)]
    uniform = uniform_numbers((length - 1, *shape), generator)
    if by_blocks:
        forward = replace(forward, recipe=replace(forward.recipe, implementation=FLEX))
    sampler = Sampler(temperature=1.0, top_p=1.0, chunk_size=10_000)
    return StaticDecoder(model, forward, layout, sampler, cache, first, uniform, static=static)
