"""One short line per log above the progress bar."""

from pathlib import Path

import pytest
from tiny import config, texts, tiny_llama
from transformers import PrinterCallback, ProgressCallback

from hf_ebft import EBFTTrainer
from hf_ebft.callbacks import CompactProgressCallback, compact_line, use_compact_progress


def test_a_line_holds_the_main_figures() -> None:
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
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
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
