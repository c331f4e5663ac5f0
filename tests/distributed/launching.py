"""Launches `worker.py` in two processes through `accelerate launch`."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "accelerate_configs"
PROCESSES = 2


def launch(scenario, folder, config, *, fsdp=False, timeout=300, overrides=None):
    """Run a scenario under one of the shipped accelerate configurations, on the CPU.

    Returns:
        The finished process (output captured).
    """
    settings = yaml.safe_load((CONFIGS / config).read_text())
    settings |= {
        "use_cpu": True,
        "num_processes": PROCESSES,
        "num_machines": 1,
        "main_process_port": 0,
    }
    settings["mixed_precision"] = "no"
    settings.pop("gpu_ids", None)
    if overrides:
        settings["fsdp_config"] |= overrides
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(settings))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)
    if fsdp:
        environment["HF_EBFT_TEST_FSDP_ON_CPU"] = "1"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    return subprocess.run(
        [*command, str(HERE / "worker.py"), scenario, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def results(scenario, folder, config, **kwargs):
    """What every process of a scenario saw, in the order of their ranks."""
    finished = launch(scenario, folder, config, **kwargs)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(PROCESSES)]
