"""Where the tests of `tests/gpu` run: on an accelerator, or in its place on the CPU.

    pytest -m gpu tests/gpu                                # on a machine that has one
    HF_EBFT_GPU_TESTS_ON_CPU=1 pytest -m gpu tests/gpu     # what can be rehearsed without

On the CPU they compare it with itself, which shows that the tests themselves can pass.
"""

import os

import pytest
import torch

ON_CPU = os.environ.get("HF_EBFT_GPU_TESTS_ON_CPU") == "1"
DEVICE = (None if ON_CPU else torch.accelerator.current_accelerator()) or torch.device("cpu")

needs_accelerator = pytest.mark.skipif(
    not ON_CPU and not torch.accelerator.is_available(), reason="needs an accelerator"
)
needs_two_accelerators = pytest.mark.skipif(
    ON_CPU or torch.accelerator.device_count() < 2, reason="needs two accelerators"
)
