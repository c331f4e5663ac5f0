"""Fixtures of several tests of packed rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def flex_gradient_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """flex_attention traced as for a GPU, with a gradient, which torch refuses on a CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
