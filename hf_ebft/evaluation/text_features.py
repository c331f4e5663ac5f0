"""Features of any texts, by plain forward passes, and measurements of groups of them.

Dimension letters: N continuations, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_ebft.config import EmbedMethod, FeatureNormalization
from hf_ebft.objective.features import normalize_layers, pool, token_positions
from hf_ebft.objective.rewards import feature_matching_rewards
from hf_ebft.packed.forward import evaluation_mode


def embed_continuations(
    model: nn.Module,
    prefix: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    feature_layers: Sequence[float] = (0.25, 0.5, 0.75),
    embed_method: EmbedMethod = "last_token",
    normalization: FeatureNormalization = "per_layer",
) -> Tensor:
    """Features of continuations of one prefix, as the feature network of training gives them.

    Args:
        model: the feature network, a causal language model.
        prefix: token ids; may be empty.
        continuations: token ids of each, of any lengths, at least 1.
        feature_layers, embed_method, normalization: as in training.

    Returns:
        (N, D) float32, on the model's device.

    Raises:
        ValueError: no continuations, or an empty one.
    """
    if not continuations or not all(continuations):
        raise ValueError("There is an empty continuation, or none: each needs at least one token.")
    device = next(model.parameters()).device
    embedded = []
    with evaluation_mode(model):
        # One after the other: padding would need position ids, which not every model takes.
        for ids in continuations:
            whole = torch.tensor([[*prefix, *ids]], device=device)
            states = model(whole, output_hidden_states=True, use_cache=False).hidden_states
            places = [len(prefix) + place for place in token_positions(embed_method, len(ids))]
            layers = [states[int(depth * (len(states) - 1))][0, places] for depth in feature_layers]
            embedded.append(pool(normalize_layers(layers, normalization), embed_method))
    return torch.stack(embedded)


def mean_group_metrics(groups: Iterable[tuple[Tensor, Tensor]], **options: Any) -> dict[str, float]:
    """CFM loss, its terms and the energy score, means over groups of any sizes.

    Args:
        groups: features of n rollouts (n, D), and of their ground truth (D,), for each prefix.
        **options: of `feature_matching_rewards`; not whitened unless they say so.

    Returns:
        `cfm_loss`, `energy_score`, `alignment`, `diversity`, `reward`, and `reward_best`, the
        mean of the best reward of each group.

    Raises:
        ValueError: no groups.
    """
    options = {"use_whitening": False} | options
    found = []
    for generated, truth in groups:
        rewards = feature_matching_rewards(generated[None, :, None], truth[None, None], **options)
        found.append(
            {
                "cfm_loss": float(rewards.cfm_loss.mean()),
                "energy_score": float(rewards.energy_score.mean()),
                "alignment": float(rewards.alignment.mean()),
                "diversity": float(rewards.diversity.mean()),
                "reward": float(rewards.reward.mean()),
                "reward_best": float(rewards.reward.max()),
            }
        )
    if not found:
        raise ValueError("There are no groups of rollouts to take a mean over.")
    return {name: sum(group[name] for group in found) / len(found) for name in found[0]}
