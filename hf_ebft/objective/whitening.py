"""Whitening of features: each group by its own rollouts, or all by the moments of training text.

**By group.** Let X (n, D) be the rollouts of a group and X = U diag(s) Vt. Singular values below a
tolerance times the largest one count as zero, and so do their inverses. The whitened rollouts are
X V diag(1/s) Vt = U Vt. They are orthonormal if all rollouts differ (and n <= D), and m equal
rollouts have dot products of 1/m with each other. So after whitening, the diversity term penalises
duplicates only.

U and s come from the n x n Gram matrix X Xt = U diag(s^2) Ut, not from an SVD of X. That costs two
products with X and one batched n x n eigenproblem; the SVD of a wide matrix would cost a QR
factorisation per group. Squaring halves the number of correct digits, so the Gram matrix is
float64: it resolves s down to about 1e-8 of the largest one. This is well below the tolerance, and
below what float32 features can distinguish from zero (6e-8).

**By corpus.** The feature network is frozen, so the second moment of its features over the training
text is a constant of the run. Whitening by it (`CorpusWhitening`) is one fixed map of features, the
same for every group and step. It reduces the directions that all features share, and the diversity
term still measures how much rollouts differ, not only how many are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ebft.config import (
    DEFAULT_TOLERANCE,
    GROUP_WHITENING_SPACES,
    SMALLEST_TOLERANCE,
    GroupWhiteningSpace,
)

# Groups are whitened in slices of at most this many feature values, 16 MiB as float64: a float64
# copy of everything would need more memory than the features themselves, and is slower.
_SLICE_VALUES = 2**21


class Whitened(NamedTuple):
    """Whitened features of all groups."""

    generated: Tensor  # (..., n, D)
    ground_truth: Tensor  # (..., D) in feature space, (..., n, D) in sample space


def whiten(
    generated: Tensor,
    ground_truth: Tensor,
    *,
    space: GroupWhiteningSpace = "feature",
    tolerance: float = DEFAULT_TOLERANCE,
) -> Whitened:
    """Whiten every group by its own rollouts.

    - `feature` (the paper's equation): X and y are multiplied from the right by V diag(1/s) Vt.
      The D x D matrix is never formed: y V diag(1/s) Vt = Xt U diag(1/s^3) Ut (X y).
    - `sample` (the released code): X is multiplied from the left by P = U diag(1/s) Ut, an n x n
      matrix; row j of the whitened ground truth is (P 1)_j * y.

    The result is finite for degenerate groups (duplicated rollouts, fewer dimensions than rollouts,
    zero features). A group that contains a NaN or an infinity becomes NaN; other groups are not
    affected.

    Args:
        generated: (..., n, D), features of the rollouts of each group.
        ground_truth: (..., D), features of the ground truth, one per group.
        space: one of `GROUP_WHITENING_SPACES`.
        tolerance: singular values below `tolerance` times the largest of their group count as zero.

    Returns:
        `Whitened`, on the device of `generated`, float32 (float64 if an input is float64).

    Raises:
        ValueError: the space is unknown, the tolerance is outside [1e-6, 1), or shapes do not fit.
    """
    if space not in GROUP_WHITENING_SPACES:
        raise ValueError(
            f"whitening_space={space!r} is unknown: "
            f"use one of {', '.join(map(repr, GROUP_WHITENING_SPACES))}"
        )
    if not SMALLEST_TOLERANCE <= tolerance < 1:
        raise ValueError(
            f"whitening_tolerance={tolerance} must be at least {SMALLEST_TOLERANCE} (below that "
            "the rounding of float32 features would be amplified) and below 1"
        )
    if generated.dim() < 2 or ground_truth.shape != generated.shape[:-2] + generated.shape[-1:]:
        raise ValueError(
            "whiten needs generated of shape (..., n, D) and ground_truth of shape (..., D), got "
            f"{tuple(generated.shape)} and {tuple(ground_truth.shape)}"
        )
    n_rollouts, width = generated.shape[-2:]
    dtype = torch.promote_types(
        torch.promote_types(generated.dtype, ground_truth.dtype), torch.float32
    )
    # Q groups
    x_QnD = generated.reshape(-1, n_rollouts, width)
    y_QD = ground_truth.reshape(-1, width)
    whitened_x_QnD = torch.empty_like(x_QnD, dtype=dtype)
    y_shape = x_QnD.shape if space == "sample" else y_QD.shape
    whitened_y = torch.empty(y_shape, dtype=dtype, device=generated.device)

    slice_groups = max(1, _SLICE_VALUES // max(1, n_rollouts * width))
    for start in range(0, len(x_QnD), slice_groups):
        group = slice(start, start + slice_groups)
        whitened_x, y = _whiten_slice(x_QnD[group], y_QD[group], space, tolerance)
        whitened_x_QnD[group] = whitened_x
        whitened_y[group] = y
    return Whitened(
        whitened_x_QnD.reshape(generated.shape),
        whitened_y.reshape(generated.shape if space == "sample" else ground_truth.shape),
    )


def _whiten_slice(
    x_QnD: Tensor, y_QD: Tensor, space: GroupWhiteningSpace, tolerance: float
) -> tuple[Tensor, Tensor]:
    """`whiten` for a few groups, in float64 throughout.

    Not only the Gram matrix needs it: P has entries up to 1 / (tolerance * largest s), and P X
    cancels almost all of their size.
    """
    device = _float64_device(x_QnD.device)
    x_QnD = x_QnD.to(device, torch.float64)
    y_QD1 = y_QD.to(device, torch.float64).unsqueeze(-1)

    gram_Qnn = x_QnD @ x_QnD.mT
    finite_Q11 = gram_Qnn.isfinite().all(dim=(-2, -1), keepdim=True)
    eigenvalues_Qn, u_Qnn = torch.linalg.eigh(gram_Qnn.where(finite_Q11, 0.0))  # ascending
    s_Qn = eigenvalues_Qn.clamp(min=0).sqrt()
    kept_Qn = s_Qn > tolerance * s_Qn[..., -1:]
    # The inner `where` avoids computing 1 / 0.
    inverse_Qn = torch.where(kept_Qn, 1 / torch.where(kept_Qn, s_Qn, 1.0), 0.0)
    inverse_Qn1 = inverse_Qn.unsqueeze(-1).where(finite_Q11, torch.nan)
    p_Qnn = u_Qnn @ (inverse_Qn1 * u_Qnn.mT)

    if space == "sample":
        return p_Qnn @ x_QnD, p_Qnn.sum(-1, keepdim=True) * y_QD1.mT
    # The factors are applied one after the other: entries of U diag(1/s^3) Ut reach 1e15, and
    # forming that matrix would lose the small terms to rounding.
    weights_Qn1 = u_Qnn @ (inverse_Qn1**3 * (u_Qnn.mT @ (x_QnD @ y_QD1)))
    whitened_Qn1D = torch.cat((p_Qnn, weights_Qn1.mT), dim=-2) @ x_QnD
    return whitened_Qn1D[:, :-1], whitened_Qn1D[:, -1]


@dataclass(frozen=True)
class CorpusWhitening:
    """A fixed map of features that evens out their second moment and keeps their norms.

    With C = E[phi phi^T] over a corpus and a shrinkage s in (0, 1],

        M  = (1 - s) C + s tr(C) / D I
        x' = ||x|| M^(-1/2) x / ||M^(-1/2) x||

    Shrinking towards the identity has two effects. A direction that the corpus hardly uses is
    amplified at most 1 / sqrt(s) times as much as one of mean variance. And M is invertible even
    if there are fewer features than dimensions. With s = 1, or if C is a multiple of the identity,
    x' = x.

    Every feature keeps its own norm (1 for unpooled features). So alignment and diversity stay on
    the scale that they have without whitening, a rare feature cannot outweigh all others of a
    batch, and the reward's cosine is a dot product. Since x' is a fixed function of x,
    `alignment - diversity` with unit features is the exact gradient direction of the CFM loss of
    the feature map phi', whose value is 1 - mean alignment + mean diversity / 2 at every step.

    Attributes:
        matrix: (D, D) float32, M^(-1/2) times sqrt(tr(C) / D), symmetric.
        shrinkage: s.
        effective_rank: tr(C)^2 / tr(C^2), the number of directions in which features vary, from 1
            to D.
    """

    matrix: Tensor
    shrinkage: float
    effective_rank: float

    @classmethod
    def from_second_moment(cls, second_moment: Tensor, shrinkage: float) -> CorpusWhitening:
        """Compute the whitening from a second moment, in float64.

        Args:
            second_moment: (D, D), C; symmetric and positive semidefinite up to rounding.
            shrinkage: s, in (0, 1].

        Returns:
            `CorpusWhitening` on the device of `second_moment`.

        Raises:
            ValueError: the second moment is not square, not finite or all zero, or the shrinkage is
                out of range.
        """
        if second_moment.dim() != 2 or second_moment.shape[0] != second_moment.shape[1]:
            raise ValueError(
                f"second_moment must be (D, D), got {tuple(second_moment.shape)}: pass X^T X / N "
                "for features X (N, D)"
            )
        if not 0.0 < shrinkage <= 1.0:
            raise ValueError(
                f"corpus_whitening_shrinkage={shrinkage} must lie in (0, 1]: 0 would divide by "
                "rounding errors in directions that no feature uses, and 1 means no whitening; the "
                "default is 0.1"
            )
        device = _float64_device(second_moment.device)
        c_DD = second_moment.to(device, torch.float64)
        c_DD = (c_DD + c_DD.mT) / 2
        mean = c_DD.diagonal().mean()
        if not bool(c_DD.isfinite().all()) or float(mean) <= 0:
            raise ValueError(
                f"second_moment has a mean diagonal of {float(mean):g}, but it must be positive "
                "and finite: the features are all zero or not finite, so check the feature network"
            )
        eigenvalues_D, u_DD = torch.linalg.eigh(c_DD / mean)  # their mean is 1
        shrunk_D = (1 - shrinkage) * eigenvalues_D.clamp(min=0) + shrinkage
        return cls(
            matrix=((u_DD * shrunk_D.rsqrt()) @ u_DD.mT).float().to(second_moment.device),
            shrinkage=shrinkage,
            effective_rank=float(len(eigenvalues_D) ** 2 / eigenvalues_D.square().sum()),
        )

    def apply(self, features: Tensor) -> Tensor:
        """Whiten features, of rollouts as well as of ground truths.

        Args:
            features: (..., D), float32 or wider.

        Returns:
            (..., D) in the dtype and with the norms of `features`; zero features stay zero.

        Raises:
            ValueError: the features of the corpus had another width.
        """
        width = self.matrix.shape[0]
        if features.shape[-1] != width:
            raise ValueError(
                f"features have width {features.shape[-1]}, but those of the corpus had width "
                f"{width}: whitening and features must come from one feature network, with the "
                "same feature_layers and embed_method"
            )
        # Autocast would round to half precision. TF32, if the user allowed it, rounds no more than
        # a bfloat16 feature network has done already.
        with torch.autocast(features.device.type, enabled=False):
            mapped = features @ self.matrix.to(features.device, features.dtype)
        norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
        return mapped * (norm / torch.linalg.vector_norm(mapped, dim=-1, keepdim=True).clamp(1e-30))


def _float64_device(device: torch.device) -> torch.device:
    """`device`, or the CPU where it has no float64 (Apple's MPS)."""
    return torch.device("cpu") if device.type == "mps" else device
