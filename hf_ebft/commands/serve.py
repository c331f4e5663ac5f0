"""`hf-ebft serve`: the vLLM server that a run samples from, started by the run's own YAML.

    hf-ebft serve --config run.yaml --print_only    # shows the command
    hf-ebft serve --config run.yaml --python .venv-vllm/bin/python
    hf-ebft serve --config run.yaml -- --max-num-seqs 64 --enforce-eager

The YAML decides what the trainer relies on: the model and its precision, adapters loaded at run
time (`vllm_lora_sync`) or reloading of all weights (`vllm_full_sync`), log-probs at the sampling
temperature. Whatever follows `--` goes to the server as it is. vLLM usually has an environment of
its own; `--python` names that environment's interpreter.

On a machine with two GPUs, give the server one and the trainer the other:

    CUDA_VISIBLE_DEVICES=0 hf-ebft serve --config run.yaml
    CUDA_VISIBLE_DEVICES=1 accelerate launch -m hf_ebft train --config run.yaml

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
from typing import Any

from hf_ebft.commands.yaml_files import read_mapping
from hf_ebft.structured.vllm.serving import server_command

MODULE = "vllm.entrypoints.openai.api_server"
"""Started as a module: the `vllm` command fails in builds whose distribution has another name."""


def main(argv: Sequence[str]) -> None:
    """Read the YAML, print the server's command line, become the server."""
    ours, extra = split_at(list(argv), "--")
    parser = ArgumentParser(
        prog="hf-ebft serve", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args(ours)
    command, environment = server_command_line(arguments, extra)
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
        ValueError: it is not that of a run, or of one that a stock server cannot serve.
    """
    options = read_mapping(arguments.config)
    options = {name: value for name, value in options.items() if value is not None}
    on_cpu = arguments.device == "cpu" or (arguments.device == "auto" and not has_gpu(options))
    try:
        environment, server = server_command(
            options,
            listen=arguments.listen,
            cpu_cache_gib=arguments.cpu_cache_gib if on_cpu else None,
        )
    except ValueError as error:
        raise ValueError(f"{arguments.config}: {error}") from error
    return [arguments.python, "-m", MODULE, *server, *extra], environment


def split_at(values: list[str], mark: str) -> tuple[list[str], list[str]]:
    """What stands before and after a value; nothing after it if it is not there."""
    place = values.index(mark) if mark in values else len(values)
    return values[:place], values[place + 1 :]


def has_gpu(options: Mapping[str, Any]) -> bool:
    """Whether the run is meant for a GPU and there is one."""
    import torch

    return not options.get("use_cpu", False) and torch.cuda.is_available()
