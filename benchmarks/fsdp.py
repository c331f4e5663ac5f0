"""FSDP2: memory by placement of the feature network, and sampling with parameters gathered or not.

    python benchmarks/fsdp.py              # measures, two processes on this machine
    python benchmarks/fsdp.py --expected   # only computes, for 1 B, 8 B and 70 B parameters

Every setting runs in processes of its own: a few steps of training under FSDP2 (over gloo on a
machine without accelerators), then the process's peak resident memory, and the bytes that the
feature network and the policy really hold there. The reference is the run with the smallest feature
network that exists, a shared one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.distributed.tensor import DTensor

from hf_ebft.config import GATHER_PARAMS, GatherParams

ROOT = Path(__file__).parents[1]
GIB = 2**30
# Per trainable parameter under mixed precision: float32 weight, gradient and two Adam moments.
FULL_STATES = 16
# A frozen weight, and a feature network loaded with feature_dtype=bfloat16.
BFLOAT16 = 2
# LoRA of rank 16 on all linear layers trains about 1 % of the parameters of a Llama.
LORA_SHARE = 0.01
PLACEMENTS = ("shared", "same_device", "sharded")
STEPS = 4


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


def worker(placement: str, gather: GatherParams, reports: Path) -> None:
    """One process: build, train a few steps, report."""
    sys.path.insert(0, str(ROOT))
    if not torch.accelerator.is_available():
        from tests.support import fsdp_on_cpu

        fsdp_on_cpu.enable()
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_ebft import EBFTConfig, EBFTTrainer
    from hf_ebft.packed.fsdp import full_bytes

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
            use_cpu=not torch.accelerator.is_available(),
            max_steps=STEPS,
            logging_steps=1,
            per_device_train_batch_size=1,
            save_strategy="no",
            feature_placement=placement,
            gather_params_for_sampling=gather,
            verify_packing=False,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": list(range(32))} for _ in range(4)],
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    network = trainer.feature_network
    seconds = [
        entry["ebft/seconds_rollout"]
        for entry in trainer.state.log_history
        if "ebft/seconds_rollout" in entry
    ]
    report = {
        "placement": placement,
        "gather": gather,
        "seconds_rollout": statistics.median(seconds[1:]),
        "process": trainer.args.process_index,
        "whole_bytes": whole,
        "policy_bytes": local_bytes(trainer.model),
        "feature_bytes": 0 if network.shared else local_bytes(network.model),
        "peak_bytes": _peak_bytes(),
    }
    path = reports / f"{trainer.args.process_index}.json"
    path.write_text(json.dumps(report))
    trainer.accelerator.end_training()  # an open process group sometimes aborts at exit


def _peak_bytes() -> int:
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def measure(placement: str, gather: GatherParams = "true") -> list[dict[str, Any]]:
    """Run one setting in two processes."""
    settings = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2_lora.yaml").read_text())
    on_cpu = not torch.accelerator.is_available()
    settings |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": on_cpu}
    settings["main_process_port"] = 0
    settings["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] = False
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "accelerate.yaml")
        config.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        subprocess.run(
            [*command, __file__, "--worker", placement, "--gather", gather, "--reports", folder],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--expected", action="store_true", help="Print the computed table and stop."
    )
    parser.add_argument("--worker", choices=PLACEMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--reports", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gather", choices=GATHER_PARAMS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="Write the raw figures here.")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.gather, arguments.reports)
        return
    if arguments.expected:
        print_expected()
        return
    reports = {placement: measure(placement) for placement in PLACEMENTS}
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
    settings: tuple[GatherParams, ...] = ("true", "false")
    sampling = {gather: measure("shared", gather) for gather in settings}
    print("\n| gather_params_for_sampling | sampling, s a step | peak, MiB |")
    print("|---|---|---|")
    for gather, processes in sampling.items():
        seconds = max(report["seconds_rollout"] for report in processes)
        peak = max(report["peak_bytes"] for report in processes)
        print(f"| {gather} | {seconds:.2f} | {peak / 2**20:.0f} |")
    if arguments.json:
        figures = {"placements": reports, "sampling": sampling}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
