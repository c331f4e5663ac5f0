"""Terminal output: a short progress bar, and a table of first and last metrics after a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_ebft.training.metric_table import METRICS, PHASES, label_of, metric_of
from hf_ebft.watching.curves import changes, format_number, series_of

# Logged name -> its name on the progress line. Other metrics are in TensorBoard only.
SHOWN = {"loss": "loss"} | {metric.name: metric.short for metric in METRICS if metric.short}
EVALUATION_PREFIX = "eval_"
SUMMARY_HEAD = ("", "first", "last", "")
# Colours of the terminal; the words have the same meaning.
STYLES = {"better": "cyan", "worse": "yellow"}


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
        """Write step and main metrics above the bar."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            line = compact_line(logs)
            if line:
                self.training_bar.write(f"step {state.global_step}/{state.max_steps}  {line}")


def compact_line(logs: dict[str, Any]) -> str:
    """The main metrics of a training or evaluation log; empty for a log without any."""
    prefix = EVALUATION_PREFIX if f"{EVALUATION_PREFIX}loss" in logs else ""
    metrics = [
        f"{label} {logs[prefix + name]:.4g}"
        for name, label in SHOWN.items()
        if prefix + name in logs
    ]
    if prefix and metrics:
        metrics.insert(0, "eval:")
    return "  ".join(metrics)


class SummaryCallback(TrainerCallback):
    """Prints a table when training ends: first and last values of the main metrics.

    `rich` prints it if it is installed and the output is a terminal or a notebook; else the table
    is plain text.
    """

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Print the table in the main process."""
        rows = summary_rows(state.log_history)
        if state.is_world_process_zero and rows:
            print_table(f"Training, {state.global_step} steps", rows, time_line(state.log_history))


def summary_rows(log_history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Label, first and last value, and verdict for each metric.

    First and last values are means over a fifth of the log each. The verdict is empty if no
    direction is better or there are too few points.
    """
    rows: list[tuple[str, str, str, str]] = []
    for name, change in changes(series_of(log_history)).items():
        verdict = change.verdict(metric_of(name)) or ""
        first, last = format_number(change.first), format_number(change.last)
        rows.append((label_of(name), first, last, verdict))
    return rows


def time_line(log_history: Sequence[Mapping[str, Any]]) -> str:
    """The shares of the phases in the time of a micro-batch; empty if it was not logged."""
    means = []
    for name in PHASES:
        values = [float(entry[name]) for entry in log_history if name in entry]
        if not values:
            return ""
        means.append(sum(values) / len(values))
    total = sum(means)
    parts = ", ".join(
        f"{name.rpartition('_')[2]} {100 * mean / total:.0f} %"
        for name, mean in zip(PHASES, means, strict=True)
    )
    return f"{total:.3g} s a micro-batch: {parts}" if total > 0 else ""


def print_table(title: str, rows: Sequence[tuple[str, str, str, str]], last_line: str = "") -> None:
    """Print rows of label, first, last, verdict."""
    if importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        console = Console()
        if console.is_terminal or console.is_jupyter:
            table = Table(title=title, title_justify="left")
            for name, side in zip(SUMMARY_HEAD, ("left", "right", "right", "left"), strict=True):
                table.add_column(name, justify=side)  # type: ignore[arg-type]
            for row in rows:
                table.add_row(*row, style=STYLES.get(row[3]))
            console.print(table)
            if last_line:
                console.print(last_line, style="dim", highlight=False)
            return
    print("\n" + plain_table(title, rows, last_line), flush=True)


def plain_table(title: str, rows: Sequence[tuple[str, str, str, str]], last_line: str = "") -> str:
    """The table as plain text."""
    wide = max(len(row[0]) for row in rows)
    lines = [title, " " * wide + f"{SUMMARY_HEAD[1]:>12}{SUMMARY_HEAD[2]:>12}"]
    lines += [f"{row[0]:{wide}}{row[1]:>12}{row[2]:>12}  {row[3]}".rstrip() for row in rows]
    return "\n".join([*lines, last_line] if last_line else lines)


def use_compact_progress(trainer: Trainer) -> None:
    """Replace the progress bar of a trainer by the compact one, and print a table at the end.

    Without a bar (`disable_tqdm`) nothing changes. In a notebook, where the bar is itself a table,
    only the table at the end is added.
    """
    if trainer.args.disable_tqdm:
        return
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(CompactProgressCallback)
    trainer.add_callback(SummaryCallback)
