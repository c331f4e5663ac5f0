"""A self-test of packing on the actual model: packed row against plain forward passes.

Rules (`hf_ebft.packed.supported`) refuse what is known not to work; this catches what no rule
knows, in a few short forward passes.

Dimension letters: B rows, K blocks, n samples, G rollout length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_ebft.packed.compiled_layers import layers_as_written
from hf_ebft.packed.forward import PackedForward, evaluation_mode
from hf_ebft.packed.model_parts import bare_model, tokens_with_adapters, vocabulary_size
from hf_ebft.packed.sampling import Rollouts, make_generator, sample_with_record
from hf_ebft.packed.supported import refuse_headless
from hf_ebft.packed.targets import KeptPlaces
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout

# The probe: a row with one document of three blocks, and a shorter one with two documents of a
# block each, so that rows have padding and documents neighbours.
ROWS = ((16,), (7, 6))
CONTEXT, STRIDE, ROLLOUT_LENGTH, SAMPLES = 3, 4, 3, 2
# Windows and chunks while the probe runs: real ones are longer than its document.
PROBE_WINDOW = 4
# Mean over tokens of the KL divergence of the packed distribution from the plain one, in nats.
# Rounding stays below 1e-7 in float32 (some 1e-5 with TF32) and around 2e-3 in bfloat16, where the
# router of a mixture of experts can take it to 1.4e-2; a wrong mask or position costs 6e-2 and more
# on models that learned nothing. (The largest difference of a log-probability separates them worse:
# half a nat in bfloat16 on a vocabulary of 49152.)
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 3e-2


def verify_packing(model: nn.Module, forward: PackedForward) -> float:
    """Compare packed log-probabilities with plain causal forwards over `prefix + own tokens`.

    Args:
        model: the policy or feature network, not on the meta device, not sharded.
        forward: how it runs packed rows.

    Returns:
        The divergence per token, in nats, see `packing_divergence`.

    Raises:
        ValueError: it is too large to be rounding, the model fails on a packed row, or it has no
            head.
    """
    refuse_headless(model)
    try:
        divergence = packing_divergence(model, forward)
    except (FloatingPointError, torch.OutOfMemoryError, ValueError):
        raise
    # Whatever foreign code raises when it meets a mask or positions that it did not expect.
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} fails on a packed row ({type(error).__name__}: {error}): it "
            "does not take position_ids and an attention_mask that says for each token which "
            "others it sees. EBFT cannot train it in strided mode; use another architecture."
        ) from error
    tolerance = TOLERANCE.get(forward.recipe.dtype, LOW_PRECISION_TOLERANCE)
    if not divergence <= tolerance:
        raise ValueError(
            f"{type(model).__name__} gives other log-probabilities on a packed row than on plain "
            f"text (a divergence of {divergence:.3g} nats per token, tolerance {tolerance}): "
            "something in it depends on the order of the row beyond position_ids and "
            "attention_mask. EBFT cannot train it in strided mode; use another architecture, or "
            "verify_packing=False if you know the difference to be noise."
        )
    return divergence


def packing_divergence(model: nn.Module, forward: PackedForward) -> float:
    """How far sampling and training on packed rows are from plain passes, in nats per token.

    The larger of two means over the rollouts' tokens: KL(plain || packed) in the training pass,
    and, in the cached sampler, which keeps no whole distributions, half the squared difference of
    a sampled token's log-probability (at most 1/2): the same divergence to second order.

    Windows and chunks are shortened meanwhile, so that the documents outgrow them. Nothing is
    compiled for the few tokens of this test.
    """
    device = next(model.parameters()).device
    generator = make_generator(device, 0)
    documents = _probe_documents(model, generator)
    blocks = find_blocks(
        documents, stride=STRIDE, context_length=CONTEXT, generate_max_len=ROLLOUT_LENGTH
    )
    layout = PackedLayout(documents, blocks, SAMPLES, ROLLOUT_LENGTH)
    with evaluation_mode(model), layers_as_written(), _short_windows(model, forward) as forward:
        rollouts, record = sample_with_record(
            model,
            forward,
            layout,
            temperature=1.0,
            top_p=1.0,
            chunk_size=layout.document_width,
            generator=generator,
        )
        packed = _packed_log_probs(model, forward, rollouts)
        plain = _plain_log_probs(model, rollouts)
    training = (plain.exp() * (plain - packed)).sum(-1).mean()
    sampled = _existing(record.log_probs, rollouts)
    tokens = _existing(rollouts.tokens, rollouts)
    difference = sampled - plain.gather(-1, tokens[..., None])[..., 0]
    sampling = (difference.square() / 2).clamp(max=0.5).mean()
    return float(torch.stack([training, sampling]).amax())


def _probe_documents(model: nn.Module, generator: torch.Generator) -> Documents:
    """Random documents of the lengths of `ROWS`, padded on the right.

    What an adapter reacts to stands early in the first one.
    """
    device = generator.device
    # Low ids are the special tokens of many tokenizers; padding ids can have zero embeddings.
    low = min(16, vocabulary_size(model) // 2)
    shape = (len(ROWS), max(map(sum, ROWS)))
    ids = torch.randint(low, vocabulary_size(model), shape, generator=generator, device=device)
    special = tokens_with_adapters(model)[:CONTEXT]
    ids[0, : len(special)] = torch.tensor(special, dtype=torch.long, device=device)
    number, real = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, lengths in enumerate(ROWS):
        real[row, : sum(lengths)] = 1
        numbers = torch.arange(len(lengths), device=device)
        number[row, : sum(lengths)] = numbers.repeat_interleave(torch.tensor(lengths).to(device))
    return Documents.from_inputs({"input_ids": ids, "attention_mask": real, "document_ids": number})


@contextmanager
def _short_windows(model: nn.Module, forward: PackedForward) -> Iterator[PackedForward]:
    """The same model, plain and packed, with windows and chunks of a few tokens."""
    config = bare_model(model).config.get_text_config(decoder=True)
    lengths = {
        name: length
        for name in ("sliding_window", "attention_chunk_size")
        if (length := getattr(config, name, None))
    }
    recipe = replace(
        forward.recipe,
        window=forward.recipe.window and PROBE_WINDOW,
        chunk=forward.recipe.chunk and PROBE_WINDOW,
    )
    try:
        for name in lengths:
            setattr(config, name, PROBE_WINDOW)
        yield replace(forward, recipe=recipe, compiler=None)
    finally:
        for name, length in lengths.items():
            setattr(config, name, length)


def _packed_log_probs(model: nn.Module, forward: PackedForward, rollouts: Rollouts) -> Tensor:
    """(n, blocks that exist, G, V) from one pass over the packed rows, through the head as in
    training."""
    layout = rollouts.layout
    kept = KeptPlaces.for_layout(layout, whole_document=False)
    (logits_BPV,) = forward.through_head(
        model,
        rollouts.input_ids(layout.row_part),
        layout.row_part,
        kept.places,
        lambda states, to_logits: [to_logits(states.flatten(0, 1)).unflatten(0, states.shape[:2])],
    )
    rows = torch.arange(len(logits_BPV), device=logits_BPV.device)[:, None, None, None]
    log_probs_BnKGV = logits_BPV.float().log_softmax(-1)[rows, kept.index_of[layout.predictor]]
    return _existing(log_probs_BnKGV, rollouts)


def _existing(values: Tensor, rollouts: Rollouts) -> Tensor:
    """(B, n, K, ...) -> (n, blocks that exist, ...)."""
    return values.transpose(1, 2)[rollouts.exists].transpose(0, 1)


def _plain_log_probs(model: nn.Module, rollouts: Rollouts) -> Tensor:
    """(n, blocks that exist, G, V) from one plain causal forward pass per block."""
    layout, per_block = rollouts.layout, []
    for row, block in rollouts.exists.nonzero().tolist():
        end = int(layout.blocks.column[row, block])
        length = int(layout.blocks.position[row, block])
        prefix = layout.documents.input_ids[row, end - length : end].expand(SAMPLES, -1)
        text = torch.cat([prefix, rollouts.tokens[row, :, block]], dim=1)
        logits = model(input_ids=text, use_cache=False).logits[:, length - 1 : -1]
        per_block.append(logits.float().log_softmax(-1))
    return torch.stack(per_block, dim=1)
