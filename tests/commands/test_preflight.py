"""`hf-ebft preflight` from its options to its files."""

import json
from pathlib import Path

import pytest

from hf_ebft.cli import main

DEMO = Path(__file__).parents[2] / "examples" / "configs" / "demo.yaml"


def test_the_shipped_model_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {
        "sequence_len": 32,
        "stride": 16,
        "generate_max_len": 4,
        "per_device_train_batch_size": 2,
        "max_train_rows": 40,
        "max_steps": 10,
    }
    options = [f"--{name}={value}" for name, value in small.items()]
    own = ["--documents", "4", "--minutes", "0.01", "--processes", "3"]
    options += ["--output_dir", str(tmp_path / "out"), *own]
    assert main(["preflight", "--config", str(DEMO), *options]) == 0
    shown = capsys.readouterr().out
    assert "The run: 10 steps of" in shown
    assert "WAS NAMED" not in shown, "the demo's model is the one that is meant"
    assert "preflight.html; open it in any browser" in shown
    found = json.loads((tmp_path / "out" / "preflight.json").read_text())
    assert found["settings"]["generate_max_len"] == 4
    assert found["cost"]["rows_per_step"] == 2 * 3
    assert found["signal"]["rows"] == 4
    assert found["signal"]["kept"] == found["signal"]["n_weights"] == 1_918_656
    rewards = {name: reward["mean"] for name, reward in found["rewards"]["rewards"].items()}
    assert all(rewards["the text itself"] > 0.5 + rewards[name] for name in list(rewards)[1:])
    alignments = {name: found["rewards"]["alignments"][name]["mean"] for name in rewards}
    assert alignments["rollout at 0.7"] > alignments["random tokens"]
    assert "<svg" in (tmp_path / "out" / "preflight.html").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "preflight.html",
        "preflight.json",
    ], "a preflight trains nothing and leaves no checkpoint"


def test_structured_mode_is_refused_and_the_error_says_what_works(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["preflight", "--config", str(DEMO), "--mode", "structured"]) == 2
    assert "Add --mode strided" in capsys.readouterr().err


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "--config", str(DEMO), "--documnets", "4"]) == 2
    assert "there is no option 'documnets'" in capsys.readouterr().err


def test_the_default_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--dataset_name_or_path", "stdlib:topics", "--use_cpu", "--max_train_rows", "8"]
    assert main(["preflight", *run, "--documents", "0"]) == 2
    shown = capsys.readouterr()
    assert "NO MODEL WAS NAMED" in shown.out
    assert "documents=0" in shown.err
