"""The command `hf-ebft`: which commands there are, and how errors end."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_ebft import cli

ROOT = Path(__file__).parents[1]


def test_help_names_every_command_and_imports_no_library() -> None:
    program = (
        "import sys\nfrom hf_ebft.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'yaml', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_module(name: str) -> None:
    assert (ROOT / "hf_ebft" / "commands" / f"{name}.py").is_file()
    if name != "serve":  # needs TRL
        assert callable(importlib.import_module(f"hf_ebft.commands.{name}").main)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in (("trian", "did you mean train?"), ("xyz", "choose one of train, ")):
        with pytest.raises(SystemExit) as end:
            cli.main([name])
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_a_missing_attribute_of_the_package_is_an_error() -> None:
    import hf_ebft

    assert {"EBFTTrainer", "EBFTConfig", "Rollouts"} <= set(dir(hf_ebft))
    with pytest.raises(AttributeError, match="has no attribute 'EBFTTrianer'"):
        _ = hf_ebft.EBFTTrianer


# ---- Errors -----------------------------------------------------------------------------------


def failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command `train` raise an error."""

    def main(argv: list[str]) -> None:
        raise error

    def module(name: str) -> Any:
        assert name == "hf_ebft.commands.train"
        return SimpleNamespace(main=main)

    monkeypatch.setattr(cli.importlib, "import_module", module)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("stride=0 must be at least 1."), "stride=0 must be at least 1."),
        (FileNotFoundError(2, "No such file", "a.txt"), "There is no file or folder a.txt; check"),
        (FileExistsError(17, "File exists", "a.txt"), "a.txt exists already and is not a folder"),
        (PermissionError(13, "Permission denied", "a.txt"), "a.txt: Permission denied"),
        (OSError("m is no model of the hub"), "m is no model of the hub"),
        (ImportError("pip install 'hf_ebft[structured]'"), "pip install 'hf_ebft[structured]'"),
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory."),
    ],
)
def test_user_errors_have_no_traceback_without_debug(
    error: Exception,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(error, monkeypatch)
    assert cli.main(["train", "--stride=0"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"hf-ebft train: {message}") and said.err.count("\n") == 1
    assert said.out == ""
    for argv in (["--debug", "train"], ["train", "--debug"], ["train", "--debug", "--stride=0"]):
        with pytest.raises(type(error)):
            cli.main(argv)


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("x")])
def test_faults_of_the_program_keep_their_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(error, monkeypatch)
    with pytest.raises(type(error)):
        cli.main(["train"])


def test_errors_of_other_packages_are_known_by_names_that_exist() -> None:
    """An error class that its package has moved would be shown with a traceback again."""
    names = {}
    for name in cli.USER_ERRORS:
        package, _, kind = name.rpartition(".")
        if package.split(".")[0] == "safetensors":
            package = "safetensors"
        module = pytest.importorskip(package)
        found = getattr(module, kind)
        names[name] = f"{found.__module__}.{found.__qualname__}"
    assert names == {name: name for name in cli.USER_ERRORS}


def test_an_error_names_the_process_unless_it_is_the_main_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(ValueError("no room"), monkeypatch)
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "hf-ebft train (process 3): no room\n"


@pytest.mark.parametrize(
    ("argv", "kept", "debug"),
    [
        (["train", "--debug", "underflow_overflow"], ["train", "--debug", "underflow_overflow"], 0),
        (["train", "--debug", "--x"], ["train", "--x"], 1),
        (["--debug", "train"], ["train"], 1),
        (["train", "--x", "--debug"], ["train", "--x"], 1),
        (["train"], ["train"], 0),
    ],
)
def test_debug_with_a_value_is_an_option_of_transformers(
    argv: list[str], kept: list[str], debug: int
) -> None:
    assert cli.split_debug(argv) == (kept, bool(debug))


def test_settings_that_the_library_refuses_are_user_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused by a dataclass, by the parser, by the trainer's constructor."""
    settings = {
        "--n_samples_per_prompt=1": "n_samples_per_prompt=1 leaves",
        "--strid=1": "no option 'strid'; did you mean stride",
        "--feature_placement=moon": "feature_placement='moon'",
        "--model_name_or_path=gone/nowhere": "model_name_or_path='gone/nowhere' is not a local",
    }
    for option, message in settings.items():
        argv = ["demo", option, "--report_rows=0", f"--output_dir={tmp_path}", "--report_to=none"]
        assert cli.main(argv) == 2
        error = capsys.readouterr().err
        assert "hf-ebft demo: " in error and message in error and "Traceback" not in error
