"""Training by cross-entropy or by EBFT for a number of seconds instead of a number of steps.

Dimension letters: R rows, S tokens of a row.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_ebft import EBFTConfig, EBFTTrainer


class Rows(Dataset[dict[str, Tensor]]):
    """Rows (R, S) of token ids, with labels for `Trainer`."""

    def __init__(self, rows: NDArray[Any], with_labels: bool) -> None:
        self.rows, self.with_labels = rows, with_labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids} if self.with_labels else {"input_ids": ids}


class Clock(TrainerCallback):
    """Ends a run after so many seconds, and sets the learning rate by the share that is over.

    In the first twentieth of the time the rate rises, from a tenth; then it falls to zero, or
    stays. The first step is not counted.

    Attributes:
        seconds: that were used.
    """

    def __init__(self, limit: float, rate: float, falls: bool, device: torch.device) -> None:
        self.limit, self.rate, self.falls, self.device = limit, rate, falls, device
        self.start: float | None = None
        self.seconds = 0.0

    def factor(self, share: float) -> float:
        """What multiplies the rate at this share of the time."""
        rising = min(1.0, 0.1 + share / 0.05)
        return min(rising, max(0.0, 1.0 - share) / 0.95) if self.falls else rising

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the rate of this step."""
        rate = self.rate * self.factor(self.seconds / self.limit)
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock, with the device's work done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        if self.start is None:
            self.start = now
        self.seconds = now - self.start
        control.should_training_stop = self.seconds >= self.limit


def train(
    model: Any,
    rows: NDArray[Any],
    *,
    device: torch.device,
    seconds: float,
    settings: Mapping[str, Any],
    falls: bool = True,
    method: str = "sft",
) -> dict[str, Any]:
    """Train a model in place, in bf16 autocast; what came out, for the record.

    Args:
        model: with float32 weights, on the device.
        rows: (R, S) token ids.
        device: where.
        seconds: see `Clock`.
        settings: of `TrainingArguments`, or of `EBFTConfig`; `learning_rate` among them.
        falls: see `Clock`.
        method: "sft" or "ebft".
    """
    clock = Clock(seconds, settings["learning_rate"], falls, device)
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "use_cpu": device.type == "cpu",
            "bf16": True,
            "max_steps": 1_000_000,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "adam_beta2": 0.95,
            "max_grad_norm": 1.0,
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_drop_last": True,
        } | dict(settings)
        data, callbacks = Rows(rows, with_labels=method == "sft"), [clock]
        trainer: Trainer
        if method == "sft":
            args = TrainingArguments(**common)
            trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks)  # type: ignore[arg-type]
        else:
            trainer = EBFTTrainer(
                model, EBFTConfig(**common), train_dataset=data, callbacks=callbacks
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    steps = trainer.state.global_step
    return {
        "steps": steps,
        "seconds": clock.seconds,
        "document_tokens": steps * common["per_device_train_batch_size"] * rows.shape[1],
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
