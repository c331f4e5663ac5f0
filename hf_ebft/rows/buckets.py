"""Row widths and block counts rounded up to a few values, so that shapes repeat.

Code compiled for one shape, or a CUDA graph captured for it, serves every batch of that shape. The
distance between buckets can grow with the number: two neighbouring powers of two then have at most
four buckets between them, so that long rows also have few shapes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Buckets:
    """The values that a number may be rounded up to; all are multiples of `least`.

    Attributes:
        least: the smallest value, and the smallest distance between neighbouring values. It must be
            a power of two if `grows`.
        grows: if True, the distance near a number is a quarter of the next power of two (at least
            `least`). If False, the distance is always `least`.
    """

    least: int = 1
    grows: bool = False

    def __post_init__(self) -> None:
        assert not self.grows or self.least & (self.least - 1) == 0, "else buckets would not nest"

    def round_up(self, number: int) -> int:
        """The smallest bucket that is at least `number`.

        Args:
            number: 1 or more.
        """
        step = self.least
        if self.grows:
            step = max(step, (1 << (number - 1).bit_length()) // 4)
        return -(-number // step) * step


EXACT = Buckets()
# Defaults for the tokens of a row and for its blocks. 128 is the tile of flex_attention's kernels.
TOKENS, BLOCKS = Buckets(128, grows=True), Buckets(8, grows=True)


def buckets_for(
    pad_to_multiple_of: int | None, stride: int, *, static_shapes: bool
) -> tuple[Buckets, Buckets]:
    """Choose the buckets for a row's tokens and for its blocks.

    Args:
        pad_to_multiple_of: the user's setting. Token counts become multiples of it, and block
            counts become multiples of the number of blocks in that many tokens. None: choose by
            `static_shapes`.
        stride: tokens between the starts of neighbouring blocks.
        static_shapes: whether code is compiled for each new shape, so that every shape costs time.

    Returns:
        Buckets for tokens, and buckets for blocks.
    """
    if pad_to_multiple_of is not None:
        return Buckets(pad_to_multiple_of), Buckets(max(1, pad_to_multiple_of // stride))
    return (TOKENS, BLOCKS) if static_shapes else (EXACT, EXACT)
