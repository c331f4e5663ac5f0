"""Widths and numbers of blocks, rounded up to few values, so that shapes repeat.

What is compiled for one shape, or captured in a graph, serves every batch of that shape. Steps
grow with the number: four to each power of two, so that long rows have few shapes, too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Buckets:
    """Numbers that others are rounded up to: `least` and its multiples, ever further apart.

    Attributes:
        least: the smallest of them, and the smallest step; a power of two if steps grow.
        grows: whether steps grow to a quarter of the next power of two; else all are `least`.
    """

    least: int = 1
    grows: bool = False

    def __post_init__(self) -> None:
        assert not self.grows or self.least & (self.least - 1) == 0, "else buckets would not nest"

    def round_up(self, number: int) -> int:
        """The first bucket that is no smaller than a number of at least 1."""
        step = self.least
        if self.grows:
            step = max(step, (1 << (number - 1).bit_length()) // 4)
        return -(-number // step) * step


EXACT = Buckets()
# Where nothing else is asked for: tokens of a row (the tile of flex_attention's kernels), and
# blocks.
TOKENS, BLOCKS = Buckets(128, grows=True), Buckets(8, grows=True)


def buckets_for(
    pad_to_multiple_of: int | None, stride: int, *, static_shapes: bool
) -> tuple[Buckets, Buckets]:
    """Buckets of a row's tokens and of its blocks.

    Args:
        pad_to_multiple_of: what the user wants: a multiple for the tokens, and the blocks that lie
            in so many tokens for the blocks; None: what serves the machine.
        stride: tokens between the starts of neighbouring blocks.
        static_shapes: whether each shape costs something, being compiled by itself.
    """
    if pad_to_multiple_of is not None:
        return Buckets(pad_to_multiple_of), Buckets(max(1, pad_to_multiple_of // stride))
    return (TOKENS, BLOCKS) if static_shapes else (EXACT, EXACT)
