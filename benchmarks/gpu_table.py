"""The results of `gpu_check.py` as text, and pytest's report as a dict."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Characters of what has no table of its own.
LONGEST = 240


def junit(path: Path) -> dict[str, str]:
    """Test -> "passed", "skipped: why" or "FAILED: why", from pytest's XML; empty without one."""
    if not path.exists():
        return {}
    outcomes = {}
    for case in ElementTree.parse(path).iter("testcase"):
        outcome = "passed"
        for kind, word in (("skipped", "skipped"), ("failure", "FAILED"), ("error", "FAILED")):
            found = case.find(kind)
            if found is not None:
                outcome = f"{word}: {(found.get('message') or '').strip()[:LONGEST]}"
        outcomes[str(case.get("name"))] = outcome
    return outcomes


def table(results: Mapping[str, Any]) -> str:
    """Every part: how it ended, then its figures."""
    lines = ["", f"{results['date']}, {results.get('seconds', 0):.0f} s in all"]
    for name, part in results["parts"].items():
        lines += ["", f"{name}: {part['status']}, {part['seconds']} s"]
        for key, value in part.items():
            if key == "tests":
                lines += tests_table(value)
            elif key == "variants":
                lines += variants_table(value)
            elif key not in ("status", "seconds"):
                lines.append(f"  {key}: {json.dumps(value, default=str)[:LONGEST]}")
    return "\n".join(lines)


def tests_table(outcomes: Mapping[str, str]) -> list[str]:
    """How many passed, and which did not."""
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    bad = [f"  {name}: {outcome}" for name, outcome in outcomes.items() if outcome != "passed"]
    return [f"  {passed} of {len(outcomes)} passed", *bad]


def variants_table(variants: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for every way of making a step."""
    columns = ("sampling", "features", "training", "step", "document")
    heads = " ".join(f"{name:>9s}" for name in columns)
    lines = [
        f"  {'milliseconds':34s} {heads} {'TFLOP/s':>8s} {'of mm':>6s} {'GiB':>6s} {'1st, s':>7s}"
        "  decoding"
    ]
    for name, found in variants.items():
        if "error" in found:
            lines.append(f"  {name:34s} {found['error'][:LONGEST]}")
            continue
        times = " ".join(f"{1000 * found['seconds'][column]:9.1f}" for column in columns)
        first = f"{found['first_step_seconds']:.1f}" if "first_step_seconds" in found else "-"
        lines.append(
            f"  {name:34s} {times} {found['tflops']:8.1f} {found['share_of_matrix_product']:6.1%}"
            f" {found['gib_beyond_weights']:6.2f} {first:>7s}"
            f"  {found.get('decoding', '')[:LONGEST]}".rstrip()
        )
    return lines
