"""`hf-ebft serve`: start the vLLM server that a run samples from, as the run's YAML says.

    hf-ebft serve --config run.yaml --print_only    # shows the command
    hf-ebft serve --config run.yaml --python .venv-vllm/bin/python
    hf-ebft serve --config run.yaml -- --max-num-seqs 64 --enforce-eager

The YAML sets what the trainer relies on: the model and its precision, adapters loaded at run time
(`vllm_lora_sync`) or reloading of all weights (`vllm_full_sync`), and log-probs at the sampling
temperature. Arguments after `--` are passed to the server unchanged. vLLM is usually installed in
an environment of its own; `--python` names the interpreter of that environment.

On a machine with two GPUs, give the server one and the trainer the other:

    CUDA_VISIBLE_DEVICES=0 hf-ebft serve --config run.yaml
    CUDA_VISIBLE_DEVICES=1 accelerate launch -m hf_ebft train --config run.yaml

With one GPU, both share it: set `vllm_gpu_memory_utilization` to the share of its memory that the
server may use. Without a GPU, `--device auto` means `cpu`.

The server accepts connections from this machine only. `--listen 0.0.0.0` opens it to a trainer on
another one. Everybody who can reach it can then load weights into it, so do that in a private
network only.
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
"""vLLM is started as a module, since the command `vllm` fails in builds of another name."""


def main(argv: Sequence[str]) -> None:
    """Read the YAML, print the server's command line, and replace this process by the server."""
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
    """Declare the options of the command line."""
    parser.add_argument("--config", required=True, help="the YAML of the run")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has vLLM")
    parser.add_argument("--listen", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument(
        "--cpu_cache_gib", type=int, default=4, help="GiB of memory for the KV cache on a CPU"
    )
    parser.add_argument(
        "--print_only", action="store_true", help="print the command line and start nothing"
    )


def server_command_line(
    arguments: Namespace, extra: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """The server's command line and its environment.

    Args:
        arguments: the parsed options of `add_arguments`.
        extra: further arguments, for the server itself.

    Raises:
        OSError: the YAML cannot be read.
        ValueError: the YAML is not that of a run, or the run needs what a stock server cannot do.
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
    """The values before and after `mark`; all of them, and none, if it is missing."""
    index = values.index(mark) if mark in values else len(values)
    return values[:index], values[index + 1 :]


def has_gpu(options: Mapping[str, Any]) -> bool:
    """Whether the run is meant for a GPU and there is one."""
    import torch

    return not options.get("use_cpu", False) and torch.cuda.is_available()
