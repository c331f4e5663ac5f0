"""The study's matrix: what is run, on what, and how choices are made. Declared before any run.

Question: base against SFT against EBFT, and EBFT's settings one at a time, with what two CPU cores
can do: the model of 1.9 M parameters in ``examples/tiny_model`` learns a kind of text that it has
not seen, the character tables in the standard library's ``encodings``.

Rules, fixed beforehand:

- Learning rates are swept over the same ``RATES`` for every method, one run each with seed 0,
  measured on the split ``tune``. Each method is judged by what it minimises: SFT by the
  cross-entropy, EBFT by the CFM loss of rollouts of the length that it trains with (``CRITERIA``).
- At the chosen rate each method runs once more with each of ``SEEDS``, measured on ``report``.
  Both splits are disjoint, by file, from each other and from the training text.
- Ablations change one factor of the EBFT that the sweep was made with, at the rate chosen for it.
- EBFT without whitening, cross-entropy term or KL is the one to start from: its reward is exactly
  the gradient of the CFM loss (see docs/tuning.md).
- ``sft_steps`` makes as many optimizer steps as EBFT, on the same rows in the same order for the
  same seed: equal steps and equal document tokens. ``sft_tokens`` makes as many more, on more rows,
  that its tokens equal EBFT's document tokens and rollout tokens together.
- A run is written when it is finished and never run again; all of them are in ``results``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "examples") not in sys.path:
    sys.path.append(str(ROOT / "examples"))  # its stdlib_text decides which text is whose

Method = Literal["base", "sft", "ebft"]

MODEL = "examples/tiny_model"
DOMAIN = "encodings"
ROW_TOKENS = 128
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SWEEP_SEED = 0
SEEDS = (1, 2, 3)

STEPS = 32
#: What both trainers get.
TRAINING: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share of the steps
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "include_num_input_tokens_seen": "non_padding",
}
#: EBFT's own; what is not named has the library's default.
EBFT: dict[str, Any] = {
    "stride": 8,
    "context_length": 8,
    "generate_max_len": 8,
    "n_samples_per_prompt": 4,
    "temperature": 1.0,
    "use_whitening": False,
    "verify_packing": False,
    "logging_steps": 4,
}
#: (128 document tokens + 15 blocks x 4 rollouts x 8 tokens) / 128 document tokens.
TOKENS_FACTOR = 4.75

#: Held-out measurement, the same for every run.
LENGTHS = (8, 16, 32, 64)
EVALUATION: dict[str, Any] = {
    "rows": 48,
    "stride": 32,
    "context_length": 8,
    "n_samples_per_prompt": 4,
    "temperature": 1.0,
    "seed": 0,
}
#: Source files cut off at random tokens, continued by the model.
PARSING: dict[str, int] = {
    "cuts_per_file": 4,
    "context_tokens": 96,
    "new_tokens": 64,
    "samples": 2,
    "seed": 0,
}

#: What the learning rate of a swept method is chosen by, on ``tune``: the least.
CRITERIA = {
    "sft_steps": "cross_entropy",
    "sft_tokens": "cross_entropy",
    "ebft": "cfm_loss@8",
}


@dataclass(frozen=True)
class Run:
    """One training and its measurement.

    Attributes:
        arm: what it is a run of.
        method: which trainer.
        split: what it is measured on.
        seed: of the data order, the rollouts and nothing else.
        learning_rate: peak; None for the untrained model.
        steps: of the optimizer.
        changes: settings of EBFT that differ from ``EBFT``. ``naive_baseline`` is the study's own.
    """

    arm: str
    method: Method
    split: Literal["tune", "report"]
    seed: int = 0
    learning_rate: float | None = None
    steps: int = STEPS
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Stem of its file in the results."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        return f"{self.split}-{self.arm}{rate}-seed{self.seed}"


def base_runs() -> list[Run]:
    """The untrained model on both splits."""
    return [Run("base", "base", "tune"), Run("base", "base", "report")]


def sweep_runs() -> list[Run]:
    """Every method at every rate."""
    return [
        _run(arm, "tune", SWEEP_SEED, rate)
        for arm in CRITERIA
        for rate in RATES  # as many runs for each method
    ]


def main_runs(rates: dict[str, float]) -> list[Run]:
    """Every method at the rate chosen for it, with every seed; ``rates``: method -> rate."""
    return [_run(arm, "report", seed, rates[arm]) for seed in SEEDS for arm in CRITERIA]


#: Arm -> changes from the EBFT of the main comparison, and the seeds. In order of importance.
WHITENING: dict[str, dict[str, Any]] = {
    f"whitening_{space}": {"use_whitening": True, "whitening_space": space}
    for space in ("feature", "corpus", "sample")
}
OTHER_FACTORS: dict[str, dict[str, Any]] = {
    "ce_0.1": {"ce_coef": 0.1},
    "diversity_0": {"diversity_coef": 0.0},
    "ce_0.03": {"ce_coef": 0.03},
    "mean_pooling": {"embed_method": "mean_pooling"},
    "reinforce": {"advantage_estimator": "reinforce"},
    "diversity_0.5": {"diversity_coef": 0.5},
    "kl_0.1": {"kl_coef": 0.1},
    "group_norm": {"advantage_estimator": "group_norm"},
    "naive_baseline": {"naive_baseline": True},
}


def ablation_runs(rate: float) -> list[Run]:
    """Each change with every seed."""
    whitening = [_run(arm, "report", seed, rate) for seed in SEEDS for arm in WHITENING]
    others = [_run(arm, "report", seed, rate) for seed in SEEDS for arm in OTHER_FACTORS]
    return whitening + others


def whitened_sweep_runs() -> list[Run]:
    """Per-group whitening at every rate: is it only the rate that does not suit it?"""
    return [_run("whitening_feature", "tune", SWEEP_SEED, rate) for rate in RATES]


def _run(arm: str, split: Literal["tune", "report"], seed: int, rate: float) -> Run:
    if arm == "sft_steps":
        return Run(arm, "sft", split, seed, rate)
    if arm == "sft_tokens":
        return Run(arm, "sft", split, seed, rate, steps=int(STEPS * TOKENS_FACTOR))
    # Averaging the weights changes nothing about the training, so it is measured beside it.
    averaged = {"ema_decay": 0.9} if split == "report" else {}
    changes = (WHITENING | OTHER_FACTORS | {"ebft": averaged})[arm]
    return Run(arm, "ebft", split, seed, rate, changes=changes)
