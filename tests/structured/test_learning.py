"""Structured mode learns: held-out words before and after, from rollouts alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "structured_tiny.py"


@pytest.mark.slow
def test_alignment_rises_and_cfm_loss_falls_on_held_out_prompts():
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "80"], capture_output=True, text=True, check=True
    )
    rows = re.findall(r"\| (.+?) \| \S+ \| \S+ \| \S+ \[(\S+), (\S+)\] \|", finished.stdout)
    bounds = {name: (float(low), float(high)) for name, low, high in rows}
    assert bounds["CFM loss"][1] < 0
    assert bounds["alignment, 2 cos unwhitened"][0] > 0
    assert bounds["exactly right"][0] > 0.1
