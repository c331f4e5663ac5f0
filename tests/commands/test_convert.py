"""`hf-ebft convert`: the file that it writes, and its messages."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_ebft.cli import main
from hf_ebft.conversion import convert_axolotl

ROOT = Path(__file__).parents[2]


def test_the_command_prints_the_options_and_names_what_it_left_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = ROOT / "tests/conversion/axolotl/llama-1b-ebft-opencode.yaml"
    assert main(["convert", str(path)]) == 0
    printed = capsys.readouterr()
    written = yaml.safe_load(printed.out)
    assert written == convert_axolotl(yaml.safe_load(path.read_text())).options
    assert "keys carried over, 4 not:" in printed.err and "trl.scale_rewards: " in printed.err
    assert printed.out.startswith("# Converted from llama-1b-ebft-opencode.yaml.\n")
    assert max(map(len, printed.out.splitlines())) <= 100


@pytest.mark.parametrize("text", ["rl: grpo\n", "just words\n", "a: [\n", None])
def test_errors_name_the_file_and_the_mistake(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "axolotl.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["convert", str(path)]) == 2
    begins = str(path) if text is not None else f"There is no file or folder {path};"
    assert f"hf-ebft convert: {begins}" in capsys.readouterr().err


def test_the_source_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "axolotl.yaml"
    path.write_text("rl: ebft\nebft: {mode: strided}\n")
    other_name = tmp_path / "folder" / ".." / "axolotl.yaml"
    (tmp_path / "folder").mkdir()
    assert main(["convert", str(path), "--output", str(other_name)]) == 2
    assert "would overwrite the file that is converted; name another" in capsys.readouterr().err
    assert path.read_text().startswith("rl: ebft")


@pytest.mark.slow
def test_convert_runs_as_a_command_of_the_package(tmp_path: Path) -> None:
    path = ROOT / "tests/conversion/axolotl/llama-1b-ebft-strided.yaml"
    command = [sys.executable, "-m", "hf_ebft", "convert", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["mode"] == "strided"
