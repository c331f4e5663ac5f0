"""The command line of the server that a run's YAML makes."""

import itertools
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

from hf_ebft.structured.vllm.serving import server_command, server_dtype
from hf_ebft.structured.vllm.settings import VLLMServerSettings

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
