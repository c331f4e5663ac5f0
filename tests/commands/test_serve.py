"""`hf-ebft serve`: the command that it prints and runs, and its errors about a bad file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

from hf_ebft import cli
from hf_ebft.commands.serve import main
from hf_ebft.structured.vllm.settings import SERVE_COMMAND

ROOT = Path(__file__).parents[2]
RUN = {"model_name_or_path": "m", "vllm_lora_sync": True, "learning_rate": 1e-3}


def test_serve_prints_the_server_s_command_and_runs_it(tmp_path, monkeypatch, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(RUN | {"use_cpu": True, "vllm_sync_dir": None}))
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    main(["--config", str(config), "--print_only"])
    assert started == []
    assert capsys.readouterr().out.count("--model m") == 1
    main(["--config", str(config), "--python", "py", "--", "--max-num-seqs", "3"])
    program, command, environment = started[0]
    assert program == command[0] == "py"
    assert command[-2:] == ["--max-num-seqs", "3"]
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "4"  # use_cpu: no GPU is looked for


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_name_or_path: m", "neither vllm_lora_sync nor"),
        ("- a\n- b", "contains a list, but it must be a mapping"),
        ("a: [", "run.yaml"),
        (None, "There is no file or folder"),
    ],
)
def test_a_bad_file_ends_with_a_message(tmp_path, capsys, text, message):
    config = tmp_path / "run.yaml"
    if text is not None:
        config.write_text(text)
    assert cli.main(["serve", "--config", str(config), "--print_only"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("script", ["the package's", "the example's"])
def test_the_commands_that_errors_and_docs_name_exist(tmp_path, script):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(RUN | {"use_cpu": True}))
    command = [str(ROOT / "examples" / "serve_vllm.py")]
    if script == "the package's":
        program, name = SERVE_COMMAND.split()
        assert program == "hf-ebft"
        command = ["-m", "hf_ebft", name]
    command = [sys.executable, *command, "--config", str(config), "--print_only"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "--model m --served-model-name base" in finished.stdout
