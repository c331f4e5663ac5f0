"""Gives rollouts with equal tokens equal features, whatever kernels round.

In bfloat16, the features of two rollouts with the same tokens can differ by some 1e-4, since a
kernel may sum in a different order at another place of the row. Whitening would treat that
difference as a direction of its own and miss the duplicate.

Dimension letters: B rows of the batch, n rollouts per block, K blocks, G tokens of a rollout, D
feature width. A group is the n rollouts of one block.
"""

from torch import Tensor


def first_equal_rollouts(tokens: Tensor) -> Tensor:
    """For each rollout, the first one of its group that has the same tokens.

    Args:
        tokens: (B, n, K, G) of any integer dtype. Sequences of different lengths can be given with
            G = 1 and one number per sequence that is equal for equal sequences only.

    Returns:
        (B, n, K) int64, indices along n; a rollout without an earlier equal one gets its own index.
    """
    # For each j, the first j' that equals it: argmax returns the first of equal values.
    equal_BnnK = (tokens[:, :, None] == tokens[:, None]).all(dim=-1)
    return equal_BnnK.int().argmax(dim=2)


def with_equal_features(features: Tensor, first: Tensor) -> Tensor:
    """Give every rollout the features of the first one that equals it.

    Args:
        features: (B, n, K, D) of the rollouts, as computed.
        first: (B, n, K) int64, from `first_equal_rollouts`.

    Returns:
        (B, n, K, D): the same bits for equal rollouts; features of other rollouts are unchanged.
    """
    return features.gather(1, first[..., None].expand_as(features))
