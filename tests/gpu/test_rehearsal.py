"""The tests of this folder can pass: they do where a CPU takes the accelerator's place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_tests_for_an_accelerator_pass_on_the_cpu() -> None:
    """All that need no second device and no backward pass of flex_attention."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/gpu"],
        cwd=ROOT,
        env=os.environ | {"HF_EBFT_GPU_TESTS_ON_CPU": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
