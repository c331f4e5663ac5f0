"""Expected value of a vector per token, under the policy's distribution at each rollout token.

Dimension letters: B rows of the batch, n samples, K blocks, G rollout length, P tokens whose states
are kept, V vocabulary, r width of the averaged vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_ebft.packed.drawing import nucleus, token_probabilities
from hf_ebft.packed.forward import PackedForward, evaluation_mode
from hf_ebft.packed.heads import ToLogits
from hf_ebft.packed.sampling import Rollouts
from hf_ebft.packed.targets import KeptPlaces


def expected_over_tokens(
    model: nn.Module,
    forward: PackedForward,
    rollouts: Rollouts,
    table: Tensor,
    *,
    temperature: float,
    top_p: float,
    chunk_size: int,
) -> Tensor:
    """Average a table of token vectors over the distribution from which each token was drawn.

    It makes one forward pass in evaluation mode, without gradient.

    Args:
        model: the policy.
        forward: how the policy runs packed rows.
        rollouts: the batch and its sampled tokens.
        table: (V, r), one vector per token, on the policy's device. Tokens beyond the table count
            as zero vectors.
        temperature, top_p: settings with which the rollouts were sampled.
        chunk_size: rows of logits that exist at once.

    Returns:
        (B, n, K, G, r) float32: at t, the sum over tokens a of p(a | prefix, own tokens before t)
        times the vector of a.
    """
    layout = rollouts.layout
    part = layout.predicting_part
    kept = KeptPlaces.for_layout(layout, whole_document=False, part=part)

    def average(states: Tensor, to_logits: ToLogits) -> list[Tensor]:
        means = []
        for chunk in states.flatten(0, 1).split(chunk_size):
            p = nucleus(token_probabilities(to_logits(chunk), temperature), top_p)
            known = min(p.shape[1], len(table))
            with torch.autocast(p.device.type, enabled=False):
                means.append(p[:, :known] @ table[:known])
        return [torch.cat(means).unflatten(0, states.shape[:2])]

    with evaluation_mode(model):
        (by_place,) = forward.through_head(
            model, rollouts.input_ids(part), part, part.index_of[kept.places], average
        )
    rows = torch.arange(len(by_place), device=by_place.device)[:, None, None, None]
    return by_place[rows, kept.index_of[layout.predictor]]
