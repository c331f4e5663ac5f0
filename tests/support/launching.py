"""Launches a worker script in two processes through `accelerate launch`, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml

TESTS = Path(__file__).parents[1]
CONFIGS = TESTS.parent / "accelerate_configs"
STRIDED_WORKER = TESTS / "distributed" / "worker.py"
STRUCTURED_WORKER = TESTS / "distributed" / "structured_worker.py"
VLLM_WORKER = TESTS / "structured" / "vllm" / "worker.py"
PROCESSES = 2


def launch(worker, scenario, folder, config, *, url=None, timeout=400, overrides=None):
    """Run a worker script under one of the shipped accelerate configurations.

    Args:
        worker: path of the script.
        scenario: which of its runs.
        folder: where it writes.
        config: name of a file in `accelerate_configs`; those of FSDP take the FSDP2 path over gloo.
        url: of the server that it samples from, if it does.
        timeout: in seconds.
        overrides: entries of `fsdp_config` to set otherwise.

    Returns:
        The finished process (output captured).
    """
    settings = yaml.safe_load((CONFIGS / config).read_text())
    settings |= {
        "use_cpu": True,
        "num_processes": PROCESSES,
        "num_machines": 1,
        "main_process_port": 0,
        "mixed_precision": "no",
    }
    settings.pop("gpu_ids", None)
    if overrides:
        settings["fsdp_config"] |= overrides
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(settings))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    environment.pop("ACCELERATE_USE_CPU", None)
    if "fsdp_config" in settings:
        environment["HF_EBFT_TEST_FSDP_ON_CPU"] = "1"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    return subprocess.run(
        [*command, str(worker), scenario, *([] if url is None else [url]), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def results(worker, scenario, folder, config, **settings):
    """What every process saw: `<folder>/rank<i>.pt`, in the order of their ranks."""
    finished = launch(worker, scenario, folder, config, **settings)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(PROCESSES)]
