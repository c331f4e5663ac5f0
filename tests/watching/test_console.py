"""One short line per log above the progress bar, and a table at the end."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from hf_ebft import EBFTTrainer
from hf_ebft.watching.console import (
    CompactProgressCallback,
    SummaryCallback,
    compact_line,
    print_table,
    summary_rows,
    time_line,
    use_compact_progress,
)
from tests.support.tiny import config, texts, tiny_llama

LOG: list[dict[str, Any]] = [
    {
        "step": step,
        "ebft/cfm_loss": 1.0 - 0.05 * step,
        "ebft/diversity": 1e-9,
        "ebft/seconds_rollout": 0.25,
        "ebft/seconds_features": 0.25,
        "ebft/seconds_training": 0.5,
    }
    for step in range(10)
]


def test_a_line_holds_the_main_metrics() -> None:
    logs = {"loss": 0.25, "grad_norm": 2.0, "ebft/cfm_loss": 0.81234, "ebft/seconds_rollout": 1.0}
    assert compact_line(logs) == "loss 0.25  cfm_loss 0.8123"
    evaluation = {"eval_loss": 3.5, "eval_runtime": 1.0, "eval_ebft/alignment": 0.4}
    assert compact_line(evaluation) == "eval:  loss 3.5  alignment 0.4"
    assert compact_line({"train_runtime": 3.0, "train_loss": 0.2}) == ""


def test_a_run_prints_lines_and_no_dictionaries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = config(tmp_path, max_steps=2, disable_tqdm=False, eval_strategy="steps", eval_steps=2)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(20, 20), eval_dataset=texts(20))
    use_compact_progress(trainer)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert lines.pop() == "Training, 2 steps"
    assert [line.strip()[:8] for line in lines] == ["step 1/2", "step 2/2", "step 2/2"]
    assert "eval:" in lines[-1]
    assert not any("{" in line for line in lines)
    assert len(trainer.state.log_history[0]) > 15, "the log itself stays whole"


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_only_the_bar_is_replaced(tmp_path: Path, disable_tqdm: bool) -> None:
    trainer = EBFTTrainer(tiny_llama(), config(tmp_path, disable_tqdm=disable_tqdm))
    use_compact_progress(trainer)
    callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert ProgressCallback not in callbacks
    assert (CompactProgressCallback in callbacks) == (not disable_tqdm)
    assert (PrinterCallback in callbacks) == disable_tqdm


def test_a_run_ends_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = config(tmp_path, max_steps=8, disable_tqdm=False)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(20, 20))
    use_compact_progress(trainer)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index("Training, 8 steps") :]
    (alignment,) = [line.split() for line in table if line.startswith("alignment")]
    values = [entry["ebft/alignment"] for entry in trainer.state.log_history[:-1]]
    assert [float(x) for x in alignment[1:3]] == pytest.approx([values[0], values[-1]], rel=1e-3)
    assert " ".join(alignment[3:]) in ("better", "worse", "no clear change")
    assert re.search(r"s a micro-batch: rollout \d+ %, features \d+ %, training \d+ %", table[-1])


def test_only_the_main_process_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = TrainerState(log_history=LOG, is_world_process_zero=False)
    SummaryCallback().on_train_end(config(tmp_path), state, TrainerControl())
    assert capsys.readouterr().out == ""
    state.is_world_process_zero = True
    SummaryCallback().on_train_end(config(tmp_path), state, TrainerControl())
    assert "better" in capsys.readouterr().out


def test_a_log_without_figures_makes_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SummaryCallback().on_train_end(config(tmp_path), TrainerState(), TrainerControl())
    assert capsys.readouterr().out == ""


def test_the_table_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    print_table("T", summary_rows(LOG), time_line(LOG))
    assert capsys.readouterr().out == (
        "\nT\n"
        "                first        last\n"
        "CFM loss        0.975       0.575  better\n"
        "diversity           0           0\n"
        "1 s a micro-batch: rollout 25 %, features 25 %, training 50 %\n"
    )


def test_the_table_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    print_table("T", summary_rows(LOG), time_line(LOG))
    out = capsys.readouterr().out
    assert "\x1b[" in out, "colours"
    assert "\u2502" in out, "a frame"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert re.search(r"CFM loss\s*\u2502\s*0.975 \u2502 0.575 \u2502 better", plain)


class NotebookBar(TrainerCallback):
    """Stands for transformers' NotebookProgressCallback, which needs IPython."""


def test_a_notebook_keeps_its_own_bar(tmp_path: Path) -> None:
    """There the bar is another class, beside which a second one would be printed as text."""
    args = config(tmp_path, disable_tqdm=False)
    trainer = EBFTTrainer(tiny_llama(), args)
    trainer.pop_callback(ProgressCallback)
    trainer.add_callback(NotebookBar)
    use_compact_progress(trainer)
    callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert NotebookBar in callbacks
    assert SummaryCallback in callbacks
    assert CompactProgressCallback not in callbacks
