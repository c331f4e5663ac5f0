"""Makes the command line of the stock vLLM server for a run, from the run's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

from hf_ebft.structured.vllm.settings import VLLMServerSettings

SERVED_NAME = "base"


def server_command(
    options: Mapping[str, Any], *, listen: str, cpu_cache_gib: int | None
) -> tuple[dict[str, str], list[str]]:
    """Environment and arguments of the server for a run's options.

    Args:
        options: options of the run, from its YAML.
        listen: address to listen on.
        cpu_cache_gib: GiB of memory for the KV cache on a CPU; None on a GPU.

    Raises:
        ValueError: a stock server cannot serve a run with these options.
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
    """The precision of `vllm_dtype`; if that is 'auto', the one in which the policy computes."""
    if settings.vllm_dtype != "auto":
        return settings.vllm_dtype
    if options.get("fp16", False):
        return "float16"
    if options.get("bf16", True):  # what TRL's configuration makes of neither
        return "bfloat16"
    return str(options.get("dtype", "float32"))
