"""Few widths for many lengths."""

from __future__ import annotations

import pytest

from hf_ebft.rows.buckets import BLOCKS, EXACT, TOKENS, Buckets, buckets_for


@pytest.mark.parametrize("buckets", [TOKENS, BLOCKS, Buckets(7), Buckets(4, grows=True), EXACT])
def test_every_number_gets_the_first_bucket_that_holds_it(buckets: Buckets) -> None:
    rounded = [buckets.round_up(number) for number in range(1, 3000)]
    assert all(number <= up for number, up in enumerate(rounded, start=1))
    assert rounded == sorted(rounded)
    assert all(buckets.round_up(up) == up for up in set(rounded))
    assert all(up % buckets.least == 0 for up in rounded)
    # No more than half in vain, beyond the smallest one.
    assert all(
        up <= max(buckets.least, 1.5 * number + buckets.least)
        for number, up in enumerate(rounded, start=1)
    )


def test_rows_of_up_to_two_thousand_tokens_have_eight_widths() -> None:
    widths = sorted({TOKENS.round_up(length) for length in range(1, 2049)})
    assert widths == [128, 256, 384, 512, 768, 1024, 1536, 2048]
    # The paper's row: 1024 tokens with 127 blocks fill whole tiles of 128.
    assert TOKENS.round_up(1024) == 1024
    blocks = BLOCKS.round_up(127)
    assert blocks == 128
    assert (1024 + blocks * 4 * 7) % 128 == 0 and (1024 + blocks * 4 * 8) % 128 == 0


@pytest.mark.parametrize("static", [False, True])
def test_what_the_user_sets_wins(static: bool) -> None:
    assert buckets_for(64, 8, static_shapes=static) == (Buckets(64), Buckets(8))
    assert buckets_for(4, 8, static_shapes=static) == (Buckets(4), Buckets(1))
    assert buckets_for(1, 8, static_shapes=static) == (EXACT, EXACT)


def test_shapes_are_rounded_by_themselves_where_each_costs_something() -> None:
    assert buckets_for(None, 8, static_shapes=True) == (TOKENS, BLOCKS)
    assert buckets_for(None, 8, static_shapes=False) == (EXACT, EXACT)
