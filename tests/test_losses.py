"""Log-probabilities, losses and the KL penalty against direct formulas and loops.

Dimension letters: B rows, S document tokens, K blocks, n samples, G rollout tokens, P places whose
logits are kept, V vocabulary.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ebft.anchors import find_blocks
from hf_ebft.documents import Documents
from hf_ebft.layout import PackedLayout
from hf_ebft.losses import (
    KeptPlaces,
    cross_entropy,
    kl_penalty,
    log_normalizer,
    per_rollout_token_mean,
    policy_gradient_loss,
    token_log_probs,
)
from hf_ebft.rollouts import Rollouts

VOCABULARY = 11


def ragged_layout(n_samples: int = 2, length: int = 3) -> PackedLayout:
    """Rows of 14, 5 and 9 tokens, the last one two packed documents: 4, 1, 0 and 1 blocks."""
    ids = torch.randint(VOCABULARY, (3, 14))
    mask = torch.zeros_like(ids)
    document = torch.zeros_like(ids)
    for row, width in enumerate((14, 5, 9)):
        mask[row, :width] = 1
    document[2, 3:] = 1
    documents = Documents.from_inputs(
        {"input_ids": ids, "attention_mask": mask, "document_ids": document}
    )
    blocks = find_blocks(documents, stride=3, context_length=2, generate_max_len=length)
    layout = PackedLayout(documents, blocks, n_samples, length)
    assert layout.blocks.exists.sum(dim=1).tolist() == [4, 1, 1]
    return layout


def rollouts_of(layout: PackedLayout) -> Rollouts:
    tokens = torch.randint(VOCABULARY, layout.rollout_shape)
    return Rollouts(tokens=tokens, exists=layout.blocks.exists, layout=layout)


def documents_of(layout: PackedLayout) -> list[tuple[int, int]]:
    """(row, document) of every document of the batch."""
    per_row = (layout.documents.document.amax(dim=1) + 1).tolist()
    return [(row, document) for row, count in enumerate(per_row) for document in range(count)]


# ---- Log-probabilities ----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("whole_document", [False, True])
def test_token_log_probs_are_entries_of_a_log_softmax(
    temperature: float, whole_document: bool
) -> None:
    layout = ragged_layout()
    rollouts = rollouts_of(layout)
    kept = KeptPlaces.of(layout, whole_document=whole_document)
    row_logits = torch.randn(3, layout.row_width, VOCABULARY)
    actual = token_log_probs(
        row_logits[:, kept.places],
        kept,
        rollouts,
        temperature=temperature,
        with_document=whole_document,
        chunk_size=5,
    )
    expected = (row_logits / temperature).log_softmax(dim=-1)
    for row, sample, block, step in torch.ones(layout.rollout_shape).nonzero().tolist():
        if not layout.blocks.exists[row, block]:
            continue
        place = layout.predictor[row, sample, block, step]
        token = rollouts.tokens[row, sample, block, step]
        torch.testing.assert_close(
            actual.rollout[row, sample, block, step], expected[row, place, token]
        )
    if not whole_document:
        assert actual.document is None
        return
    assert actual.document is not None
    plain = row_logits.log_softmax(dim=-1)
    documents = layout.documents
    for row, column in torch.ones_like(documents.input_ids).nonzero().tolist():
        value = actual.document[row, column]
        if documents.document[row, column] < 0 or documents.position[row, column] == 0:
            assert value == 0
        else:
            token = documents.input_ids[row, column]
            torch.testing.assert_close(value, plain[row, column - 1, token])


def test_only_predictors_are_kept() -> None:
    """The head runs at the places that predict something, and nowhere else."""
    layout = ragged_layout()
    exists = layout.blocks.exists[:, None, :, None].expand(layout.rollout_shape)
    predictors = set(layout.predictor[exists].tolist())
    kept = KeptPlaces.of(layout, whole_document=False)
    assert predictors <= set(kept.places.tolist())
    # Blocks that a row does not have stand where those of the longest row do.
    assert set(kept.places.tolist()) <= predictors | {0} | set(layout.predictor.flatten().tolist())
    assert kept.places.tolist() == sorted(set(kept.places.tolist()))
    last_steps = layout.coordinates.slot[0, layout.document_width :].view(-1, layout.length)[:, -1]
    assert not set(last_steps.tolist()) & set(kept.places.tolist())
    assert torch.equal(kept.places[kept.index_of[kept.places]], kept.places)

    with_document = KeptPlaces.of(layout, whole_document=True)
    assert with_document.places[: with_document.n_document].tolist() == list(range(13))


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_of_any_size_give_the_same_normalizer(chunk_size: int, temperature: float) -> None:
    """15 rows of logits, in chunks that do and do not divide them: value and gradient."""
    logits = (3 * torch.randn(3, 5, VOCABULARY)).requires_grad_()
    weights = torch.randn(3, 5)
    expected = torch.logsumexp(logits / temperature, dim=-1)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    actual = log_normalizer(logits, temperature, chunk_size)
    (gradient,) = torch.autograd.grad((actual * weights).sum(), logits)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def saved_float32_sizes(compute: Any) -> list[int]:
    """Sizes of the float32 tensors that the autograd graph of ``compute()`` keeps for backward."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sizes


def test_no_float32_copy_of_the_logits_is_kept_for_backward() -> None:
    """The vocabulary is what makes logits large: nothing of its width may stay in float32.

    The check is one that a plain float32 log_softmax fails.
    """
    layout = ragged_layout()
    rollouts = rollouts_of(layout)
    kept = KeptPlaces.of(layout, whole_document=True)
    vocabulary = 4096
    logits = torch.randn(3, kept.places.shape[0], vocabulary, dtype=torch.bfloat16)
    logits.requires_grad_()
    saved = saved_float32_sizes(
        lambda: token_log_probs(
            logits, kept, rollouts, temperature=0.7, with_document=True, chunk_size=8
        )
    )
    assert max(saved, default=0) < vocabulary
    plain = saved_float32_sizes(lambda: logits.float().log_softmax(dim=-1))
    assert max(plain) >= logits.numel()


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits = (4 * torch.randn(2, 6, 1000)).bfloat16()
    expected = torch.logsumexp(logits.double() / 0.7, dim=-1)
    actual = log_normalizer(logits, 0.7, 5)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


# ---- Losses ---------------------------------------------------------------------------------


def test_policy_gradient_loss_weighs_documents_equally() -> None:
    """A document with four blocks counts as much as one with a single block; one without is 0."""
    layout = ragged_layout()
    log_probs = -torch.rand(layout.rollout_shape)
    advantages = torch.randn(layout.rollout_shape[:3])
    per_document = []
    for row, document in documents_of(layout):
        own = (layout.blocks.document[row] == document) & layout.blocks.exists[row]
        terms = [
            -float(advantages[row, sample, block] * log_probs[row, sample, block, step])
            for sample in range(layout.n_samples)
            for block in own.nonzero().flatten().tolist()
            for step in range(layout.length)
        ]
        per_document.append(sum(terms) / len(terms) if terms else 0.0)
    assert len(per_document) == 4
    assert per_document.count(0.0) == 1
    loss = policy_gradient_loss(log_probs, advantages, layout)
    assert float(loss) == pytest.approx(sum(per_document) / 4, rel=1e-5)


def test_advantages_are_constants() -> None:
    layout = ragged_layout()
    advantages = torch.randn(layout.rollout_shape[:3], requires_grad=True)
    log_probs = torch.randn(layout.rollout_shape, requires_grad=True)
    policy_gradient_loss(log_probs, advantages, layout).backward()
    assert advantages.grad is None
    assert log_probs.grad is not None


def test_blocks_that_do_not_exist_get_no_gradient() -> None:
    layout = ragged_layout()
    log_probs = torch.randn(layout.rollout_shape, requires_grad=True)
    per_rollout_token_mean(log_probs, layout).backward()
    assert log_probs.grad is not None
    exists = layout.blocks.exists[:, None, :, None].expand(layout.rollout_shape)
    assert bool((log_probs.grad[exists] > 0).all())
    assert not log_probs.grad[~exists].any()


def test_cross_entropy_is_a_mean_of_document_means() -> None:
    """Against torch's own cross-entropy, one document at a time."""
    ids = torch.randint(VOCABULARY, (2, 10))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 7:] = -100
    document = torch.tensor([[0] * 10, [0] * 4 + [1] * 6])
    documents = Documents.from_inputs(
        {"input_ids": ids, "labels": labels, "document_ids": document}
    )
    logits = torch.randn(2, 10, VOCABULARY)
    log_probs = torch.zeros(2, 10)
    picked = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    log_probs[:, 1:] = picked
    own = [(0, slice(0, 10)), (1, slice(0, 4)), (1, slice(4, 10))]
    expected = [
        F.cross_entropy(logits[row, part][:-1], labels[row, part][1:], ignore_index=-100)
        for row, part in own
    ]
    actual = cross_entropy(log_probs, documents)
    torch.testing.assert_close(actual, torch.stack(expected).mean())


def test_cross_entropy_of_fully_masked_documents_is_zero() -> None:
    ids = torch.randint(VOCABULARY, (1, 6))
    documents = Documents.from_inputs({"input_ids": ids, "labels": torch.full_like(ids, -100)})
    log_probs = torch.zeros(1, 6, requires_grad=True)
    loss = cross_entropy(log_probs, documents)
    loss.backward()
    assert loss.item() == 0.0


# ---- KL penalty -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        ("k1", lambda p, q: math.log(p / q)),
        ("k2", lambda p, q: math.log(p / q) ** 2 / 2),
        ("k3", lambda p, q: q / p - 1 - math.log(q / p)),
    ],
)
def test_kl_estimators_have_the_values_of_their_formulas(estimator: str, formula: Any) -> None:
    probabilities = [(0.5, 0.5), (0.2, 0.7), (0.9, 0.01)]
    policy = torch.tensor([p for p, _ in probabilities]).log()
    reference = torch.tensor([q for _, q in probabilities]).log()
    expected = torch.tensor([formula(p, q) for p, q in probabilities])
    torch.testing.assert_close(kl_penalty(policy, reference, estimator), expected)


@pytest.mark.parametrize(("estimator", "forward"), [("k1", True), ("k2", True), ("k3", False)])
def test_expected_gradient_of_the_kl_penalty(estimator: str, forward: bool) -> None:
    """Summed over every token with the policy's own probabilities, in float64.

    k1 and k2 follow the gradient of KL(policy || reference). k3 follows that of
    KL(reference || policy), which is why it is called biased.
    """
    logits = torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(VOCABULARY, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    probabilities = policy.detach().exp()
    estimate = (probabilities * kl_penalty(policy, reference, estimator)).sum()
    (actual,) = torch.autograd.grad(estimate, logits)

    policy = logits.log_softmax(-1)
    if forward:
        divergence = (policy.exp() * (policy - reference)).sum()
    else:
        divergence = (reference.exp() * (reference - policy)).sum()
    (expected,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expected_value_of_the_kl_penalty(estimator: str) -> None:
    """k1 and k3 are unbiased for KL(policy || reference); k2 is only so to second order."""
    policy = torch.randn(VOCABULARY, dtype=torch.float64).log_softmax(-1)
    reference = torch.randn(VOCABULARY, dtype=torch.float64).log_softmax(-1)
    expected = (policy.exp() * (policy - reference)).sum()
    actual = (policy.exp() * kl_penalty(policy, reference, estimator)).sum()
    torch.testing.assert_close(actual, expected)


def test_an_unknown_kl_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl_estimator='k4'.*k1, k2, k3"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")
