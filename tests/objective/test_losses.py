"""Losses and the KL penalty against direct formulas and loops.

Dimension letters: B rows, S document tokens, K blocks, n samples, G rollout tokens, V vocabulary.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hf_ebft.config import EBFTSettings
from hf_ebft.objective.losses import (
    cross_entropy,
    ebft_objective,
    kl_penalty,
    per_rollout_token_mean,
    policy_gradient_loss,
)
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from tests.support.tiny import ragged_layout

VOCABULARY = 11


def documents_of(layout: PackedLayout) -> list[tuple[int, int]]:
    """(row, document) of every document of the batch."""
    per_row = (layout.documents.document.amax(dim=1) + 1).tolist()
    return [(row, document) for row, count in enumerate(per_row) for document in range(count)]


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


# ---- The objective ----------------------------------------------------------------------------


@pytest.mark.parametrize("with_document", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_the_objective_is_the_weighted_sum_of_its_parts(
    with_document: bool, with_reference: bool
) -> None:
    """What is not asked for is None, and not in the loss."""
    settings = EBFTSettings(rl_coef=0.7, ce_coef=0.2, kl_coef=0.3, kl_estimator="k3")
    layout = ragged_layout()
    log_probs, reference = (-torch.rand(layout.rollout_shape) for _ in range(2))
    document = -torch.rand_like(layout.documents.input_ids, dtype=torch.float32)
    advantages = torch.randn(layout.rollout_shape[:3])
    objective = ebft_objective(
        settings,
        layout,
        log_probs,
        advantages,
        document_log_probs=document if with_document else None,
        reference_log_probs=reference if with_reference else None,
    )
    rl = policy_gradient_loss(log_probs, advantages, layout)
    ce = cross_entropy(document, layout.documents)
    kl = per_rollout_token_mean(kl_penalty(log_probs, reference, "k3"), layout)
    torch.testing.assert_close(objective.rl, rl)
    assert (objective.ce is not None) == with_document
    assert (objective.kl is not None) == with_reference
    expected = 0.7 * rl + 0.2 * ce * with_document + 0.3 * kl * with_reference
    torch.testing.assert_close(objective.loss, expected)


def test_an_objective_that_is_not_finite_raises_and_lists_its_parts() -> None:
    layout = ragged_layout()
    log_probs = torch.zeros(layout.rollout_shape)
    advantages = torch.full(layout.rollout_shape[:3], math.inf)
    with pytest.raises(FloatingPointError, match=r"The loss is nan \(rl_loss=nan\).*learning_rate"):
        ebft_objective(EBFTSettings(), layout, log_probs, advantages)


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
