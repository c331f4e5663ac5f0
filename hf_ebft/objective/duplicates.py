"""Equal rollouts have equal features: decided by their tokens, whatever a kernel rounds.

In bfloat16 the features of rollouts with the same tokens can come out some 1e-4 apart, since a
kernel may add up in another order at another place of the row. Whitening would take that for a
direction of its own and miss the duplicate.

Dimension letters: B rows of the batch, n rollouts per block, K blocks, G tokens of a rollout, D
feature width. A group is the n rollouts of one block.
"""

from torch import Tensor


def first_equal_rollouts(tokens: Tensor) -> Tensor:
    """For each rollout, the first one of its group that has the same tokens.

    Args:
        tokens: (B, n, K, G) of any integer dtype. Sequences of different lengths can be given as
            one number each that tells them apart, with G = 1.

    Returns:
        (B, n, K) int64, indices along n; a rollout without an earlier equal one gets its own.
    """
    # Of pairs (j, j'), the first j' that equals j: argmax finds the first of equal values.
    equal_BnnK = (tokens[:, :, None] == tokens[:, None]).all(dim=-1)
    return equal_BnnK.int().argmax(dim=2)


def with_equal_features(features: Tensor, first: Tensor) -> Tensor:
    """Give every rollout the features of the first one that equals it.

    Args:
        features: (B, n, K, D) of the rollouts, as computed.
        first: (B, n, K) int64, from `first_equal_rollouts`.

    Returns:
        (B, n, K, D): the same bits for equal rollouts; those of others are left as they are.
    """
    return features.gather(1, first[..., None].expand_as(features))
