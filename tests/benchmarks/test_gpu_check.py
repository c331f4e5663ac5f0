"""The one call on a GPU: what it plans, what survives a failure, what it prints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_check  # noqa: E402  (scripts beside their own modules)
import gpu_parts  # noqa: E402
import gpu_table  # noqa: E402
import settings  # noqa: E402


def test_every_part_can_be_run_and_the_call_ends_in_time() -> None:
    """Names fit together; no part alone eats the budget, and the budget is below nine minutes."""
    names = [part.name for part in gpu_check.PARTS]
    assert {*names} == {*gpu_parts.PARTS, "tests"}
    assert gpu_check.BUDGET < 9 * 60
    assert all(part.limit <= gpu_check.BUDGET / 4 for part in gpu_check.PARTS)
    assert gpu_check.plan(None) == list(gpu_check.PARTS)
    assert [part.name for part in gpu_check.plan(["run", "tests"])] == ["tests", "run"]
    with pytest.raises(ValueError, match="profile: there are only environment, steps"):
        gpu_check.plan(["profile"])


def test_a_part_gets_its_limit_or_what_is_left() -> None:
    """And none begins that could not end."""
    part = gpu_check.Part("steps", 100, "")
    assert gpu_check.limit_of(part, 300) == 100
    assert gpu_check.limit_of(part, 40) == 40
    assert gpu_check.limit_of(part, 300, dry_run=True) == 300
    assert gpu_check.limit_of(part, 5) is None


def test_without_pytest_the_tests_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine may have nothing but what training needs."""
    part = gpu_check.plan(["tests"])[0]
    command = gpu_check.command_of(part, tmp_path, dry_run=False)
    assert command is not None and command[:3] == [sys.executable, "-m", "pytest"]
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    assert gpu_check.command_of(part, tmp_path, dry_run=False) is None
    found = gpu_check.run_part(part, 10, tmp_path, subprocess.DEVNULL, dry_run=False)
    assert "not installed" in found["status"]


def pretend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **scripts: str
) -> list[gpu_check.Part]:
    """Parts that are little scripts; `FILE` in them is where they leave their figures."""

    def command_of(part: gpu_check.Part, out: Path, dry_run: bool) -> list[str]:
        path = str(gpu_check.file_of(part, out))
        return [sys.executable, "-c", scripts[part.name].replace("FILE", repr(path))]

    monkeypatch.setattr(gpu_check, "command_of", command_of)
    return [gpu_check.Part(name, 2, "") for name in scripts]


def test_nothing_that_was_found_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that crashes and one that hangs keep their figures and stop nobody else."""
    write = "import json; json.dump({'figure': 7}, open(FILE, 'w'));"
    parts = pretend(
        monkeypatch,
        tmp_path,
        crash=write + "raise SystemExit(3)",
        # With a child that holds on, as a compiler would.
        hang=write + "import subprocess; subprocess.run(['sleep', '60'])",
        # As pytest does, which writes its report when it is interrupted.
        late="import json, time\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: json.dump({'figure': 7}, open(FILE, 'w'))",
        half="open(FILE, 'w').write('{')",
        good=write,
    )
    start = time.monotonic()
    # As in a background job of a shell.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        results = gpu_check.check(parts, tmp_path, budget=60, dry_run=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 30
    found = dict(results["parts"])
    assert "figure" not in found["half"] and "JSONDecodeError" in found.pop("half")["unreadable"]
    assert [found[name]["figure"] for name in found] == [7, 7, 7, 7]
    assert found["late"]["status"] == "stopped at its limit of 2 s"
    assert found["crash"]["status"] == "exit status 3"
    assert found["hang"]["status"] == "stopped at its limit of 2 s"
    assert found["good"]["status"] == "ok"
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [path.name for path in tmp_path.glob("part-*")] == ["part-half.json"]
    printed = gpu_table.table(results)
    assert "hang: stopped at its limit of 2 s" in printed and "figure: 7" in printed


def test_beyond_the_budget_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the results say so."""
    parts = pretend(monkeypatch, tmp_path, never="raise SystemExit(1)")
    results = gpu_check.check(parts, tmp_path, budget=3, dry_run=False)
    assert results["parts"]["never"]["status"] == "left out: 3 s left"


def test_table_of_tests_and_steps(tmp_path: Path) -> None:
    """Failures with their reason, milliseconds by phase."""
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/>'
        '<testcase name="b"><failure message="too far off"/></testcase>'
        '<testcase name="c"><skipped message="needs two"/></testcase></testsuite></testsuites>'
    )
    outcomes = gpu_table.junit(tmp_path / "junit.xml")
    assert outcomes == {"a": "passed", "b": "FAILED: too far off", "c": "skipped: needs two"}
    assert gpu_table.junit(tmp_path / "none.xml") == {}
    lines = gpu_table.tests_table(outcomes)
    assert lines[0] == "  1 of 3 passed" and len(lines) == 3
    record = gpu_parts.Record(tmp_path / "x.json", dry_run=True)
    variant = gpu_parts.Variant("auto, 4 documents", 4)
    run = {"sampling": 0.1, "features": 0.2, "training_forward": 0.3, "backward": 0.4, "total": 1.0}
    found = gpu_parts.figures_of(record, variant, [run, run], 5 * 10**12, 20e12)
    assert found["seconds"] == pytest.approx(
        {"sampling": 0.1, "features": 0.2, "training": 0.7, "step": 1.0, "document": 0.25}
    )
    assert found["tflops"] == pytest.approx(10) and found["needed_tflop"] == pytest.approx(10)
    assert found["share_of_matrix_product"] == pytest.approx(0.25)
    found |= {"gib_beyond_weights": 2.5, "first_step_seconds": 3.0}
    table = gpu_table.variants_table({variant.name: found, "other": {"error": "out of memory"}})
    expected = "100.0 200.0 700.0 1000.0 250.0 10.0 25.0% 2.50 3.0"
    assert " ".join(table[1].split()[3:]) == expected
    assert "out of memory" in table[2]


def test_a_record_is_on_disk_and_survives_what_fails(tmp_path: Path) -> None:
    """Each figure as soon as it is known."""
    record = gpu_parts.Record(tmp_path / "part.json", dry_run=True)
    record.note("first", 1)
    with record.trying("second", "variants"):
        raise ValueError("no")
    expected = {"first": 1, "variants": {"second": {"error": "ValueError: no"}}}
    assert json.loads(record.path.read_text()) == expected


def test_a_step_is_measured_and_counted(tmp_path: Path) -> None:
    """With flex_attention too, whose arithmetic is counted on tensors that it does not run on."""
    record = gpu_parts.Record(tmp_path / "part.json", dry_run=True)
    variant = gpu_parts.Variant("sdpa", 2, gpu_parts.SDPA)
    found = gpu_parts.measure(record, variant, 1e9)
    phases = found["seconds"]
    assert phases["document"] == pytest.approx(phases["step"] / 2)
    assert min(phases["sampling"], phases["features"], phases["training"]) > 0
    assert found["gib_beyond_weights"] > 0

    ours = gpu_parts.our_step(record, variant)
    ours(gpu_parts.batch(record, variant))
    needed = gpu_parts.multiply_adds(record, ours)
    ours.policy.set_attn_implementation("flex_attention")
    assert gpu_parts.multiply_adds(record, ours) == needed > 10**6
    assert found["needed_tflop"] == pytest.approx(2 * needed / 1e12)
    assert record.size.dtype == settings.torch.bfloat16


def test_numerics_see_agreement_and_its_absence(tmp_path: Path) -> None:
    """Sampling and training agree up to rounding, and equal rollouts have equal features."""
    record = gpu_parts.Record(tmp_path / "part.json", dry_run=True)
    found = gpu_parts.numerics_of(record, gpu_parts.ATTENTION_STEPS[0])
    assert found["attention"] == "sdpa"
    assert 0 < found["log_probs"]["mean_absolute_difference"] < 0.1
    pairs = found["diversity_of_equal_pairs"]
    assert pairs["expected"] == 0.5
    assert pairs["least"] == pytest.approx(0.5, abs=1e-3)
    assert pairs["most"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """Every part on the CPU."""
    script = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--dry-run", "--budget", "1500"]
    done = subprocess.run(
        [*script, "--out", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    statuses = {name: part["status"] for name, part in results["parts"].items()}
    assert statuses == dict.fromkeys([part.name for part in gpu_check.PARTS], "ok")
    assert "error" not in json.dumps(results)
    variants = results["parts"]["steps"]["variants"]
    assert list(variants) == [variant.name for variant in gpu_parts.STEPS]
    assert "steps: ok" in done.stdout


@pytest.mark.slow
def test_parts_need_no_package_beyond_training(tmp_path: Path) -> None:
    """The GPU machine has the tree, torch, transformers, accelerate and peft."""
    hide = "import sys; sys.modules.update(dict.fromkeys({}))".format(
        ["datasets", "evaluate", "trl", "matplotlib", "sacrebleu", "bitsandbytes"]
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{hide}; import gpu_parts"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (BENCHMARKS.parent, BENCHMARKS)))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
