"""Looking ahead in the batches to come."""

import pytest

pytest.importorskip("trl")

from hf_ebft.structured.vllm.prefetch import LookAhead


def test_looking_ahead_changes_nothing():
    ahead = LookAhead(iter(range(4)))
    assert ahead.peek(2) == 2
    assert next(ahead) == 0
    assert ahead.peek(0) == 1 and ahead.peek(2) == 3 and ahead.peek(3) is None
    assert list(ahead) == [1, 2, 3]
