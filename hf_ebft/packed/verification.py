"""A self-test of packing on the actual model: packed row against plain forward passes.

Rules (:mod:`hf_ebft.packed.supported`) refuse what is known not to work; this catches what no rule
knows, in a few short forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_ebft.packed.forward import PackedForward, evaluation_mode
from hf_ebft.packed.model_parts import bare_model, vocabulary_size
from hf_ebft.packed.sampling import Rollouts, make_generator, sample_rollouts
from hf_ebft.packed.targets import KeptPlaces
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout

# A probe row: three blocks, two samples.
DOCUMENT_LENGTH, CONTEXT, STRIDE, ROLLOUT_LENGTH, SAMPLES = 16, 5, 4, 3, 2
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
    """Compare packed log-probabilities with plain causal forwards over ``prefix + own tokens``.

    Args:
        model: the policy or feature network, not on the meta device, not sharded.
        forward: how it runs packed rows.

    Returns:
        The mean KL divergence per token, in nats.

    Raises:
        ValueError: it is too large to be rounding, or the model fails on a packed row.
    """
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
            f"text (a KL divergence of {divergence:.3g} nats per token, tolerance {tolerance}): "
            "something in it depends on the order of the row beyond position_ids and "
            "attention_mask. EBFT cannot train it in strided mode; use another architecture, or "
            "verify_packing=False if you know the difference to be noise."
        )
    return divergence


def packing_divergence(model: nn.Module, forward: PackedForward) -> float:
    """Mean KL(plain || packed) over the rollouts' tokens in a short random document.

    Windows and chunks are shortened meanwhile, so that the document outgrows them.
    """
    device = next(model.parameters()).device
    generator = make_generator(device, 0)
    # Low ids are the special tokens of many tokenizers; padding ids can have zero embeddings.
    low = min(16, vocabulary_size(model) // 2)
    ids = torch.randint(
        low, vocabulary_size(model), (1, DOCUMENT_LENGTH), generator=generator, device=device
    )
    documents = Documents.from_inputs({"input_ids": ids})
    blocks = find_blocks(
        documents, stride=STRIDE, context_length=CONTEXT, generate_max_len=ROLLOUT_LENGTH
    )
    layout = PackedLayout(documents, blocks, SAMPLES, ROLLOUT_LENGTH)
    with evaluation_mode(model), _short_windows(model, forward) as forward:
        rollouts = sample_rollouts(
            model,
            forward,
            layout,
            temperature=1.0,
            top_p=1.0,
            chunk_size=DOCUMENT_LENGTH,
            generator=generator,
        )
        packed = _packed_log_probs(model, forward, rollouts)
        plain = _plain_log_probs(model, rollouts)
    return float((plain.exp() * (plain - packed)).sum(-1).mean())


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
        yield replace(forward, recipe=recipe)
    finally:
        for name, length in lengths.items():
            setattr(config, name, length)


def _packed_log_probs(model: nn.Module, forward: PackedForward, rollouts: Rollouts) -> Tensor:
    """(n, K, G, V) from one forward pass over the packed row, through the head as in training."""
    layout = rollouts.layout
    kept = KeptPlaces.for_layout(layout, whole_document=False)
    (logits,) = forward.through_head(
        model,
        layout.input_ids(rollouts.tokens),
        layout.row_part,
        kept.places,
        lambda states, to_logits: [to_logits(states[0])],
    )
    return logits[kept.index_of[layout.predictor[0]]].float().log_softmax(-1)


def _plain_log_probs(model: nn.Module, rollouts: Rollouts) -> Tensor:
    """(n, K, G, V) from one plain causal forward pass per rollout."""
    document, blocks = rollouts.layout.documents.input_ids[0], rollouts.layout.blocks
    per_sample = []
    for sample in rollouts.tokens[0]:
        per_block = []
        for block, own in enumerate(sample):
            end = int(blocks.position[0, block])
            text = torch.cat([document[:end], own])[None]
            logits = model(input_ids=text, use_cache=False).logits[0, end - 1 : -1]
            per_block.append(logits.float().log_softmax(-1))
        per_sample.append(torch.stack(per_block))
    return torch.stack(per_sample)
