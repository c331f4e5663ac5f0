"""Rows fed in chunks with flex_attention: the gradients and features of the whole row.

The oracles are one pass over the whole row behind a dense mask. How flex_attention gets a gradient
on a CPU: see test_flex.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.packed.deferred import TrainingPass, can_defer
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.packed.masks import MaskRecipe
from hf_ebft.packed.sampling import Rollouts, SamplingRecord, make_generator, sample_with_record
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.buckets import Buckets
from hf_ebft.rows.documents import DocumentReader
from hf_ebft.rows.layout import PackedLayout, PackedPart
from tests.support.architectures import tiny_model
from tests.support.exactness import Case, lora_model, packed_documents, ragged_batch

CASES = {
    # Six blocks, five of them in one row; the last chunk of four is filled up.
    "ragged": Case(ragged_batch(33, 21, 5), stride=6),
    "packed documents": Case(packed_documents([15, 9, 4], [20]), stride=4, context_length=1),
    "several tiles": Case(ragged_batch(190, 60), stride=8, generate_max_len=6, n_samples=4),
    "two tokens": Case(ragged_batch(33, 21), stride=6, generate_max_len=2),
}
# Of a gradient whose largest entry is 1: sums in another order. The adapters of the tests are large
# (sdpa's own gradient is 2e-5 from the one in double precision).
ROUNDING = {"lora": 5e-5}
# A bound on the scores and sinks are what sdpa leaves out.
DENSE = {"gemma2": "eager", "gpt_oss": "eager"}


pytestmark = pytest.mark.usefixtures("flex_gradient_on_a_cpu")


@pytest.fixture
def masks_used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[PackedPart, Any]]:
    """The parts that passes with gradient fed, and their masks."""
    used: list[tuple[PackedPart, Any]] = []
    original = MaskRecipe.masks_for

    def noted(self: MaskRecipe, part: PackedPart) -> Any:
        masks = original(self, part)
        if torch.is_grad_enabled():
            used.append((part, masks))
        return masks

    monkeypatch.setattr(MaskRecipe, "masks_for", noted)
    return used


def small_model(name: str) -> nn.Module:
    return lora_model("llama") if name == "lora" else tiny_model(name, limit=4096)


def sampled(
    model: nn.Module, forward: PackedForward, case: Case, training_pass: TrainingPass | None = None
) -> tuple[Rollouts, SamplingRecord]:
    layout = case.layout()
    targets = training_pass and training_pass.targets_in_sampling(model, layout)
    return sample_with_record(
        model,
        forward,
        layout,
        temperature=0.8,
        top_p=1.0,
        chunk_size=50,
        generator=make_generator(torch.device("cpu"), 0),
        targets=targets or None,
    )


SCORING: dict[str, Any] = {"temperature": 0.8, "with_document": True, "chunk_size": 50}


def gradients_of(model: nn.Module, found: Any, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Log-probabilities of what exists, and the gradient of a sum of them with random weights."""
    weight = torch.randn(rollouts.tokens.shape, generator=torch.Generator().manual_seed(0))
    weight = weight * rollouts.exists[:, None, :, None]
    model.zero_grad()
    ((weight * found.rollout).sum() + 0.1 * found.document.sum()).backward()
    gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    values = (found.rollout * rollouts.exists[:, None, :, None]).detach()
    return values, torch.cat(gradient)


@pytest.mark.parametrize(
    ("architecture", "case", "kept"),
    [
        *((architecture, "ragged", False) for architecture in ("lora", "gemma2", "gpt_oss")),
        *(("gemma3_text", case, False) for case in CASES),
        ("llama", "packed documents", True),
        ("gemma3_text", "ragged", True),
    ],
)
def test_gradients_of_chunks_are_those_of_the_whole_row(
    architecture: str, case: str, kept: bool, masks_used: list[tuple[PackedPart, Any]]
) -> None:
    """Kept: with the pass over the documents that sampling made; else for given tokens."""
    model = small_model(architecture)
    dense = PackedForward.for_model(model, DENSE.get(architecture, "sdpa"))
    rollouts, _ = sampled(model, dense, CASES[case])
    whole = packed_log_probs(model, dense, rollouts, **SCORING)
    expected_values, expected = gradients_of(model, whole, rollouts)

    forward = PackedForward.for_model(model, "flex_attention")
    n_blocks, tokens = rollouts.tokens.shape[2], rollouts.tokens[..., 1:].numel()
    chunk = 4 * tokens // n_blocks if n_blocks > 4 else tokens // n_blocks
    training_pass = TrainingPass(forward, training_chunk_size=chunk, **SCORING)
    assert can_defer(model, forward)
    record = None
    if kept:
        again, record = sampled(model, forward, CASES[case], training_pass)
        assert torch.equal(again.tokens, rollouts.tokens) and record.document_pass is not None
        rollouts = again
    masks_used.clear()
    found = training_pass.log_probs(model, rollouts, record)
    values, gradient = gradients_of(model, found, rollouts)
    largest = expected.abs().max()
    assert largest > 0.1
    torch.testing.assert_close(values, expected_values, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        gradient / largest, expected / largest, atol=ROUNDING.get(architecture, 5e-6), rtol=0
    )

    parts = [part for part, _ in masks_used if not part.has_documents]
    assert len(parts) > 1 and len({part.n_keys for part in parts}) == 1
    for _, masks in masks_used:
        every = masks.values() if isinstance(masks, dict) else [masks]
        assert all(isinstance(mask, BlockMask) for mask in every)


@pytest.mark.parametrize("embed_method", ["last_token", "mean_pooling"])
@pytest.mark.parametrize(
    ("architecture", "case"),
    [("llama", "packed documents"), ("gemma3_text", "ragged"), ("gemma2", "ragged")],
)
def test_features_of_chunks_are_those_of_the_whole_row(
    architecture: str, case: str, embed_method: Any
) -> None:
    """And so are the log-probabilities of a reference model."""
    model = small_model(architecture)
    dense = DENSE.get(architecture, "sdpa")
    rollouts, _ = sampled(model, PackedForward.for_model(model, dense), CASES[case])
    n_blocks = rollouts.tokens.shape[2]
    found = []
    for attention, chunk in ((dense, 10_000), ("flex_attention", rollouts.tokens.numel() // 2)):
        network = FeatureNetwork(
            model,
            feature_layers=(0.0, 0.5, 1.0),
            embed_method=embed_method,
            normalization="per_layer",
            packed_attention=attention,
            chunk_size=chunk,
        )
        score = partial(packed_log_probs, **{**SCORING, "with_document": False})
        found.append(network.embed(rollouts, score))
    chunks = network._chunks(rollouts.layout)
    assert len(chunks) > 1 and chunks[-1].stop >= n_blocks
    whole, in_chunks = found
    exists = rollouts.exists[:, None, :, None]
    torch.testing.assert_close(in_chunks.generated, whole.generated, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(in_chunks.ground_truth, whole.ground_truth, atol=2e-5, rtol=1e-5)
    assert in_chunks.reference_log_probs is not None and whole.reference_log_probs is not None
    torch.testing.assert_close(
        in_chunks.reference_log_probs * exists,
        whole.reference_log_probs * exists,
        atol=2e-5,
        rtol=1e-5,
    )


def test_chunks_of_one_bucket_are_compiled_once() -> None:
    """Whatever the documents' lengths: one graph for documents, one for all chunks of all batches.

    Lengths share a bucket of 64 tokens and 8 blocks.
    """
    model = tiny_model("llama", limit=4096).train()
    forward = PackedForward.for_model(model, "flex_attention")
    training_pass = TrainingPass(forward, training_chunk_size=36, **SCORING)
    torch._dynamo.utils.counters.clear()
    for length in range(40, 64, 3):
        documents = DocumentReader(widths=Buckets(64)).read(ragged_batch(length, 33))
        blocks = find_blocks(
            documents, stride=8, context_length=3, generate_max_len=4, counts=Buckets(8)
        )
        layout = PackedLayout(documents, blocks, n_samples=2, length=4)
        assert (layout.document_width, layout.rollout_shape[2]) == (64, 8)
        rollouts = Rollouts(torch.full(layout.rollout_shape, 7), blocks.exists, layout)
        assert len(training_pass._chunks(layout)) == 3  # of three blocks each
        found = training_pass.log_probs(model, rollouts)
        (found.rollout.sum() + found.document.sum()).backward()
    # Documents and chunks with gradient; chunks without, for the values of given tokens.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
