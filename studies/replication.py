"""Does EBFT beat SFT at equal time, from a model that knows the text? One GPU, a few minutes.

    PYTHONPATH=. python studies/replication.py                   # a GPU of 80 GB
    PYTHONPATH=. python studies/replication.py --dry-run --out /tmp/dry         # a CPU, tiny

**This has not run on a GPU yet**; only the dry run has been tested.

Nothing is downloaded: the text is the Python source on the machine (`python_text.py`). The stages:

1. `text`: a tokenizer, and rows of tokens;
2. `pretrain`: a Llama of 69 M parameters learns general Python for three minutes;
3. `plateau`: SFT on the package `sympy`, in rounds, until the loss on held-out files stops falling,
   then with a learning rate that falls to zero;
4. `start`: the measurements of this model, and of the same model sharpened as a control;
5. `arm-...`: from this model, SFT or EBFT for the same time, then the same measurements.

A stage that has its JSON file is skipped. A stage that would not end within `--budget` seconds is
not begun; the next call continues there. Both methods have the same schedule over their time. The
clock does not run during a first step, in which code may be compiled.

Rules, fixed beforehand:

- The first arms are one rate of each method, then come other rates. The chosen rate of a method has
  the lowest cross-entropy (SFT) or CFM loss at 8 tokens (EBFT) on the split `tune`. Then come more
  seeds.
- Results are those of `report`: differences from the start, with intervals over files.
- EBFT beats SFT if its CFM loss *and* its energy score are below SFT's beyond the interval, also on
  the feature network that gave no reward.
- The sharpened control shows what a lower temperature alone would do.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import python_text
import torch
import transformers
from numpy.typing import NDArray
from parsing import choose_cuts, parse_shares
from python_text import Split
from timed_training import train
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_ebft.config import EBFTSettings
from hf_ebft.evaluation import measure_model
from hf_ebft.evaluation.bootstrap import paired_bootstrap
from hf_ebft.feature_network.network import FeatureNetwork

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 520.0


@dataclass(frozen=True)
class Scale:
    """All sizes. Seconds are of training; a batch is in rows.

    Attributes:
        shape: of the `LlamaConfig`.
        vocabulary: tokens of the tokenizer.
        tokenizer_text, general_text, domain_text: characters that are read for each, at most.
        general_row, row: tokens of a row in pre-training, and of the domain.
        pretrain_seconds, pretrain_rate, pretrain_batch: of the pre-training.
        round_seconds, most_rounds, least_gain: of SFT to its plateau: a round must lower the
            cross-entropy by so many nats a token for another one to follow.
        sft_rate, sft_batch: of it, and of SFT as an arm.
        arm_seconds, ebft_batch, at_once: of the arms, documents that EBFT takes in a step, and how
            many of them at a time.
        held_out: rows that are measured, and rows of them that are documents of one packed row.
        lengths: of the rollouts that are measured.
        cuts: files that are cut for the parse rate, tokens that are written, samples of each.
        arms: how many; None: all.
    """

    shape: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 10,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        }
    )
    vocabulary: int = 8192
    tokenizer_text: int = 20_000_000
    general_text: int = 200_000_000
    domain_text: int = 40_000_000
    general_row: int = 512
    row: int = 256
    pretrain_seconds: float = 170.0
    pretrain_rate: float = 1e-3
    pretrain_batch: int = 96
    round_seconds: float = 12.0
    most_rounds: int = 3
    least_gain: float = 0.01
    sft_rate: float = 3e-4
    sft_batch: int = 192
    arm_seconds: float = 45.0
    ebft_batch: int = 256
    at_once: int = 64
    held_out: tuple[int, int] = (128, 16)
    lengths: tuple[int, ...] = (8, 16, 32, 64)
    cuts: tuple[int, int, int] = (128, 48, 4)
    arms: int | None = None


DRY = Scale(
    shape={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    vocabulary=600,
    tokenizer_text=200_000,
    general_text=400_000,
    domain_text=400_000,
    general_row=64,
    row=64,
    pretrain_seconds=3.0,
    pretrain_batch=8,
    round_seconds=1.0,
    most_rounds=2,
    sft_batch=8,
    arm_seconds=2.0,
    ebft_batch=8,
    at_once=4,
    held_out=(6, 3),
    lengths=(4, 8),
    cuts=(4, 12, 2),
    arms=2,
)


@dataclass(frozen=True)
class Arm:
    """One run from the plateau.

    Attributes:
        method: "sft" or "ebft".
        rate: the highest learning rate.
        seed: of the order of the rows, and of the rollouts.
        ce_coef: weight of the cross-entropy in EBFT.
        estimator: of EBFT's gradient, see docs/estimators.md.
    """

    method: str
    rate: float
    seed: int = 1
    ce_coef: float = 0.0
    estimator: str = "fitted"

    @property
    def name(self) -> str:
        """Of the file."""
        changes = f"-ce{self.ce_coef:g}" if self.ce_coef else ""
        changes += "" if self.estimator == "fitted" else f"-{self.estimator}"
        return f"arm-{self.method}{changes}-{self.rate:g}-seed{self.seed}"

    @property
    def is_swept(self) -> bool:
        """Whether it takes part in the choice of its method's rate."""
        return not self.ce_coef and self.estimator == "fitted"


RATES = (3e-5, 1e-4, 1e-5)


def swept_arms() -> list[Arm]:
    """One arm of each kind first, then the other rates."""
    first = [Arm("sft", RATES[0]), Arm("ebft", RATES[0]), Arm("ebft", RATES[0], ce_coef=0.1)]
    others = [Arm(method, rate) for rate in RATES[1:] for method in ("ebft", "sft")]
    return [*first, *others, Arm("ebft", RATES[0], estimator="reinforce")]


def repeated_arms(found: Mapping[Arm, Mapping[str, Any]]) -> list[Arm]:
    """More seeds at the rate of each method that is best on `tune`; none before all are there."""
    arms = []
    for method, figure in (("sft", "cross_entropy"), ("ebft", "cfm_loss@8")):
        swept = [arm for arm in swept_arms() if arm.method == method and arm.is_swept]
        if any(arm not in found for arm in swept):
            return []
        best = min(swept, key=lambda arm: mean_of(found[arm]["tune"], figure))
        arms += [replace(best, seed=seed) for seed in (2, 3)]
    return sorted(arms, key=lambda arm: arm.seed)


def mean_of(evaluation: Mapping[str, Any], figure: str) -> float:
    """The mean over documents that have it."""
    values = [value for value in evaluation["by_document"][figure] if value is not None]
    return statistics.fmean(values)


# ---- Stages -------------------------------------------------------------------------------------


class OutOfTimeError(Exception):
    """A stage would not end within the budget."""


@dataclass
class Study:
    """One call.

    Attributes:
        out: folder of the JSON files.
        work: folder of rows, tokenizer and models.
        scale: all sizes.
        device: where it runs.
        budget: seconds of this call.
        attention: `packed_attention` of EBFT and of the measurements.
    """

    out: Path
    work: Path
    scale: Scale
    device: torch.device
    budget: float
    attention: Any = "auto"
    begun: float = field(default_factory=time.monotonic)

    def stage(
        self, name: str, seconds: float, make: Callable[[], dict[str, Any]], *leaves: Path
    ) -> dict[str, Any]:
        """What an earlier call found, or what `make` finds now, written whole or not at all.

        Args:
            name: of the file.
            seconds: that it takes, at a guess.
            make: does the work.
            leaves: what later stages need of it; made again where it is gone.

        Raises:
            OutOfTimeError: the rest of the budget is too short for it.
        """
        path = self.out / f"{name}.json"
        if path.exists() and all(leaf.exists() for leaf in leaves):
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        spent = time.monotonic() - self.begun
        if spent + seconds > self.budget:
            raise OutOfTimeError(
                f"{name} takes about {seconds:.0f} s and {self.budget - spent:.0f} s are left."
            )
        print(f"--- {name}, at {spent:.0f} s", flush=True)
        start = time.monotonic()
        found = make() | {"stage_seconds": round(time.monotonic() - start, 1)}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.out.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found) + "\n", encoding="utf-8")
        part.replace(path)
        return found

    # ---- What stages leave ----

    @property
    def tokenizer(self) -> Any:
        """Of the stage `text`."""
        return AutoTokenizer.from_pretrained(self.work / "tokenizer")

    def rows(self, name: str) -> NDArray[Any]:
        """Rows, or the files that they are from."""
        found: NDArray[Any] = np.load(self.work / f"{name}.npy")
        return found

    def model(self, name: str) -> Any:
        """A model on its device, with float32 weights."""
        folder = self.work / name
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.to(self.device)

    def held_out(self, split: Split) -> tuple[NDArray[Any], NDArray[Any]]:
        """The rows of a split that are measured, and their files."""
        rows, files = self.rows(split), self.rows(f"{split}-files")
        chosen = python_text.spread(files, self.scale.held_out[0])
        return rows[chosen], files[chosen]

    def texts(self, split: Split) -> list[str]:
        """Whole files of the domain."""
        found: list[str] = json.loads((self.work / f"{split}.json").read_text(encoding="utf-8"))
        return found


def run(study: Study) -> None:
    """All stages that fit."""
    scale, work = study.scale, study.work
    train_rows = work / "train.npy"
    study.stage("text", 60, lambda: make_text(study), train_rows, work / "tokenizer")
    seconds = scale.pretrain_seconds + 25
    study.stage("pretrain", seconds, lambda: pretrain(study), work / "pretrained")
    seconds = (scale.most_rounds + 1) * scale.round_seconds + 25
    study.stage("plateau", seconds, lambda: reach_plateau(study), work / "plateau")
    start = study.stage("start", 40, lambda: measure_start(study))
    seconds = scale.arm_seconds + 2 * start["measuring_seconds"] + 20
    compiling = 0 if study.device.type == "cpu" else 30
    found: dict[Arm, dict[str, Any]] = {}
    for arms in (swept_arms, lambda: repeated_arms(found)):
        for arm in arms()[: scale.arms]:
            more = compiling if arm.method == "ebft" else 0
            make = partial(run_arm, study, arm)
            found[arm] = study.stage(arm.name, seconds + more, make)


def make_text(study: Study) -> dict[str, Any]:
    """Tokenizer and rows."""
    scale, work = study.scale, study.work
    work.mkdir(parents=True, exist_ok=True)
    sources = python_text.find_sources(python_text.roots())
    general = [s for s in sources if not s.in_domain and s.split == "train"]
    tokenizer = python_text.train_tokenizer(
        (text for _, text in python_text.read(general, scale.tokenizer_text)), scale.vocabulary
    )
    tokenizer.save_pretrained(work / "tokenizer")
    texts = [text for _, text in python_text.read(general, scale.general_text)]
    rows: dict[str, NDArray[Any]] = {}
    rows["general"] = python_text.packed_rows(tokenizer, texts, scale.general_row)
    kept = [s for s in sources if not s.in_domain and s.split == "tune"]
    texts = [text for _, text in python_text.read(kept, scale.domain_text // 20)]
    rows["general-tune"] = python_text.packed_rows(tokenizer, texts, scale.general_row)
    for split in ("tune", "report", "train"):
        kept = [s for s in sources if s.in_domain and s.split == split]
        at_most = scale.domain_text if split == "train" else scale.domain_text // 10
        texts = [text for _, text in python_text.read(kept, at_most)]
        rows[split], rows[f"{split}-files"] = python_text.cut_rows(tokenizer, texts, scale.row)
        (work / f"{split}.json").write_text(json.dumps(texts), encoding="utf-8")
    for name, values in rows.items():
        np.save(work / f"{name}.npy", values)
    return {
        "files": len(sources),
        "rows": {name: list(values.shape) for name, values in rows.items()},
        "scale": asdict(scale),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": str(study.device)
        if study.device.type == "cpu"
        else torch.cuda.get_device_name(study.device),
    }


def pretrain(study: Study) -> dict[str, Any]:
    """General Python, from random weights."""
    scale = study.scale
    torch.manual_seed(0)
    tokenizer = study.tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **scale.shape,
    )
    with study.device:
        model = LlamaForCausalLM(config)
    training = train(
        model,
        study.rows("general"),
        device=study.device,
        seconds=scale.pretrain_seconds,
        settings={
            "learning_rate": scale.pretrain_rate,
            "per_device_train_batch_size": scale.pretrain_batch,
            "weight_decay": 0.1,
        },
    )
    model.save_pretrained(study.work / "pretrained")
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "training": training,
        "cross_entropy": {
            name: cross_entropy(model, study.rows(name)[:128]) for name in ("general-tune", "tune")
        },
    }


def reach_plateau(study: Study) -> dict[str, Any]:
    """SFT on the domain until held-out text gains nothing, then with a falling rate."""
    scale = study.scale
    model, held_out = study.model("pretrained"), study.held_out("tune")[0]
    settings = {"learning_rate": scale.sft_rate, "per_device_train_batch_size": scale.sft_batch}
    rounds, losses = [], [cross_entropy(model, held_out)]
    for number in range(scale.most_rounds + 1):
        gains = number == 0 or losses[-2] - losses[-1] >= scale.least_gain
        last = number == scale.most_rounds or not gains
        rounds.append(
            train(
                model,
                study.rows("train"),
                device=study.device,
                seconds=scale.round_seconds,
                settings=settings | {"seed": number},
                falls=last,
            )
        )
        losses.append(cross_entropy(model, held_out))
        if last:
            break
    model.save_pretrained(study.work / "plateau")
    return {"rounds": rounds, "cross_entropy": losses}


def measure_start(study: Study) -> dict[str, Any]:
    """The model of the plateau, and the same one sharpened."""
    model = study.model("plateau")
    start = time.monotonic()
    found = {split: evaluate(study, model, split) for split in ("report", "tune")}
    seconds = (time.monotonic() - start) / 2
    found["sharpened"] = evaluate(study, model, "report", tempered=0.9)
    return found | {"measuring_seconds": seconds}


def run_arm(study: Study, arm: Arm) -> dict[str, Any]:
    """Train from the plateau and measure."""
    scale, model = study.scale, study.model("plateau")
    settings: dict[str, Any] = {"learning_rate": arm.rate, "seed": arm.seed}
    if arm.method == "sft":
        settings |= {"per_device_train_batch_size": scale.sft_batch}
    else:
        settings |= {
            "per_device_train_batch_size": scale.ebft_batch,
            "rollout_batch_size": scale.at_once,
            "ce_coef": arm.ce_coef,
            "stride": max(scale.lengths[0], scale.row // 16),
            "context_length": scale.row // 8,
            "generate_max_len": 8,
            "n_samples_per_prompt": 4,
            "temperature": 1.0,
            # The gradient of the CFM loss itself.
            "use_whitening": False,
            "advantage_estimator": arm.estimator,
            "verify_packing": False,
            "packed_attention": study.attention,
        }
    training = train(
        model,
        study.rows("train"),
        device=study.device,
        seconds=scale.arm_seconds,
        settings=settings,
        method=arm.method,
    )
    found = {split: evaluate(study, model, split) for split in ("report", "tune")}
    return {"arm": asdict(arm), "training": training, **found}


# ---- Measuring ----------------------------------------------------------------------------------


@torch.no_grad()
def cross_entropy(model: Any, rows: NDArray[Any], at_once: int = 32) -> float:
    """Mean nats a token over all tokens but the first of each row (R, S)."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(rows), at_once):
        ids = torch.from_numpy(rows[first : first + at_once].astype(np.int64)).to(model.device)
        tokens = ids[:, 1:].numel()
        total += float(model(input_ids=ids, labels=ids).loss) * tokens
        count += tokens
    model.train(training)
    return total / count


def evaluate(study: Study, model: Any, split: Split, *, tempered: float = 1.0) -> dict[str, Any]:
    """Every figure of a model on held-out files of the domain.

    Phi is the model of the plateau, from which EBFT has its rewards; the second network, which
    gave none, is the pre-trained one.

    Returns:
        `by_document`: figure -> a number for each row, with `@8` and so on for figures of rollouts;
        `files`: which file each row is from; on `report`, `parse_...`: shares by cut file.
    """
    scale = study.scale
    rows, files = study.held_out(split)
    settings = EBFTSettings(
        stride=scale.row // 8,
        context_length=scale.row // 8,
        n_samples_per_prompt=4,
        temperature=1.0,
        use_whitening=False,
        packed_attention=study.attention,
    )
    phi, second = (network(study.model(name), settings) for name in ("plateau", "pretrained"))
    measured = measure_model(
        model,
        phi,
        packed(rows, scale.held_out[1]),
        settings,
        lengths=scale.lengths,
        tokens_at_once=32768,
        second_network=second,
        tempered=tempered,
    )
    by_document = {"cross_entropy": numbers(measured.text["cross_entropy"])}
    for length, figures in measured.rollouts.items():
        for name in FIGURES:
            by_document[f"{name}@{length}"] = numbers(figures[name])
    found: dict[str, Any] = {"by_document": by_document, "files": files.tolist()}
    if split == "report" and tempered == 1.0:
        found |= parse_rates(study, model)
    return found


FIGURES = (
    "cfm_loss",
    "energy_score",
    "excess_over_spread",
    "second_cfm_loss",
    "second_energy_score",
    "cosine_alignment",
    "entropy",
    "duplicates",
)


def network(model: nn.Module, settings: EBFTSettings) -> FeatureNetwork:
    """A feature network as training would make it, of this very model, which it freezes."""
    return FeatureNetwork(
        model,
        feature_layers=settings.feature_layers,
        embed_method=settings.embed_method,
        normalization=settings.feature_normalization,
        packed_attention=settings.packed_attention,
    )


def packed(rows: NDArray[Any], together: int) -> list[dict[str, Tensor]]:
    """The rows (R, S), several at a time as documents of one row: faster, the same figures."""
    found = []
    for first in range(0, len(rows), together):
        some = torch.from_numpy(rows[first : first + together].astype(np.int64))
        ids = torch.arange(len(some))[:, None].expand_as(some)
        found.append({"input_ids": some.flatten(), "document_ids": ids.flatten()})
    return found


def numbers(values: NDArray[np.float64]) -> list[float | None]:
    """For JSON; None where a document has none."""
    return [None if np.isnan(value) else round(float(value), 5) for value in values]


def parse_rates(study: Study, model: Any) -> dict[str, Any]:
    """Whether cut files that the model continues still parse (see `parsing.py`)."""
    n_files, new_tokens, samples = study.scale.cuts
    tokenizer = study.tokenizer
    cuts = choose_cuts(
        study.texts("report"),
        tokenizer,
        cuts_per_file=1,
        context_tokens=study.scale.row - new_tokens,
        new_tokens=new_tokens,
        seed=0,
    )[:n_files]
    shares = parse_shares(model, tokenizer, cuts, new_tokens=new_tokens, samples=samples, seed=0)
    return {name: [round(share, 4) for share in of_cuts] for name, of_cuts in shares.items()}


# ---- Table --------------------------------------------------------------------------------------


def table(study: Study) -> str:
    """What has been found so far: differences from the start on `report`, with 95 % intervals."""
    path = study.out / "start.json"
    if not path.exists():
        return "No model has been measured yet."
    start = json.loads(path.read_text(encoding="utf-8"))
    lengths = (study.scale.lengths[0], study.scale.lengths[-1])
    names = ["cross_entropy"]
    names += [f"{name}@{g}" for name in FIGURES[:2] + FIGURES[3:5] for g in lengths]
    evaluations = {"sharpened to 0.9": start["sharpened"]}
    for found in sorted(study.out.glob("arm-*.json")):
        arm = json.loads(found.read_text(encoding="utf-8"))
        title = f"{found.stem.removeprefix('arm-')}, {arm['training']['steps']} steps"
        evaluations[title] = arm["report"]
    lines = ["start:", *(f"  {name:28s} {mean_of(start['report'], name):.4f}" for name in names)]
    for title, evaluation in evaluations.items():
        lines.append(f"{title}:")
        for name in names:
            old, new = (
                np.array(found["by_document"][name], dtype=np.float64)
                for found in (start["report"], evaluation)
            )
            change = paired_bootstrap(old, new, groups=evaluation["files"], n_resamples=2000)
            lines.append(
                f"  {name:28s} {change.difference:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
            )
        for name in ("parse_greedy", "parse_sampled"):
            if name in evaluation:
                before, after = (statistics.fmean(e[name]) for e in (start["report"], evaluation))
                lines.append(f"  {name:28s} {before:.3f} -> {after:.3f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what fits, then print what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "studies" / "results" / "replication"
    parser.add_argument("--out", type=Path, default=default, help="folder of the JSON files")
    parser.add_argument("--work", type=Path, help="rows and models; default: outputs/replication")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of this call")
    parser.add_argument(
        "--attention",
        default="auto",
        help="packed_attention: auto, or sdpa where what it takes on this GPU fails",
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry-run goes through all stages on a CPU")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    torch.set_float32_matmul_precision("high")
    work = given.out / "work" if given.dry_run else ROOT / "outputs" / "replication"
    study = Study(
        out=given.out,
        work=given.work or work,
        scale=DRY if given.dry_run else Scale(),
        device=torch.device("cpu" if given.dry_run else "cuda"),
        budget=given.budget,
        attention=given.attention,
    )
    try:
        run(study)
    except OutOfTimeError as stop:
        print(f"{stop} Call again to go on.", flush=True)
    finally:
        print(table(study), flush=True)


if __name__ == "__main__":
    main()
