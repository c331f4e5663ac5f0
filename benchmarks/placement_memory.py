"""Peak memory per process by placement of the feature network, with the expected bytes beside it.

    python benchmarks/placement_memory.py                 # measures, two processes on this machine
    python benchmarks/placement_memory.py --expected      # only computes, for 1 B, 8 B and 70 B
    parameters

Every placement runs in processes of its own: a step of training under FSDP2 (over gloo on a machine
without accelerators), then the process's peak resident memory, and the bytes that the feature
network and the policy really hold there. The reference is the same run with the smallest feature
network that exists, a shared one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).parents[1]
GIB = 2**30
# Per trainable parameter under mixed precision: float32 weight, gradient and two Adam moments.
FULL_STATES = 16
# A frozen weight, and a feature network loaded with feature_dtype=bfloat16.
BFLOAT16 = 2
# LoRA of rank 16 on all linear layers trains about 1 % of the parameters of a Llama.
LORA_SHARE = 0.01
MEASURED = ("shared", "same_device", "sharded")


@dataclass(frozen=True)
class Expected:
    """Bytes per process, activations not included."""

    policy: float
    features: float

    @property
    def total(self) -> float:
        return self.policy + self.features


def expected(parameters: float, processes: int, placement: str, *, lora: bool) -> Expected:
    """What a process holds under FSDP2, from the number of parameters alone."""
    if lora:
        policy = parameters * (BFLOAT16 + LORA_SHARE * FULL_STATES) / processes
    else:
        policy = parameters * FULL_STATES / processes
    whole = parameters * BFLOAT16
    features = {"shared": 0.0, "same_device": whole, "sharded": whole / processes}[placement]
    return Expected(policy, features)


def print_expected() -> None:
    """The table of docs/distributed.md."""
    print("| parameters | GPUs | full, replicated | full, sharded | LoRA, shared |")
    print("|---|---|---|---|---|")
    for parameters in (1e9, 8e9, 70e9):
        for processes in (1, 8, 64):
            cells = [
                expected(parameters, processes, "same_device", lora=False),
                expected(parameters, processes, "sharded", lora=False),
                expected(parameters, processes, "shared", lora=True),
            ]
            sizes = " | ".join(f"{cell.total / GIB:.1f}" for cell in cells)
            print(f"| {parameters / 1e9:.0f} B | {processes} | {sizes} |")


def local_bytes(model: nn.Module) -> int:
    """Bytes of weights that this process holds."""
    return sum(
        local.numel() * local.element_size()
        for local in (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    )


def worker(placement: str) -> None:
    """One process: build, train one step, report."""
    sys.path.insert(0, str(ROOT))
    if not torch.accelerator.is_available():
        from tests.distributed import fsdp_on_cpu

        fsdp_on_cpu.enable()
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_ebft import EBFTConfig, EBFTTrainer
    from hf_ebft.sharding import full_bytes

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=12,
            num_attention_heads=16,
            num_key_value_heads=8,
        )
    )
    whole = full_bytes(model)
    trainer = EBFTTrainer(
        model,
        EBFTConfig(
            output_dir=tempfile.mkdtemp(),
            report_to=[],
            max_steps=1,
            per_device_train_batch_size=1,
            save_strategy="no",
            feature_placement=placement,
            verify_packing=False,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": list(range(32))} for _ in range(4)],
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    network = trainer.feature_network
    report = {
        "placement": placement,
        "process": trainer.args.process_index,
        "whole_bytes": whole,
        "policy_bytes": local_bytes(trainer.model),
        "feature_bytes": 0 if network.shared else local_bytes(network.model),
        "peak_bytes": _peak_bytes(),
    }
    print("REPORT " + json.dumps(report), flush=True)


def _peak_bytes() -> int:
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def measure(placement: str) -> list[dict[str, int]]:
    """Run one placement in two processes."""
    settings = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2_lora.yaml").read_text())
    on_cpu = not torch.accelerator.is_available()
    settings |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": on_cpu}
    settings["main_process_port"] = 0
    settings["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] = False
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(settings, file)
        file.flush()
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file.name]
        output = subprocess.run(
            [*command, __file__, "--worker", placement],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    lines = [line for line in output.splitlines() if "REPORT " in line]
    return [json.loads(line.split("REPORT ", 1)[1]) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--expected", action="store_true", help="Print the computed table and stop."
    )
    parser.add_argument("--worker", choices=MEASURED, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="Write the raw figures here.")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    if arguments.expected:
        print_expected()
        return
    reports = {placement: measure(placement) for placement in MEASURED}
    print("| placement | feature network, MiB | expected, MiB | peak over shared, MiB |")
    print("|---|---|---|---|")
    base = max(report["peak_bytes"] for report in reports["shared"])
    for placement, processes in reports.items():
        held = max(report["feature_bytes"] for report in processes)
        whole = processes[0]["whole_bytes"]
        share = {"shared": 0.0, "same_device": 1.0, "sharded": 0.5}[placement]
        peak = max(report["peak_bytes"] for report in processes) - base
        mib = 2**20
        print(f"| {placement} | {held / mib:.0f} | {share * whole / mib:.0f} | {peak / mib:.0f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    main()
