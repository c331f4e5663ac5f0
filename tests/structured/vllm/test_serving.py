"""The command line of the server that a run's YAML makes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

from hf_ebft.structured.vllm.serving import main, server_command, server_dtype
from hf_ebft.structured.vllm.settings import SERVE_COMMAND, VLLMServerSettings

CONFIGS = Path(__file__).parents[3] / "examples" / "configs"
RUN = {"model_name_or_path": "m", "vllm_lora_sync": True, "learning_rate": 1e-3}


def command_of(cpu_cache_gib=None, listen="127.0.0.1", **options):
    environment, arguments = server_command(
        RUN | options, listen=listen, cpu_cache_gib=cpu_cache_gib
    )
    return environment, " ".join(arguments)


def test_adapters():
    environment, arguments = command_of(vllm_max_lora_rank=64, vllm_server_port=8123)
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in environment
    assert "--model m --served-model-name base --host 127.0.0.1 --port 8123" in arguments
    assert "--enable-lora --max-loras 2 --max-lora-rank 64" in arguments
    assert "--logprobs-mode processed_logprobs" in arguments


def test_full_weights():
    environment, arguments = command_of(vllm_lora_sync=False, vllm_full_sync=True)
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment
    assert "lora" not in arguments


def test_a_cpu_gets_a_bounded_cache_and_a_gpu_its_share():
    environment, arguments = command_of(cpu_cache_gib=3, vllm_gpu_memory_utilization=0.4)
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert "--enforce-eager" in arguments and "utilization" not in arguments
    environment, arguments = command_of(vllm_gpu_memory_utilization=0.4)
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    assert "--gpu-memory-utilization 0.4" in arguments


def test_address_name_and_model_options():
    _, arguments = command_of(
        listen="0.0.0.0",
        vllm_server_base_url="http://gpu:81/",
        vllm_served_model_name="policy",
        vllm_max_model_length=2048,
        vllm_tensor_parallel_size=2,
        tokenizer_name_or_path="t",
        model_revision="r1",
        trust_remote_code=True,
    )
    for part in (
        *("--host 0.0.0.0 --port 81", "--served-model-name policy", "--max-model-len 2048"),
        *("--tensor-parallel-size 2", "--tokenizer t", "--revision r1", "--trust-remote-code"),
    ):
        assert part in arguments


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "bfloat16"),
        ({"bf16": False}, "float32"),
        ({"bf16": False, "dtype": "bfloat16"}, "bfloat16"),
        ({"fp16": True}, "float16"),
        ({"vllm_dtype": "float32"}, "float32"),
    ],
)
def test_precision_is_the_policys(options, dtype, tmp_path):
    settings = VLLMServerSettings(vllm_lora_sync=True, vllm_dtype=options.get("vllm_dtype", "auto"))
    assert server_dtype(settings, options) == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vllm_lora_sync": False}, "neither vllm_lora_sync nor"),
        ({"lora_r": 32}, "lora_r=32 is above vllm_max_lora_rank=16"),
        ({"gguf_file": "x.gguf"}, "gguf_file"),
        ({"vllm_sync_interval": 0}, "vllm_sync_interval=0"),
    ],
)
def test_runs_that_a_stock_server_cannot_serve_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        command_of(**options)
    with pytest.raises(ValueError, match="model_name_or_path is missing"):
        server_command({"vllm_lora_sync": True}, listen="x", cpu_cache_gib=None)


def test_script_prints_the_command_and_becomes_it(tmp_path, monkeypatch, capsys):
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
        ("- a\n- b", "it holds a list"),
        ("a: [", "run.yaml"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_ends_with_a_message(tmp_path, capsys, text, message):
    config = tmp_path / "run.yaml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(SystemExit):
        main(["--config", str(config), "--print_only"])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("script", ["the package's", "the example's"])
def test_the_commands_that_errors_and_docs_name_exist(tmp_path, script):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(RUN | {"use_cpu": True}))
    command = SERVE_COMMAND.split()[1:]
    if script == "the example's":
        command = [str(CONFIGS.parent / "serve_vllm.py")]
    command = [sys.executable, *command, "--config", str(config), "--print_only"]
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parents[1])}
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "--model m --served-model-name base" in finished.stdout


SERVED = [
    path
    for path in sorted(CONFIGS.glob("*.yaml"))
    if {"vllm_lora_sync", "vllm_full_sync"} & set(yaml.safe_load(path.read_text()))
]


@pytest.mark.parametrize("config", SERVED, ids=lambda path: path.stem)
def test_the_shipped_configurations_with_a_server_can_be_served(config):
    options = yaml.safe_load(config.read_text())
    _, arguments = server_command(options, listen="127.0.0.1", cpu_cache_gib=None)
    given = dict(itertools.pairwise(arguments))
    assert given["--model"] == options["model_name_or_path"]
    if "lora_r" in options:
        assert int(given["--max-lora-rank"]) >= options["lora_r"]
