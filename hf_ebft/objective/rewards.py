"""Feature-matching rewards of rollouts and the conditional feature-matching (CFM) loss.

Dimension letters: B rows of the batch, n rollouts per block, K blocks, D feature width. A group is
the n rollouts of one block (b, k) together with its ground truth.

All reductions are elementwise products and sums in float32. Matrix products are avoided: an
enclosing autocast region would compute them in half precision, and TF32 with 10 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_ebft.config import DEFAULT_TOLERANCE, WHITENING_SPACES, WhiteningSpace
from hf_ebft.objective.scoring import cfm_loss, energy_score, excess_over_spread
from hf_ebft.objective.whitening import CorpusWhitening, whiten

if TYPE_CHECKING:
    from hf_ebft.config import FeatureMatchingArguments

# Features and whitened features have norms of order 1. A vector as short as this is zero up to
# rounding, and its direction means nothing.
_ZERO_NORM = 1e-8


@dataclass(frozen=True)
class Rewards:
    """Rewards of rollouts, their parts, and the coefficients that the advantages need."""

    reward: Tensor  # (B, n, K), alignment_coef * alignment - diversity_coef * diversity
    alignment: Tensor  # (B, n, K), 2 * cosine with the ground truth: in [-2, 2]
    diversity: Tensor  # (B, n, K), 2 * mean dot product with the group's other rollouts
    cfm_loss: Tensor  # (B, K)
    excess_over_spread: Tensor  # (B, K)
    energy_score: Tensor  # (B, K)
    alignment_coef: float
    diversity_coef: float


def feature_matching_rewards(
    generated: Tensor,
    ground_truth: Tensor,
    *,
    alignment_coef: float = 1.0,
    diversity_coef: float = 1.0,
    use_whitening: bool = True,
    whitening_space: WhiteningSpace = "feature",
    whitening_tolerance: float = DEFAULT_TOLERANCE,
    corpus_whitening: CorpusWhitening | None = None,
) -> Rewards:
    """Reward rollouts whose features resemble the ground truth's and differ from each other's.

    With x_j the feature of rollout j of a group and y that of its ground truth, whitened if
    `use_whitening` (paper eq. 7 and 49):

        alignment_j = 2 cos(x_j, y)
        diversity_j = 2 / (n - 1) * sum over j' != j of x_j . x_j'      (0 for n = 1)
        reward_j    = alignment_coef * alignment_j - diversity_coef * diversity_j

    Without whitening, with unit features and both coefficients 1, the mean over j of
    reward_j * grad log p(rollout j) is an unbiased estimate of minus the gradient of the CFM loss.
    With whitening by group, n different rollouts in at least n dimensions have diversity 0: the
    term then penalises duplicates only. Whitening by corpus is a fixed map of features, so there
    the mean above is again an unbiased gradient estimate, for the CFM loss of the mapped features.

    The CFM loss ||E[x] - y||^2 (paper eq. 2), the excess over the policy's own spread and the
    energy score (`hf_ebft.objective.scoring`) are computed from the unwhitened features, so that
    they can be compared across steps and runs.

    Args:
        generated: (B, n, K, D) normalised features of the rollouts, any floating dtype.
        ground_truth: (B, K, D) normalised features of the ground-truth windows.
        alignment_coef: weight of the alignment term.
        diversity_coef: weight of the diversity term.
        use_whitening: whiten features first (`hf_ebft.objective.whitening`).
        whitening_space: "feature" or "sample" whiten each group by its own rollouts; "corpus"
            whitens all groups by `corpus_whitening`.
        whitening_tolerance: in whitening by group, singular values below this times the largest
            one count as zero.
        corpus_whitening: the whitening of `whitening_space="corpus"`.

    Returns:
        `Rewards` in float32 (float64 if an input is float64).

    Raises:
        ValueError: shapes do not fit, n or D is 0, features are not floating point,
            `whitening_space` is unknown, or is "corpus" without `corpus_whitening`.
    """
    _check_features(generated, ground_truth)
    _check_space(whitening_space, missing=use_whitening and corpus_whitening is None)
    dtype = torch.promote_types(generated.dtype, ground_truth.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    # A group's rollouts side by side: (B, K, n, D).
    x_BKnD, y_BKD = generated.to(dtype).transpose(1, 2), ground_truth.to(dtype)
    scores_BK = {
        "cfm_loss": cfm_loss(x_BKnD, y_BKD),
        "excess_over_spread": excess_over_spread(x_BKnD, y_BKD),
        "energy_score": energy_score(x_BKnD, y_BKD),
    }

    y_BKnD = y_BKD.unsqueeze(2)  # all n rollouts share one ground truth
    if use_whitening and whitening_space == "corpus":
        assert corpus_whitening is not None  # checked above
        x_BKnD, y_BKnD = corpus_whitening.apply(x_BKnD), corpus_whitening.apply(y_BKnD)
    elif use_whitening and whitening_space != "corpus":
        white = whiten(x_BKnD, y_BKD, space=whitening_space, tolerance=whitening_tolerance)
        x_BKnD, y_BKnD = white.generated, white.ground_truth
        y_BKnD = y_BKnD if whitening_space == "sample" else y_BKnD.unsqueeze(2)

    alignment_BnK = 2 * _cosine(x_BKnD, y_BKnD).transpose(1, 2)
    diversity_BnK = _diversity(x_BKnD).transpose(1, 2)
    return Rewards(
        reward=alignment_coef * alignment_BnK - diversity_coef * diversity_BnK,
        alignment=alignment_BnK,
        diversity=diversity_BnK,
        alignment_coef=alignment_coef,
        diversity_coef=diversity_coef,
        **scores_BK,
    )


def _check_space(whitening_space: str, *, missing: bool) -> None:
    """Raise for an unknown space, or for "corpus" if its whitening is missing."""
    if whitening_space not in WHITENING_SPACES:
        raise ValueError(
            f"whitening_space={whitening_space!r} is unknown: "
            f"use one of {', '.join(map(repr, WHITENING_SPACES))}"
        )
    if whitening_space == "corpus" and missing:
        raise ValueError(
            "whitening_space='corpus' needs corpus_whitening, but none was given: measure it once "
            "on training text (hf_ebft.feature_network.corpus_whitening) and pass it, or whiten "
            "by group with whitening_space='feature'"
        )


def _cosine(x_BKnD: Tensor, y_BKnD: Tensor) -> Tensor:
    """Cosines along D, (B, K, n); 0 where either vector is zero up to rounding."""
    x_norm_BKn = torch.linalg.vector_norm(x_BKnD, dim=-1).clamp(min=_ZERO_NORM)
    y_norm_BKn = torch.linalg.vector_norm(y_BKnD, dim=-1).clamp(min=_ZERO_NORM)
    return _dot(x_BKnD, y_BKnD) / (x_norm_BKn * y_norm_BKn)


def _diversity(x_BKnD: Tensor) -> Tensor:
    """Twice the mean dot product of each rollout with the others of its group, (B, K, n)."""
    n_rollouts = x_BKnD.shape[2]
    if n_rollouts == 1:
        return torch.zeros_like(x_BKnD[..., 0])
    with_all_BKn = _dot(x_BKnD, x_BKnD.sum(dim=2, keepdim=True))
    with_itself_BKn = torch.linalg.vector_norm(x_BKnD, dim=-1).square()
    return 2 / (n_rollouts - 1) * (with_all_BKn - with_itself_BKn)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1)


def _check_features(generated: Tensor, ground_truth: Tensor) -> None:
    shapes = f"got {tuple(generated.shape)} and {tuple(ground_truth.shape)}"
    if generated.dim() != 4 or ground_truth.dim() != 3:
        raise ValueError(
            f"generated must be (B, n, K, D) and ground_truth (B, K, D), {shapes}: "
            "a single block is (1, n, 1, D) and (1, 1, D)"
        )
    n_documents, n_rollouts, n_blocks, width = generated.shape
    if tuple(ground_truth.shape) != (n_documents, n_blocks, width):
        raise ValueError(
            "generated (B, n, K, D) and ground_truth (B, K, D) must agree in B, K and D, "
            f"{shapes}; every rollout of a block shares one ground truth, so don't repeat it"
        )
    if n_rollouts == 0 or width == 0:
        raise ValueError(f"a group needs at least one rollout and one feature dimension, {shapes}")
    if not (generated.is_floating_point() and ground_truth.is_floating_point()):
        raise ValueError(
            f"features must be floating point, got {generated.dtype} and {ground_truth.dtype}: "
            "pass the features of the tokens, not the token ids"
        )


def rewards_from_settings(
    settings: FeatureMatchingArguments,
    generated: Tensor,
    ground_truth: Tensor,
    *,
    use_whitening: bool | None = None,
    corpus_whitening: CorpusWhitening | None = None,
) -> Rewards:
    """Call `feature_matching_rewards` with a run's settings.

    Args:
        settings: the coefficients and the whitening.
        generated, ground_truth, corpus_whitening: see `feature_matching_rewards`.
        use_whitening: replaces the value of the settings if given.
    """
    return feature_matching_rewards(
        generated,
        ground_truth,
        alignment_coef=settings.alignment_coef,
        diversity_coef=settings.diversity_coef,
        use_whitening=settings.use_whitening if use_whitening is None else use_whitening,
        whitening_space=settings.whitening_space,
        whitening_tolerance=settings.whitening_tolerance,
        corpus_whitening=corpus_whitening,
    )
