"""A self-test of packing on the actual model: packed rows compared with plain forward passes.

The rules of `hf_ebft.packed.supported` refuse models that are known not to work. This test finds
the others, with a few short forward passes.

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

# Lengths of the test's documents: a row with one document of three blocks, and a shorter row with
# two documents of one block each. So there is padding, and a row with several documents.
ROWS = ((16,), (7, 6))
CONTEXT, STRIDE, ROLLOUT_LENGTH, SAMPLES = 3, 4, 3, 2
# Length of sliding windows and chunks during the test: real ones are longer than its documents.
PROBE_WINDOW = 4
# Tolerated KL divergence of the packed distribution from the plain one, mean over tokens, in nats.
# Rounding causes less than 1e-7 in float32 (some 1e-5 with TF32) and about 2e-3 in bfloat16, where
# the router of a mixture of experts can raise it to 1.4e-2. A wrong mask or position causes 6e-2 or
# more, even on untrained models. (The largest difference of a log-probability separates the two
# less well: it is half a nat in bfloat16 on a vocabulary of 49152.)
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 3e-2


def verify_packing(model: nn.Module, forward: PackedForward) -> float:
    """Compare packed log-probabilities with plain causal passes over `prefix + own tokens`.

    Args:
        model: the policy or feature network, not on the meta device and not sharded.
        forward: how the model runs packed rows.

    Returns:
        The divergence per token, in nats, see `packing_divergence`.

    Raises:
        ValueError: the divergence is larger than rounding can explain, the model fails on a packed
            row, or it has no head.
    """
    refuse_headless(model)
    try:
        divergence = packing_divergence(model, forward)
    except (FloatingPointError, torch.OutOfMemoryError, ValueError):
        raise
    # A model's code may raise anything if it does not expect the mask or the positions.
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} fails on a packed row ({type(error).__name__}: {error}). It "
            "must take position_ids and an attention_mask with one entry per query and key. EBFT "
            "cannot train this model in strided mode; use another architecture."
        ) from error
    tolerance = TOLERANCE.get(forward.recipe.dtype, LOW_PRECISION_TOLERANCE)
    if not divergence <= tolerance:
        raise ValueError(
            f"{type(model).__name__} gives other log-probabilities on a packed row than on plain "
            f"text (a divergence of {divergence:.3g} nats per token, tolerance {tolerance}). "
            "Something in the model depends on the order of tokens in the row, and not only on "
            "position_ids and attention_mask. EBFT cannot train it in strided mode. Use another "
            "architecture, or set verify_packing=False if you know that the difference is noise."
        )
    return divergence


def packing_divergence(model: nn.Module, forward: PackedForward) -> float:
    """How much sampling and training on packed rows differ from plain passes, in nats per token.

    The result is the larger of two means over the rollouts' tokens. For the training pass it is
    KL(plain || packed). The cached sampler keeps no whole distributions; for it, it is half the
    squared difference of the sampled token's log-probability (at most 1/2), which equals the KL
    divergence to second order.

    During the test, sliding windows and chunks are shortened so that documents are longer than
    they are. Nothing is compiled for the few tokens of the test.
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
    """Random documents with the lengths of `ROWS`, padded on the right.

    The first document begins with the tokens that adapters treat specially.
    """
    device = generator.device
    # In many tokenizers low ids are special tokens, and padding ids may have zero embeddings.
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
    """Shorten the model's windows and chunks to `PROBE_WINDOW`, for plain and packed passes."""
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
    """Log-probabilities (n, blocks that exist, G, V) from one pass over the packed rows.

    The head is applied as in training.
    """
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
