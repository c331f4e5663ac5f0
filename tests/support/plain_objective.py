"""Plain definitions of the objective's parts, one group at a time: whitening, rewards, metrics.

Dimension letters: n rollouts of a group, D feature width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ebft.objective.whitening import Whitened


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def whiten_by_svd(
    generated: Tensor, ground_truth: Tensor, space: str, tolerance: float = 1e-5
) -> Whitened:
    """The definition, one group (n, D) and (D,), in float64."""
    x, y = generated.double(), ground_truth.double()
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    inverse = torch.tensor(
        [1 / value if value > tolerance * s[0] else 0.0 for value in s.tolist()],
        dtype=torch.float64,
    )
    if space == "feature":
        w = vt.T @ torch.diag(inverse) @ vt
        return Whitened(x @ w, y @ w)
    p = u @ torch.diag(inverse) @ u.T
    return Whitened(p @ x, torch.outer(p.sum(dim=1), y))


def plain_group(x: Tensor, y: Tensor) -> dict[str, float]:
    """Metrics of one group: x (n, D) rollouts, y (D,) ground truth, all of unit norm."""
    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]

    def diversity(z: Tensor) -> float:
        return sum(2 * float(z[i] @ z[j]) for i, j in pairs) / len(pairs)

    white = whiten_by_svd(x, y, "feature")
    cosine = F.cosine_similarity(white.generated, white.ground_truth[None])
    # Features have unit norm only up to rounding, so nothing is made of it here.
    cfm_loss = sum(float((x[i] - y) @ (x[j] - y)) for i, j in pairs) / len(pairs)
    spread = sum(float((x[i] - x[j]) @ (x[i] - x[j])) / 2 for i, j in pairs) / len(pairs)
    apart = sum(math.dist(x[i].tolist(), x[j].tolist()) for i, j in pairs) / len(pairs)
    to_truth = sum(math.dist(row.tolist(), y.tolist()) for row in x) / n
    return {
        "cfm_loss": cfm_loss,
        "energy_score": to_truth - apart / 2,
        "excess_over_spread": cfm_loss - spread,
        "cosine_alignment": 2 * float((x @ y).mean()),
        "dot_diversity": diversity(x),
        "alignment": 2 * float(cosine.mean()),
        "diversity": diversity(white.generated),
    }
