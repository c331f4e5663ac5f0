"""`preflight`: measure a run before it starts."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from hf_ebft.preflight.budget import Deadline
from hf_ebft.preflight.cost import measure_cost
from hf_ebft.preflight.documents import (
    FEWEST_ROWS,
    Batch,
    choose_batches,
    in_random_order,
)
from hf_ebft.preflight.gradients import measure_products
from hf_ebft.preflight.headroom import measure_headroom
from hf_ebft.preflight.ladder import check_rewards
from hf_ebft.preflight.result import Preflight, Settings
from hf_ebft.preflight.signal import signal_of
from hf_ebft.preflight.stand_in import stand_in
from hf_ebft.preflight.verdict import judge
from hf_ebft.trainer import EBFTTrainer

DOCUMENTS = 64
Found = TypeVar("Found")


def preflight(
    trainer: EBFTTrainer,
    *,
    documents: int = DOCUMENTS,
    minutes: float | None = None,
    processes: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Preflight:
    """Measure cost, rewards, headroom and signal of a run on some of its training text.

    Afterwards the trainer's state is restored to the bit, so a following run is not affected.

    Args:
        trainer: a trainer that is ready to train, on one process.
        documents: number of rows of the training data to measure on; more give narrower intervals.
        minutes: time after which no further row is begun; every part measures at least
            `FEWEST_ROWS` rows. Default: no limit.
        processes: number of processes that the run will have; steps, documents per step and hours
            are computed for it.
        say: is called with lines about the progress.

    Raises:
        ValueError: the trainer is of another kind, is training, or has several processes; a number
            is out of range; or there is too little text.
    """
    _check(documents, minutes, processes)
    deadline = Deadline.after(None if minutes is None else 60 * minutes)
    seconds: dict[str, float] = {}

    def timed(part: str, measure: Callable[[], Found]) -> Found:
        say(f"Measuring {part} ...")
        begun = time.perf_counter()
        found = measure()
        seconds[part] = time.perf_counter() - begun
        return found

    with stand_in(trainer) as own:
        batches = in_random_order(choose_batches(own, documents), own.args.seed)
        settings = _settings(own, batches)
        rewards = timed("rewards", lambda: check_rewards(own, batches, deadline.part(0.15)))
        headroom = timed("headroom", lambda: measure_headroom(own, batches, deadline.part(0.3)))
        own.random_streams.restart()
        products = timed("signal", lambda: measure_products(own, batches, deadline.part(0.8)))
        cost = timed("cost", lambda: measure_cost(own, processes=processes))
    found = Preflight(
        settings, signal_of(products), headroom, rewards, cost, _machine(trainer), seconds
    )
    return dataclasses.replace(found, findings=judge(found))


def _check(documents: int, minutes: float | None, processes: int) -> None:
    if documents < FEWEST_ROWS:
        raise ValueError(
            f"documents={documents} is too few for an interval; write {FEWEST_ROWS} or more (the "
            f"default is {DOCUMENTS})."
        )
    if minutes is not None and minutes <= 0:
        raise ValueError(f"minutes={minutes} leaves no time; write a number above 0.")
    if processes < 1:
        raise ValueError(
            f"processes={processes} must be at least 1: write the number of processes of the run."
        )


def _settings(trainer: EBFTTrainer, batches: list[Batch]) -> Settings:
    args, ebft = trainer.args, trainer.ebft
    rows: Any = trainer.train_dataset
    return Settings(
        per_device_train_batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        n_samples_per_prompt=ebft.n_samples_per_prompt,
        temperature=ebft.temperature,
        generate_max_len=ebft.generate_max_len,
        ce_coef=ebft.ce_coef,
        packed=any(float(trainer.document_reader.read(batch).count) > 1 for batch in batches),
        one_epoch=len(rows) if hasattr(rows, "__len__") else None,
    )


def _machine(trainer: EBFTTrainer) -> str:
    device = trainer.args.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread(s), {platform.machine()}"
