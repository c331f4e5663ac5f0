"""The demo's files, in a clone and where they are missing."""

from pathlib import Path

import pytest

from hf_ebft.commands import demo, train
from hf_ebft.commands.runs import demo_files


def test_a_clone_has_the_demo_files_in_examples() -> None:
    demo_files.require_demo_files()
    assert demo_files.DEMO_MODEL.parts[-2:] == ("examples", "tiny_model")
    assert demo_files.DEMO_CONFIG.name == "demo.yaml"


def test_an_error_without_the_demo_files_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_files, "DEMO_MODEL", tmp_path / "tiny_model")
    with pytest.raises(
        FileNotFoundError, match=r"tiny_model/config.json is missing. .*--force-reinstall"
    ):
        demo.main([])
    with pytest.raises(FileNotFoundError, match="lacks the demo"):
        train.main([])


def test_without_tensorboard_no_curves_are_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(train, "main", called.append)
    for there in (True, False):
        monkeypatch.setattr(demo, "is_tensorboard_available", lambda there=there: there)
        demo.main(["--max_steps=2"])
    with_it, without = called
    assert "--report_to=none" not in with_it and with_it[-1] == "--max_steps=2"
    assert without == [*with_it[:-1], "--report_to=none", "--max_steps=2"]
    assert capsys.readouterr().out.count("TensorBoard is not installed") == 1


def test_help_names_the_demo_and_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(
        f"hf-ebft demo [--option value ...]: hf-ebft train with {demo_files.DEMO_CONFIG}"
    )
    assert "--max_steps" in shown
