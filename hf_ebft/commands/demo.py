"""`hf-ebft demo`: `hf-ebft train` on a small model and text that need no download.

hf-ebft demo
hf-ebft demo --max_steps 2 --report_rows 0                       # options of hf-ebft train
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_ebft.commands import train
from hf_ebft.commands.runs.options import DEMO_CONFIG


def main(argv: Sequence[str]) -> None:
    """Train as `examples/configs/demo.yaml` says; options on the command line win."""
    train.main([f"--config={DEMO_CONFIG}", *argv])
