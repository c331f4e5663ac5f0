"""Measures the seconds and the memory of a step, and computes those of the whole run."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from hf_ebft.preflight.budget import Clock
from hf_ebft.preflight.stand_in import weights_kept
from hf_ebft.trainer import EBFTTrainer

WARM_UP, MEASURED = 1, 2
# Largest number of accumulation steps that are measured; their time is scaled to the run's number.
MOST_ACCUMULATED = 2
_SECONDS_BETWEEN_LOOKS = 0.01


@dataclass(frozen=True)
class Cost:
    """The cost of an optimizer step on one process, and of the run.

    Attributes:
        seconds: seconds of a step; NaN if it does not fit into memory.
        phases: seconds of a micro-batch by phase.
        memory: peak memory in bytes.
        memory_of: the kind of memory: "resident set" on a CPU, "CUDA allocations" on a GPU.
        memory_there: bytes of memory that the machine, or the device, has.
        rows_per_step: rows of a step, over micro-batches and processes.
        steps: number of steps of the run; None if the data has no length and max_steps is unset.
        processes: number of processes that the run will have.
        fits: whether the step fits into memory.
    """

    seconds: float
    phases: dict[str, float]
    memory: int
    memory_of: str
    memory_there: int
    rows_per_step: int
    steps: int | None
    processes: int
    fits: bool = True

    @property
    def hours(self) -> float | None:
        """Hours of the run, without evaluations and checkpoints."""
        return None if self.steps is None else self.steps * self.seconds / 3600

    @property
    def rows(self) -> int | None:
        """Number of rows that the run will train on."""
        return None if self.steps is None else self.steps * self.rows_per_step


@dataclass
class StepTimer(TrainerCallback):
    """Seconds of micro-batches and of the optimizer, after some steps of warm-up.

    Attributes:
        clock: synchronizes with the device and returns the time in seconds.
        warm_up: number of steps that are not measured.
        micro_batches: seconds of all micro-batches of each step, clipping included.
        optimizer: seconds of the optimizer in each step.
    """

    clock: Clock
    warm_up: int = WARM_UP
    micro_batches: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    _begun: float = 0.0
    _ready: float = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the start of the first micro-batch."""
        self._begun = self.clock()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the end of the micro-batches."""
        self._ready = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the end of the step."""
        if state.global_step > self.warm_up:
            self.micro_batches.append(self._ready - self._begun)
            self.optimizer.append(self.clock() - self._ready)

    def seconds(self, measured: int, wanted: int) -> float:
        """Seconds of a step.

        Args:
            measured: number of micro-batches of a measured step.
            wanted: number of micro-batches of a step of the run.
        """
        micro_batches = sum(self.micro_batches) / len(self.micro_batches)
        optimizer = sum(self.optimizer) / len(self.optimizer)
        return micro_batches * wanted / measured + optimizer


def measure_cost(
    trainer: EBFTTrainer, *, processes: int = 1, clock: Clock = time.perf_counter
) -> Cost:
    """Train for three steps, measure the last two, and restore the weights.

    Args:
        trainer: a stand-in; its settings are changed.
        processes: number of processes that the run will have.
        clock: returns the time in seconds.
    """
    args, device = trainer.args, trainer.args.device
    steps = total_steps(trainer, processes)
    wanted = args.gradient_accumulation_steps
    args.gradient_accumulation_steps = min(wanted, MOST_ACCUMULATED)
    args.max_steps = WARM_UP + MEASURED
    args.disable_tqdm = True

    def synchronized() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return clock()

    timer = StepTimer(synchronized)
    trainer.callback_handler.add_callback(timer)
    fits = True
    with weights_kept(trainer.model) as copies, _peak(device) as peak:
        try:
            trainer.train()
        except (torch.OutOfMemoryError, MemoryError):
            fits = False
    means = trainer.step_log.take()
    return Cost(
        seconds=timer.seconds(args.gradient_accumulation_steps, wanted) if fits else math.nan,
        phases={
            name: means[f"ebft/seconds_{name}"]
            for name in ("rollout", "features", "training")
            if f"ebft/seconds_{name}" in means
        },
        memory=peak.bytes - (copies if device.type == "cpu" else 0),
        memory_of="resident set" if device.type == "cpu" else "CUDA allocations",
        memory_there=_memory_there(device),
        rows_per_step=args.train_batch_size * wanted * processes,
        steps=steps,
        processes=processes,
        fits=fits,
    )


def total_steps(trainer: EBFTTrainer, processes: int) -> int | None:
    """Number of optimizer steps of the run; None if it depends on data of unknown length."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    if not isinstance(trainer.train_dataset, Sized):
        return None
    batches = len(trainer.train_dataset) / (args.train_batch_size * processes)
    whole = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    steps_per_epoch = max(1, math.ceil(whole / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * steps_per_epoch)


def _memory_there(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


@dataclass
class _Peak:
    """The largest number of bytes so far."""

    bytes: int = 0


@contextmanager
def _peak(device: torch.device) -> Iterator[_Peak]:
    """Measure the peak memory while the block runs, including memory allocated before."""
    peak = _Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield peak
        finally:
            peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    process, done = psutil.Process(), threading.Event()

    def look() -> None:
        while not done.is_set():
            peak.bytes = max(peak.bytes, process.memory_info().rss)
            done.wait(_SECONDS_BETWEEN_LOOKS)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
