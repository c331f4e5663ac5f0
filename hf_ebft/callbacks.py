"""What watches a run."""

from __future__ import annotations

from typing import Any

from transformers import (
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_ebft.metrics import PREFIX

# Logged name -> its name on the line. A long log shrinks to these; everything is in TensorBoard.
SHOWN = {
    "loss": "loss",
    f"{PREFIX}cfm_loss": "cfm_loss",
    f"{PREFIX}alignment": "alignment",
    f"{PREFIX}diversity": "diversity",
    f"{PREFIX}ce_loss": "ce",
    f"{PREFIX}entropy": "entropy",
}
EVALUATION_PREFIX = "eval_"


class CompactProgressCallback(ProgressCallback):
    """The progress bar of `Trainer`, with one short line per log instead of the whole dict."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write step and main figures above the bar."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            line = compact_line(logs)
            if line:
                self.training_bar.write(f"step {state.global_step}/{state.max_steps}  {line}")


def compact_line(logs: dict[str, Any]) -> str:
    """The main figures of a training or evaluation log; empty for a log without any."""
    prefix = EVALUATION_PREFIX if f"{EVALUATION_PREFIX}loss" in logs else ""
    figures = [
        f"{label} {logs[prefix + name]:.4g}"
        for name, label in SHOWN.items()
        if prefix + name in logs
    ]
    if prefix and figures:
        figures.insert(0, "eval:")
    return "  ".join(figures)


def use_compact_progress(trainer: Trainer) -> None:
    """Replace the progress bar of a trainer by the compact one.

    Without a bar (``disable_tqdm``) nothing changes.
    """
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(CompactProgressCallback)
