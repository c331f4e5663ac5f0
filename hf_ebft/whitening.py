"""Whitening of the features of one group: its n rollouts and their ground truth.

With X (n, D) the rollouts of a group and X = U diag(s) Vt, singular values below a tolerance times
the largest one counting as zero (their inverse too), whitened rollouts are X V diag(1/s) Vt = U Vt.
Their rows are orthonormal when all rollouts differ (and n <= D), and m equal rollouts have dot
products of 1/m among each other: after whitening the diversity term penalises duplicates and
nothing else.

U and s come from the n x n Gram matrix X Xt = U diag(s^2) Ut rather than from an SVD of X. That
costs two products with X and one batched n x n eigenproblem, where the SVD of a wide matrix costs
a QR factorisation per group. Squaring halves the digits, so the Gram matrix is float64: it resolves
s down to about 1e-8 of the largest, well below the tolerance, and below what float32 features can
tell from zero (6e-8).
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

WhiteningSpace = Literal["feature", "sample"]
WHITENING_SPACES: tuple[WhiteningSpace, ...] = get_args(WhiteningSpace)

DEFAULT_TOLERANCE = 1e-5
# Rounding of a float64 Gram matrix leaves null singular values at up to about sqrt(n) * 1.5e-8 of
# the largest: a smaller tolerance would invert noise.
SMALLEST_TOLERANCE = 1e-6
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
    space: WhiteningSpace = "feature",
    tolerance: float = DEFAULT_TOLERANCE,
) -> Whitened:
    """Whiten every group with its own rollouts.

    - `feature` (the paper's equation): X and y are multiplied from the right by V diag(1/s) Vt.
      The D x D matrix is never formed: y V diag(1/s) Vt = Xt U diag(1/s^3) Ut (X y).
    - `sample` (the released code): X is multiplied from the left by P = U diag(1/s) Ut, an n x n
      matrix; row j of the whitened ground truth is (P 1)_j * y.

    Degenerate groups (duplicated rollouts, fewer dimensions than rollouts, zero features) are
    finite. A group that contains a NaN or an infinity becomes NaN, other groups don't notice.

    Args:
        generated: (..., n, D), the rollouts of each group.
        ground_truth: (..., D), one per group.
        space: one of `WHITENING_SPACES`.
        tolerance: singular values below `tolerance` times the largest of their group count as zero.

    Returns:
        `Whitened`, on the device of `generated`, float32 (float64 if an input is float64).

    Raises:
        ValueError: an unknown space, a tolerance outside [1e-6, 1), or shapes that do not fit.
    """
    if space not in WHITENING_SPACES:
        raise ValueError(
            f"whitening_space={space!r} is unknown: "
            f"use one of {', '.join(map(repr, WHITENING_SPACES))}"
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
    x_QnD: Tensor, y_QD: Tensor, space: WhiteningSpace, tolerance: float
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
    # The inner `where` keeps 1 / 0 from appearing at all.
    inverse_Qn = torch.where(kept_Qn, 1 / torch.where(kept_Qn, s_Qn, 1.0), 0.0)
    inverse_Qn1 = inverse_Qn.unsqueeze(-1).where(finite_Q11, torch.nan)
    p_Qnn = u_Qnn @ (inverse_Qn1 * u_Qnn.mT)

    if space == "sample":
        return p_Qnn @ x_QnD, p_Qnn.sum(-1, keepdim=True) * y_QD1.mT
    # The factors are applied one after the other: entries of U diag(1/s^3) Ut reach 1e15, and
    # adding those up first would lose the small ones.
    weights_Qn1 = u_Qnn @ (inverse_Qn1**3 * (u_Qnn.mT @ (x_QnD @ y_QD1)))
    whitened_Qn1D = torch.cat((p_Qnn, weights_Qn1.mT), dim=-2) @ x_QnD
    return whitened_Qn1D[:, :-1], whitened_Qn1D[:, -1]


def _float64_device(device: torch.device) -> torch.device:
    """`device`, or the CPU where it has no float64 (Apple's MPS)."""
    return torch.device("cpu") if device.type == "mps" else device
