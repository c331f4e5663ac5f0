"""The EBFT objective of a batch: policy gradient, cross-entropy and KL, from log-probabilities.

Batch loss = mean over documents of `rl_coef * L_rl + ce_coef * L_ce + kl_coef * L_kl`. Each term is
a mean over the document's own tokens, so that a document's weight does not depend on how many
blocks it has.

Dimension letters: B rows of the batch, S document tokens, K blocks, n samples, G rollout length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ebft.config import EBFTSettings
from hf_ebft.objective.schedules import Coefficients, coefficients_at
from hf_ebft.rows.documents import Documents, predicted_targets
from hf_ebft.rows.layout import PackedLayout


@dataclass(frozen=True)
class Objective:
    """The loss of a batch and its parts, scalars with gradient.

    Attributes:
        loss: the weighted sum of the parts.
        rl: policy-gradient loss, before its weight.
        ce: cross-entropy of the documents, before its weight; None where the weight is zero.
        kl: KL to the reference policy, before its weight; None where the weight is zero.
        coefficients: the weights of the parts.
    """

    loss: Tensor
    rl: Tensor
    ce: Tensor | None
    kl: Tensor | None
    coefficients: Coefficients


def ebft_objective(
    settings: EBFTSettings,
    layout: PackedLayout,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    *,
    document_log_probs: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
    coefficients: Coefficients | None = None,
) -> Objective:
    """Mean over documents of `rl_coef * L_rl + ce_coef * L_ce + kl_coef * L_kl`.

    Args:
        settings: `kl_estimator`, and the coefficients if `coefficients` is None.
        layout: the batch.
        rollout_log_probs: (B, n, K, G) at the sampling temperature, with gradient.
        advantages: (B, n, K), or (B, n, K, G) if each token has its own; without gradient.
        document_log_probs: (B, S) at temperature 1, with gradient; None leaves out L_ce.
        reference_log_probs: (B, n, K, G) of the reference policy; None leaves out L_kl.
        coefficients: coefficients at the optimizer step. Default: those at the first step.

    Raises:
        FloatingPointError: the loss is not finite; the message names its parts.
    """
    rl = policy_gradient_loss(rollout_log_probs, advantages, layout)
    weights = coefficients or coefficients_at(settings, 0, 0)
    loss, ce, kl = weights.rl * rl, None, None
    if document_log_probs is not None:
        ce = cross_entropy(document_log_probs, layout.documents)
        loss = loss + weights.ce * ce
    if reference_log_probs is not None:
        penalty = kl_penalty(rollout_log_probs, reference_log_probs, settings.kl_estimator)
        kl = per_rollout_token_mean(penalty, layout)
        loss = loss + weights.kl * kl
    _require_finite(loss, {"rl_loss": rl, "ce_loss": ce, "kl": kl})
    return Objective(loss, rl, ce, kl, weights)


def per_rollout_token_mean(values: Tensor, layout: PackedLayout) -> Tensor:
    """Mean over each document's rollout tokens, then over the batch's documents.

    Args:
        values: (B, n, K, G), a value for each rollout token.

    Returns:
        A scalar; documents without blocks count as zero.
    """
    blocks = layout.blocks
    per_block = torch.where(blocks.exists, values.mean(dim=(1, 3)), 0.0) * blocks.weights
    return (per_block / blocks.per_document().clamp(min=1)).sum() / layout.documents.count


def policy_gradient_loss(log_probs: Tensor, advantages: Tensor, layout: PackedLayout) -> Tensor:
    """REINFORCE: `-mean(advantage * log p(token))` per document, averaged over documents.

    Its gradient is the policy gradient of the expected reward; its value has no meaning.

    Args:
        log_probs: (B, n, K, G), with gradient.
        advantages: (B, n, K), or (B, n, K, G) if each token has its own; used without gradient.
    """
    weights = advantages.detach()
    weights = weights if weights.dim() == log_probs.dim() else weights[..., None]
    return per_rollout_token_mean(-weights * log_probs, layout)


def cross_entropy(document_log_probs: Tensor, documents: Documents) -> Tensor:
    """Mean of `-log p` over each document's targets, then over the batch's documents.

    Args:
        document_log_probs: (B, S), zero for tokens that are not targets.
        documents: the documents of the batch.
    """
    slot = documents.document.clamp(min=0)
    targets = predicted_targets(documents)
    empty = torch.zeros_like(document_log_probs)
    per_document = empty.scatter_add(1, slot, torch.where(targets, -document_log_probs, 0.0))
    counts = empty.scatter_add(1, slot, targets.to(empty.dtype))
    return (per_document / counts.clamp(min=1)).sum() / documents.count


def kl_penalty(log_probs: Tensor, reference_log_probs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    With r = log p_ref - log p: k1 = -r, k2 = r^2 / 2, k3 = exp(r) - 1 - r (J. Schulman,
    "Approximating KL divergence", 2020). Gradients: that of k2's value is unbiased for the KL of
    the token's distribution, that of k3's value is not. That of k1's value has mean zero, so k1
    has the score-function gradient `-r * grad log p` instead, which is unbiased, too.

    Args:
        log_probs: (B, n, K, G), with gradient.
        reference_log_probs: (B, n, K, G).
        estimator: `k1`, `k2` or `k3`.

    Raises:
        ValueError: the estimator is unknown.
    """
    log_ratio = reference_log_probs - log_probs
    if estimator == "k1":
        value = -log_ratio.detach()
        return value + value * (log_probs - log_probs.detach())
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return log_ratio.exp() - 1 - log_ratio
    raise ValueError(f"kl_estimator={estimator!r} is unknown; choose one of k1, k2, k3.")


def _require_finite(loss: Tensor, parts: dict[str, Tensor | None]) -> None:
    """Raise a FloatingPointError if the loss is NaN or infinite; it lists the loss's parts."""
    if bool(torch.isfinite(loss)):
        return
    listed = ", ".join(f"{name}={part.item()}" for name, part in parts.items() if part is not None)
    raise FloatingPointError(
        f"The loss is {loss.item()} ({listed}), so training has diverged. The last checkpoint is "
        "intact; lower learning_rate, raise warmup_steps or set max_grad_norm, and replace fp16 by "
        "bf16."
    )
