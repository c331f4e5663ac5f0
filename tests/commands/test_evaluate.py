"""`hf-ebft evaluate`."""

import json
from pathlib import Path

import pytest

from hf_ebft.commands import evaluate
from hf_ebft.commands.runs.options import EXAMPLES


def test_two_models_are_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = EXAMPLES / "tiny_model"
    options = ["--rows", "3", "--lengths", "2", "4", "--sequence_len", "48", "--stride", "16"]
    options += ["--n_samples", "2", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    evaluate.main(["--models", f"a={tiny}", f"b={tiny}", *options])
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert stored["models"] == ["a", "b"]
    assert stored["settings"]["feature_network"] == str(tiny)
    assert "Written:" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Two models are called 'tiny_model'"):
        evaluate.named_models([str(tiny), str(tiny)])
