"""`hf-ebft evaluate`."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hf_ebft.commands import evaluate
from hf_ebft.commands.runs.demo_files import DEMO_MODEL
from hf_ebft.data import Table


def test_two_models_are_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = DEMO_MODEL
    options = ["--rows", "3", "--lengths", "2", "4", "--sequence_len", "48", "--stride", "16"]
    options += ["--n_samples", "2", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    evaluate.main(["--models", f"a={tiny}", f"b={tiny}", *options])
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert stored["models"] == ["a", "b"]
    assert stored["settings"]["feature_network"] == str(tiny)
    assert "Written:" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Two models have the name 'tiny_model'"):
        evaluate.named_models([str(tiny), str(tiny)])


def test_controls_are_measured_beside_the_models(tmp_path: Path) -> None:
    tiny = DEMO_MODEL
    options = ["--rows", "3", "--lengths", "2", "--sequence_len", "48", "--stride", "16"]
    options += ["--n_samples", "2", "--device", "cpu", "--output_dir", str(tmp_path)]
    options += ["--tempered", "0.5", "--second_feature_layers", "1.0"]
    evaluate.main(["--models", f"a={tiny}", f"b={tiny}", *options])
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored["models"] == ["a", "a at temperature 0.5", "b"]
    value = {(e["model"], e["measurement"]): e["value"] for e in stored["entries"]}
    assert value["a at temperature 0.5", "entropy"] < value["a", "entropy"]
    assert value["b", "second_cfm_loss"] == value["a", "second_cfm_loss"] != value["a", "cfm_loss"]


def test_a_second_network_with_the_same_layers_is_refused(tmp_path: Path) -> None:
    options = ["--models", str(DEMO_MODEL), "--second_feature_layers", "0.25", "0.5"]
    with pytest.raises(
        ValueError, match=r"would measure the same. Choose other layers, such as 1\.0"
    ):
        evaluate.main([*options, "0.75", "--device", "cpu", "--output_dir", str(tmp_path)])


def test_unknown_options_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"no option 'row'; did you mean rows"):
        evaluate.main(["--models", str(DEMO_MODEL), "--row", "3"])
    with pytest.raises(ValueError, match=r"'data\.txt' belongs to no option"):
        evaluate.main(["--seed", "1", "data.txt", "--models", str(DEMO_MODEL)])


@pytest.mark.parametrize(
    ("name", "split"),
    [("stdlib:topics", "report"), ("stdlib-functions:encodings", "report"), ("x.csv", "train")],
)
def test_the_default_split_is_not_the_training_split(
    name: str, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, functions that come with Python were measured on the split that training uses."""
    asked = []

    def load_split(*given: Any) -> Table:
        asked.append(given[:2])
        return Table([{"text": "a text of enough tokens for one row, " * 9}], ("text",), "t")

    monkeypatch.setattr(evaluate, "load_split", load_split)
    args = evaluate.parse_arguments(["--models", "x", "--dataset_name_or_path", name])
    evaluate.load_rows(args, AutoTokenizer.from_pretrained(DEMO_MODEL))
    assert asked == [(name, split)]


def test_a_model_that_cannot_be_loaded_is_named_with_its_option(tmp_path: Path) -> None:
    data = ["--dataset_name_or_path", "stdlib:encodings", "--output_dir", str(tmp_path / "out")]
    message = rf"^models='{tmp_path}' is a folder from which no tokenizer can be loaded; save"
    with pytest.raises(ValueError, match=message):
        evaluate.main(["--models", f"base={tmp_path}", *data])
    option = "feature_model_name_or_path"
    missing = str(tmp_path / "missing")
    with pytest.raises(OSError, match=rf"^{option}='{missing}' is not a local folder, and could"):
        evaluate.main(["--models", f"base={DEMO_MODEL}", f"--{option}", missing, *data])


def test_the_help_names_each_option_once_and_no_empty_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        evaluate.parse_arguments(["--help"])
    said = capsys.readouterr().out
    assert "usage: hf-ebft evaluate --models" in said and "Measure one or several models" in said
    assert "None" not in said and "--text-column" not in said
    assert said.count("--text_column ") == 1
    assert "[64]" in said
    assert "One of feature, sample, none. [feature]" in " ".join(said.split())
