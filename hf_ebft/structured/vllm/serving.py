"""Starts the vLLM server that a run samples from, by the run's own YAML.

    python -m hf_ebft.structured.vllm.serving --config run.yaml --print_only    # shows the command
    python -m hf_ebft.structured.vllm.serving --config run.yaml --python .venv-vllm/bin/python
    python -m hf_ebft.structured.vllm.serving --config run.yaml -- --max-num-seqs 64 --enforce-eager

The YAML decides what the trainer relies on: the model and its precision, adapters loaded at run
time (`vllm_lora_sync`) or reloading of all weights (`vllm_full_sync`), log-probs at the sampling
temperature. Whatever follows `--` goes to the server as it is. vLLM usually has an environment of
its own; `--python` names that environment's interpreter.

On a machine with two GPUs, give the server one and the trainer the other:

    CUDA_VISIBLE_DEVICES=0 python -m hf_ebft.structured.vllm.serving --config run.yaml
    CUDA_VISIBLE_DEVICES=1 accelerate launch examples/run_ebft.py --config run.yaml

On one GPU both share it: set `vllm_gpu_memory_utilization` to the share that the server may have.
Without a GPU, `--device cpu` is chosen by itself.

The server listens on this machine only. `--listen 0.0.0.0` opens it to a trainer on another one;
whoever can reach it can then load weights into it, so keep that to a private network.
"""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from hf_ebft.structured.vllm.settings import VLLMServerSettings

SERVED_NAME = "base"
MODULE = "vllm.entrypoints.openai.api_server"
"""Started as a module: the `vllm` command fails in builds whose distribution has another name."""


def main(argv: Sequence[str] | None = None) -> None:
    """Read the YAML, print the server's command line, become the server.

    Args:
        argv: of the command line; default: the process'.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    ours, extra = split_at(argv, "--")
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args(ours)
    try:
        command, environment = server_command_line(arguments, extra)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"{arguments.config}: {error}")
    shown = [f"{name}={value}" for name, value in environment.items()]
    print(" ".join([*shown, shlex.join(command)]), flush=True)
    if not arguments.print_only:
        os.execve(arguments.python, command, {**os.environ, **environment})


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what the command line may say beside the YAML."""
    parser.add_argument("--config", required=True, help="the YAML of the run")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has vLLM")
    parser.add_argument("--listen", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument(
        "--cpu_cache_gib", type=int, default=4, help="memory for keys and values on a CPU, in GiB"
    )
    parser.add_argument("--print_only", action="store_true", help="start nothing")


def server_command_line(
    arguments: Namespace, extra: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """The server's command line and its environment.

    Args:
        arguments: those of `add_arguments`.
        extra: arguments of the server's own.

    Raises:
        OSError: the YAML cannot be read.
        yaml.YAMLError: it is no YAML.
        ValueError: it is not that of a run, or of one that a stock server cannot serve.
    """
    options = yaml.safe_load(Path(arguments.config).read_text(encoding="utf-8")) or {}
    if not isinstance(options, dict):
        raise ValueError(f"it holds a {type(options).__name__}, not options of a run.")
    options = {name: value for name, value in options.items() if value is not None}
    on_cpu = arguments.device == "cpu" or (arguments.device == "auto" and not has_gpu(options))
    environment, server = server_command(
        options,
        listen=arguments.listen,
        cpu_cache_gib=arguments.cpu_cache_gib if on_cpu else None,
    )
    return [arguments.python, "-m", MODULE, *server, *extra], environment


def split_at(values: list[str], mark: str) -> tuple[list[str], list[str]]:
    """What stands before and after a value; nothing after it if it is not there."""
    place = values.index(mark) if mark in values else len(values)
    return values[:place], values[place + 1 :]


def has_gpu(options: Mapping[str, Any]) -> bool:
    """Whether the run is meant for a GPU and there is one."""
    import torch

    return not options.get("use_cpu", False) and torch.cuda.is_available()


def server_command(
    options: Mapping[str, Any], *, listen: str, cpu_cache_gib: int | None
) -> tuple[dict[str, str], list[str]]:
    """Environment and arguments of the server for a run's options.

    Args:
        options: of the run, as its YAML holds them.
        listen: address to listen on.
        cpu_cache_gib: memory for keys and values, in GiB, on a CPU; None on a GPU.

    Raises:
        ValueError: options with which a stock server cannot serve the run.
    """
    names = {entry.name for entry in fields(VLLMServerSettings)}
    settings = VLLMServerSettings(**{name: options[name] for name in names & set(options)})
    if not settings.samples_on_server:
        raise ValueError(
            "neither vllm_lora_sync nor vllm_full_sync is on, so this run samples from no stock "
            "vLLM server; turn one of them on."
        )
    if "model_name_or_path" not in options:
        raise ValueError("model_name_or_path is missing: the server would not know what to serve.")
    if options.get("gguf_file") is not None:
        raise ValueError("gguf_file: save the model as safetensors first and serve that.")
    rank = int(options.get("lora_r", 0)) if settings.vllm_lora_sync else 0
    if rank > settings.vllm_max_lora_rank:
        raise ValueError(
            f"lora_r={rank} is above vllm_max_lora_rank={settings.vllm_max_lora_rank}; raise that."
        )
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    arguments = [
        *("--model", str(options["model_name_or_path"])),
        *("--served-model-name", settings.vllm_served_model_name or SERVED_NAME),
        *("--host", listen),
        *("--port", str(urlsplit(settings.vllm_url).port or 80)),
        *("--dtype", server_dtype(settings, options)),
        *("--logprobs-mode", "processed_logprobs"),
    ]
    if settings.vllm_lora_sync:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        arguments += ["--enable-lora", "--max-loras", "2"]
        arguments += ["--max-lora-rank", str(settings.vllm_max_lora_rank)]
    else:
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    for option, argument in (
        ("model_revision", "--revision"),
        ("tokenizer_name_or_path", "--tokenizer"),
        ("vllm_max_model_length", "--max-model-len"),
        ("vllm_tensor_parallel_size", "--tensor-parallel-size"),
    ):
        if options.get(option) is not None:
            arguments += [argument, str(options[option])]
    if options.get("trust_remote_code", False):
        arguments.append("--trust-remote-code")
    if cpu_cache_gib is not None:
        # Without the first it takes most of the machine's memory.
        environment |= {"VLLM_CPU_KVCACHE_SPACE": str(cpu_cache_gib), "TORCHDYNAMO_DISABLE": "1"}
        arguments.append("--enforce-eager")
    elif options.get("vllm_gpu_memory_utilization") is not None:
        arguments += ["--gpu-memory-utilization", str(options["vllm_gpu_memory_utilization"])]
    return environment, arguments


def server_dtype(settings: VLLMServerSettings, options: Mapping[str, Any]) -> str:
    """The precision that the policy computes in, unless `vllm_dtype` says another."""
    if settings.vllm_dtype != "auto":
        return settings.vllm_dtype
    if options.get("fp16", False):
        return "float16"
    if options.get("bf16", True):  # what TRL's configuration makes of neither
        return "bfloat16"
    return str(options.get("dtype", "float32"))


if __name__ == "__main__":
    main()
