"""Features of a rollout: normalised and pooled hidden states (pure functions of tensors).

Dimension letters: m feature layers, H hidden width, F = m * H width of a token's feature,
G tokens of a block, T of them that a pooling reads, D width of a block's feature
(F, or 3 * F for `concat`). `...` stands for any leading dimensions, (B, n, K) for rollouts.

A feature has at most unit norm, whatever the number of layers or of pooled positions, so that
alignment and diversity keep their scale when these settings change.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ebft.config import (
    FEATURE_NORMALIZATIONS,
    STRIDED_EMBED_METHODS,
    EmbedMethod,
    FeatureNormalization,
)


def normalize_layers(
    hidden: Sequence[Tensor] | Tensor, normalization: FeatureNormalization = "per_layer"
) -> Tensor:
    """Join the hidden states of the feature layers into one unit vector per token.

    - `per_layer`: each layer is L2-normalised separately, then the layers are concatenated and
      divided by sqrt(m). So all layers have the same weight, although the hidden states of deep
      layers are often much larger.
    - `joint`: the layers are concatenated and then normalised once.

    Args:
        hidden: the m layers, each (..., H) and of any floating dtype: a sequence, or a tensor
            whose first dimension is the layer.
        normalization: one of `FEATURE_NORMALIZATIONS`.

    Returns:
        (..., m * H) float32. Unit norm; a token whose states are all zero stays zero, and under
        `per_layer` a zero layer contributes zeros (the norm is then below 1).

    Raises:
        ValueError: there are no layers, their shapes differ, or `normalization` is unknown.
    """
    layers = [layer.float() for layer in hidden]
    if not layers:
        raise ValueError("hidden has no layers: pass the hidden states of at least one layer")
    shapes = [tuple(layer.shape) for layer in layers]
    if len(set(shapes)) > 1:
        raise ValueError(f"the feature layers must have one shape (..., H), got {shapes}")
    if normalization == "per_layer":
        unit_layers = [F.normalize(layer, dim=-1) for layer in layers]
        return torch.cat(unit_layers, dim=-1) / math.sqrt(len(layers))
    if normalization == "joint":
        return F.normalize(torch.cat(layers, dim=-1), dim=-1)
    raise ValueError(
        f"feature_normalization={normalization!r} is unknown: "
        f"use one of {', '.join(map(repr, FEATURE_NORMALIZATIONS))}"
    )


def token_positions(embed_method: EmbedMethod, length: int) -> list[int]:
    """The tokens of a block that a pooling reads; only their hidden states need to be kept.

    Args:
        embed_method: one of `STRIDED_EMBED_METHODS`.
        length: G, the tokens of a block, at least 1.

    Returns:
        T ascending positions in [0, G): the last one, all of them, or those at 25 %, 50 % and 75 %
        of the length (floor(fraction * G); they may repeat when G < 4).

    Raises:
        ValueError: `length` is below 1, or the method does not pool fixed positions.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1: a block needs a token to pool")
    if embed_method == "last_token":
        return [length - 1]
    if embed_method == "mean_pooling":
        return list(range(length))
    if embed_method == "concat":
        return [quarter * length // 4 for quarter in (1, 2, 3)]
    raise _embed_method_error(embed_method)


def pool(tokens: Tensor, embed_method: EmbedMethod) -> Tensor:
    """Pool token features into the feature of a block.

    - `last_token`: the token itself.
    - `mean_pooling`: the mean over the block. It is not normalised again: its norm is at most 1,
      and is larger the more the tokens agree.
    - `concat`: the three tokens concatenated and divided by sqrt(3), so that unit token features
      give a unit feature, and rewards stay on the scale of the other methods.

    Args:
        tokens: (..., T, F), the features at the positions of `token_positions`.
        embed_method: one of `STRIDED_EMBED_METHODS`.

    Returns:
        (..., D) in the dtype of `tokens`, with D = 3 * F for `concat` and F otherwise.

    Raises:
        ValueError: T does not fit the method, or the method does not pool fixed positions.
    """
    if embed_method not in STRIDED_EMBED_METHODS:
        raise _embed_method_error(embed_method)
    n_tokens = tokens.shape[-2]
    expected = {"last_token": 1, "concat": 3}.get(embed_method, max(n_tokens, 1))
    if n_tokens != expected:
        raise ValueError(
            f"embed_method={embed_method!r} pools {expected} token(s), got {n_tokens} in tokens of "
            f"shape {tuple(tokens.shape)}: pass the features at token_positions(embed_method, G)"
        )
    if embed_method == "last_token":
        return tokens.squeeze(-2)
    if embed_method == "mean_pooling":
        return tokens.mean(dim=-2)
    return tokens.flatten(start_dim=-2) / math.sqrt(n_tokens)


def _embed_method_error(embed_method: str) -> ValueError:
    valid = ", ".join(map(repr, STRIDED_EMBED_METHODS))
    if embed_method == "completion_mean":
        return ValueError(
            "embed_method='completion_mean' averages completions of different lengths and exists "
            f"in structured mode only: in strided mode use one of {valid}"
        )
    return ValueError(f"embed_method={embed_method!r} is unknown: use one of {valid}")
