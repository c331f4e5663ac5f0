"""Measures everything that one short use of a GPU can show, in one call of at most nine minutes.

    PYTHONPATH=. python3 benchmarks/gpu_check.py --out results     # in the root of the repository
    PYTHONPATH=. python3 benchmarks/gpu_check.py --out out --dry-run        # tiny, on a CPU

It needs torch, transformers, accelerate and peft. It needs no data set and no network, and this
package need not be installed. The most valuable parts run first. Each part runs in a process of its
own with a time limit. Results are written to disk at once, so that neither a crash nor the limit
loses them. A part that no longer fits the time budget is skipped and reported as skipped. The table
is printed last, so that the end of the output suffices. The folder `--out` gets `results.json`,
`log.txt` and `junit.xml`.

`gpu_parts.py` contains the measurements, and `gpu_table.py` prints the table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_table import junit, table

ROOT = Path(__file__).resolve().parents[1]
# Less than this is not enough to import torch and to begin.
LEAST_SECONDS = 15.0


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: of the function `part_NAME` in gpu_parts.py, or "tests".
        limit: seconds that it may take.
        what: is found out.
    """

    name: str
    limit: float
    what: str


# In order of value: what a step costs as it is by default and with torch_compile, and whether it
# stays so over many steps, comes before all that explains it. The limits add up to more than the
# budget: most parts stay below theirs.
PARTS = (
    Part("environment", 45, "versions, matrix product, copies, cost of a launch"),
    Part("steps", 130, "steps of a 1 B shape as they are by default: 4, 1, 8 documents; launches"),
    Part("compiled", 130, "the same with torch_compile"),
    Part("recompiles", 80, "200 steps of varying lengths with torch_compile: memory, compilations"),
    Part("steady", 60, "the same without"),
    Part("tests", 110, "pytest -m gpu"),
    Part("numerics", 60, "do sampling and training agree in bf16, do equal rollouts stay equal?"),
    Part("attention", 90, "steps with sdpa and with split attention"),
    Part("flex", 60, "flex_attention's kernels with other sizes of tiles"),
    Part("run", 60, "a whole run of the trainer on text that lies on the machine"),
    Part("naive", 60, "the order of work of the paper's released code"),
)
# What a part that is stopped gets to write down what it has.
GRACE = 10.0
BUDGET = 520.0


def plan(asked: Sequence[str] | None) -> list[Part]:
    """The parts to run, in their order.

    Raises:
        ValueError: a name that no part has.
    """
    names = [part.name for part in PARTS]
    unknown = sorted(set(asked or ()) - set(names))
    if unknown:
        raise ValueError(f"--parts {','.join(unknown)}: there are only {', '.join(names)}.")
    return [part for part in PARTS if not asked or part.name in asked]


def limit_of(part: Part, left: float, dry_run: bool = False) -> float | None:
    """Seconds that a part gets of what is left of the budget; None: too little to begin.

    Limits are those of a GPU: in a dry run, on a CPU that may be busy, the budget alone counts.
    """
    if left < LEAST_SECONDS:
        return None
    return left if dry_run else min(part.limit, left)


def command_of(part: Part, out: Path, dry_run: bool) -> list[str] | None:
    """What to run; None where the machine lacks it."""
    if part.name != "tests":
        script = str(ROOT / "benchmarks" / "gpu_parts.py")
        command = [sys.executable, script, part.name, str(file_of(part, out))]
        return [*command, "--dry-run"] if dry_run else command
    if importlib.util.find_spec("pytest") is None:
        return None
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "--tb=short"]
    # Whatever release of pytest is there, and nothing written into the tree.
    command += ["-p", "no:cacheprovider", "-o", "minversion=7.0"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "2" if dry_run else "6"]
    return [*command, f"--junitxml={out / 'junit.xml'}"]


def file_of(part: Part, out: Path) -> Path:
    """Where a part leaves what it has found so far."""
    return out / f"part-{part.name}.json"


def environment_of(dry_run: bool) -> dict[str, str]:
    """Of every part: the tree on the path, no network, caches outside of the tree."""
    scratch = Path(tempfile.gettempdir())
    changes = {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }
    if dry_run:
        changes |= {"HF_EBFT_GPU_TESTS_ON_CPU": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | changes


def hear_interrupts() -> None:
    """In a part's process, before it begins: shells start background jobs deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_part(part: Part, limit: float, out: Path, log: Any, dry_run: bool) -> dict[str, Any]:
    """Run a part until it ends or its time is over; what it found, and how it ended."""
    command = command_of(part, out, dry_run)
    if command is None:
        return {"status": "left out: pytest is not installed", "seconds": 0.0}
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment_of(dry_run),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    try:
        code = process.wait(timeout=limit)
        status = "ok" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        # As if somebody had pressed Ctrl-C: pytest writes its report then.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
        # The whole session: compilers and pytest's workers are children of the part.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        status = f"stopped at its limit of {limit:.0f} s"
    found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    try:
        if part.name == "tests":
            return found | {"tests": junit(out / "junit.xml")}
        path = file_of(part, out)
        if path.exists():
            found |= json.loads(path.read_text())
            path.unlink()
    except (ValueError, SyntaxError) as error:  # half of a file: the other parts go on
        found["unreadable"] = f"{type(error).__name__}: {error}"
    return found


def check(parts: Sequence[Part], out: Path, *, budget: float, dry_run: bool) -> dict[str, Any]:
    """Run the parts; the results so far are in `results.json` after each of them."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    results: dict[str, Any] = {"date": date, "dry_run": dry_run, "parts": {}}
    with (out / "log.txt").open("w") as log:
        for part in parts:
            spent = time.monotonic() - start
            limit = limit_of(part, budget - spent, dry_run)
            print(f"--- {part.name}, at {spent:.0f} s: {part.what}", flush=True)
            log.write(f"\n===== {part.name}\n")
            log.flush()
            if limit is None:
                found = {"status": f"left out: {budget - spent:.0f} s left", "seconds": 0.0}
            else:
                found = run_part(part, limit, out, log, dry_run)
            results["parts"][part.name] = found
            results["seconds"] = round(time.monotonic() - start, 1)
            text = json.dumps(results, indent=1, default=str) + "\n"
            (out / "results.json").write_text(text)
            print(f"    {found['status']}, {found['seconds']} s", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = Path(os.environ.get("OUT", "gpu-check"))
    parser.add_argument("--out", type=Path, default=out, help="default: $OUT, or gpu-check")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts")
    parser.add_argument("--parts", help="names, with commas; default: all")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU")
    given = parser.parse_args(arguments)
    try:
        parts = plan(given.parts.split(",") if given.parts else None)
    except ValueError as error:
        parser.error(str(error))
    results = check(parts, given.out.resolve(), budget=given.budget, dry_run=given.dry_run)
    print(table(results))


if __name__ == "__main__":
    main()
