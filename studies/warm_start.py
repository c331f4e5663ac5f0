"""The study's warm start: SFT of the shipped model on all files of a domain, to its plateau.

    python studies/warm_start.py --out studies/warm_start    # 12 core-minutes; not committed

The weights are not committed: this script makes them again (the digits depend on the machine). Its
log is committed, in `results/warm/warm_start.json`.

Declared before the run:

- Text: every row of 128 tokens of the domain's split `train`, all files, `EPOCHS` times.
- AdamW at `LEARNING_RATE`, with a cosine schedule to zero, so that nothing more can be gained by a
  lower rate.
- A plateau: the last fifth of the steps lowers the cross-entropy on `tune` by less than `PLATEAU`
  nats a token. If it lowers it by more, the run is repeated with twice the epochs, and both runs
  are reported.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matrix
import torch
from matrix import ROOT
from run import load_model, load_rows, tokenizer, versions, write
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

EPOCHS = 6
ROWS_A_STEP = 16
LEARNING_RATE = 2e-3
PLATEAU = 0.005
EVALUATIONS = 20
EVALUATION_ROWS = 256


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, and write what was logged."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=ROOT / "studies" / "warm_start")
    parser.add_argument(
        "--log", type=Path, default=ROOT / "studies" / "results" / "warm" / "warm_start.json"
    )
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--max_steps", type=int, default=-1, help="for a quick look")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.process_time()
    model, log = train(options.epochs, options.max_steps)
    log["cpu_seconds"] = round(time.process_time() - started, 1)
    model.config.use_cache = True  # Trainer has switched it off for training
    model.save_pretrained(options.out)
    tokenizer(matrix.TINY).save_pretrained(options.out)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    write(options.log, log | {"versions": versions()})
    print(json.dumps({name: value for name, value in log.items() if name != "curve"}))


def train(epochs: float, max_steps: int) -> tuple[Any, dict[str, Any]]:
    """The trained model; how its cross-entropy fell, and by how much in the last fifth."""
    setup = matrix.TINY
    (_, rows), (_, held_out) = (load_rows(setup.name, split) for split in ("train", "tune"))
    steps = max_steps if max_steps > 0 else int(epochs * len(rows) / ROWS_A_STEP)
    model = load_model(setup)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(prefix="study"),
            use_cpu=True,
            per_device_train_batch_size=ROWS_A_STEP,
            per_device_eval_batch_size=ROWS_A_STEP,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,  # a share of the steps
            weight_decay=0.1,
            adam_beta2=0.95,
            eval_strategy="steps",
            eval_steps=max(1, steps // EVALUATIONS),
            logging_steps=max(1, steps // EVALUATIONS),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=rows,
        eval_dataset=held_out.spread(EVALUATION_ROWS, 0),
        processing_class=tokenizer(setup),
        data_collator=DataCollatorForLanguageModeling(tokenizer(setup), mlm=False),
    )
    before = float(trainer.evaluate()["eval_loss"])
    trainer.train()
    after = float(trainer.evaluate()["eval_loss"])
    entries = trainer.state.log_history
    curve = [[e["step"], round(e["eval_loss"], 5)] for e in entries if "eval_loss" in e]
    losses = [[e["step"], round(e["loss"], 5)] for e in entries if "loss" in e]
    at_four_fifths = min(curve, key=lambda point: abs(point[0] - 0.8 * steps))[1]
    return model, {
        "rows": len(rows),
        "steps": steps,
        "epochs": epochs,
        "rows_a_step": ROWS_A_STEP,
        "learning_rate": LEARNING_RATE,
        "tune_before": round(before, 5),
        "tune_after": round(after, 5),
        "gain_of_last_fifth": round(at_four_fifths - after, 5),
        "is_plateau": at_four_fifths - after < PLATEAU,
        "curve": curve,
        "train": losses,
    }


if __name__ == "__main__":
    main()
