"""How much of EBFT's gradient is noise, by estimator and by the model that training starts from.

    python studies/noise.py --start tiny                       # 1.9 M parameters, new text
    python studies/noise.py --start small                      # 0.19 M, trained for 400 steps first
    python studies/noise.py --start FOLDER --name plateau      # a saved model
    python studies/noise.py --table                            # what was measured, as Markdown

Estimators with n = 4 and all blocks get the same documents and the same rollouts. n = 8 and
`block_share` get other documents of the same text, so their ratios are not paired.

Signal, noise and noise scale are computed from gradients of single documents, with intervals over
documents (`hf_ebft.objective.noise_scale`). So is the cosine with the CFM gradient, which is
estimated from other documents. Core-seconds are measured in the same run: the time of a training
step of one document.

The regressions of `fitted` are fitted to other documents than those that are measured.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matrix
import torch
from matrix import ROOT
from run import load_model, load_rows, tokenizer, versions, write
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_ebft import EBFTConfig, EBFTTrainer, Rollouts
from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.fitted import TokenKnowledge, fitted_advantages
from hf_ebft.objective.losses import cross_entropy, policy_gradient_loss
from hf_ebft.objective.noise_scale import (
    gradient_cosine,
    gradient_products,
    noise_ratio,
    noise_scale,
)
from hf_ebft.objective.rewards import feature_matching_rewards

OUT = ROOT / "studies" / "results" / "noise"
# Steps from random weights, far from converged: the start `small`.
SMALL_STEPS, SMALL_ROWS, SMALL_RATE = 400, 16, 3e-3
N = 4
SHARE = 0.25
# These do not estimate the CFM gradient, so their noise is compared with another signal.
OTHER_OBJECTIVES = ("whitened", "cross-entropy")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one starting point, or print the table of all."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--start", help="tiny, small or a model's folder")
    parser.add_argument("--name", help="name of the result; default: that of --start")
    parser.add_argument("--documents", type=int, default=48, help="documents that are measured")
    parser.add_argument("--reference", type=int, default=96, help="documents for the CFM gradient")
    parser.add_argument("--fitted_on", type=int, default=240, help="documents for the regressions")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(argv)
    if options.table:
        print(table(options.out))
        return
    torch.set_num_threads(1)
    study = Study(start_model(options.start), options.fitted_on)
    result = study.measure(options.documents, options.reference)
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / f"{options.name or options.start}.json", result | {"versions": versions()})


def start_model(start: str) -> Any:
    """The model that is measured."""
    if start == "tiny":
        return load_model(matrix.TINY)
    if start == "small":
        return small_model()
    return AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)


def small_model() -> Any:
    """A model of 0.19 M parameters, trained on the domain for some steps."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer(matrix.TINY)),
            hidden_size=48,
            intermediate_size=136,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.06,
        )
    )
    _, rows = load_rows(matrix.TINY.name, "train")
    every = (rows[index] for index in range(len(rows)))
    whole = [row for row in every if len(row["input_ids"]) == matrix.TINY.row_tokens]
    optimizer = torch.optim.AdamW(model.parameters(), lr=SMALL_RATE, betas=(0.9, 0.95))
    for step in range(SMALL_STEPS):
        warm, left = min(1.0, (step + 1) / 20), 1 - step / SMALL_STEPS
        optimizer.param_groups[0]["lr"] = SMALL_RATE * warm * left**0.5
        chosen = torch.randint(len(whole), (SMALL_ROWS,)).tolist()
        ids = torch.stack([torch.as_tensor(whole[i]["input_ids"]) for i in chosen])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@dataclass
class Figures:
    """The measurements of one estimator.

    Attributes:
        gradients: gradients of single documents, (P,) each.
        seconds: core-seconds of a training step of each document.
    """

    gradients: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """One document's rollouts and embeddings, and the core-seconds of every part."""

    rollouts: Rollouts
    generated: Tensor
    ground_truth: Tensor
    knowledge: TokenKnowledge
    seconds: dict[str, float]


class Study:
    """Measures estimators on one model.

    Args:
        model: the starting point; phi is a copy of it.
        fitted_on: number of documents that the regressions are fitted to.
    """

    def __init__(self, model: Any, fitted_on: int) -> None:
        _, self.rows = load_rows(matrix.TINY.name, "train")
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(1))
        self.order = iter(order.tolist())
        settings = matrix.TINY.training | matrix.TINY.ebft
        settings |= {"advantage_estimator": "fitted", "output_dir": tempfile.mkdtemp(), "seed": 5}
        self.trainer = EBFTTrainer(
            model=model,
            args=EBFTConfig(**settings),
            train_dataset=self.rows,
            processing_class=tokenizer(matrix.TINY),
        )
        self.model = model
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.fitted_on = fitted_on
        self.figures: dict[str, Figures] = {}
        self.explained: list[Tensor] = []
        fitted = self.trainer.fitted
        assert fitted is not None
        self.fitted = fitted
        for part in range(4):  # in parts, so that the penalty is chosen
            for _ in range(fitted_on // 4):
                batch = self.batch(N)
                fitted.add_rollouts(batch.generated, batch.knowledge, batch.rollouts.exists)
            start = time.process_time()
            fitted._steps += 1
            fitted.fit()
            self.seconds_of_fit = time.process_time() - start
            print(f"fitted {part + 1} of 4, {self.seconds_of_fit:.2f} s", flush=True)

    def batch(self, n: int, share: float = 1.0) -> Batch:
        """The next document, with a share of its blocks sampled n times and embedded."""
        trainer, seconds = self.trainer, {}
        trainer.ebft.n_samples_per_prompt, trainer.ebft.block_share = n, share
        inputs = trainer.data_collator([self.rows[next(self.order)]])

        def timed(name: str, compute: Callable[[], Any]) -> Any:
            start = time.process_time()
            found = compute()
            seconds[name] = time.process_time() - start
            return found

        with torch.no_grad():
            rollouts = timed("rollout", lambda: trainer.sample_rollouts(self.model, inputs))
            timed("features", lambda: trainer.feature_network.embed(rollouts))
            found = timed("states", lambda: self.fitted.embed(rollouts, None))
            knowledge = timed(
                "expectations",
                lambda: self.fitted.knowledge(self.model, trainer._forward, rollouts, found.states),
            )
        return Batch(rollouts, found.generated, found.ground_truth, knowledge, seconds)

    def measure(self, documents: int, reference: int) -> dict[str, Any]:
        """Measure estimators on `documents` documents, the CFM gradient on `reference` others."""
        for count in range(documents):
            self.add(self.batch(N), "")
            self.add(self.batch(2 * N), f" n={2 * N}", only=("reinforce", "fitted"))
            few = self.batch(N, SHARE)
            self.add(few, f", block_share {SHARE:g}", only=("reinforce", "fitted"))
            print(f"{count + 1} of {documents}", flush=True)
        measured, self.figures = self.figures, {}
        for _ in range(reference):
            self.add(self.batch(N), "", only=("fitted",))
        target = torch.stack(self.figures["fitted"].gradients)
        products = gradient_products(target)
        base = gradient_products(measured["rloo"].gradients)
        results = {}
        for name, figures in measured.items():
            own = gradient_products(figures.gradients)
            cross = gradient_products([*figures.gradients, *target])[: len(own), len(own) :]
            scale, ratio = noise_scale(own), noise_ratio(own, base)
            cosine = gradient_cosine(own, products, cross, same_documents=False)
            results[name] = {
                "signal": scale.signal,
                "noise": scale.noise,
                "documents": finite(scale.documents, scale.low, scale.high),
                "noise_to_rloo": finite(ratio.value, ratio.low, ratio.high),
                "cosine": finite(cosine.value, cosine.low, cosine.high),
                "core_seconds": sum(figures.seconds) / len(figures.seconds),
            }
        reference_scale = noise_scale(products)
        errors = torch.stack(self.explained).sum(dim=0)
        return {
            "parameters": sum(weight.numel() for weight in self.weights),
            "documents": documents,
            "reference_documents": reference,
            "fitted_on": self.fitted_on,
            "signal": reference_scale.signal,
            "reference": finite(
                reference_scale.documents, reference_scale.low, reference_scale.high
            ),
            "seconds_of_fit": self.seconds_of_fit,
            "explained_by_place": (1 - errors[:-1] / errors[-1]).tolist(),
            "estimators": results,
        }

    def add(self, batch: Batch, suffix: str, only: Sequence[str] | None = None) -> None:
        """Compute the gradients of one document for all estimators."""
        self.explained.append(self._errors(batch))
        start = time.process_time()
        advantages = self.advantages(batch)
        log_probs = self._log_probs(batch.rollouts)
        forward = time.process_time() - start
        chosen = {n: a for n, a in advantages.items() if only is None or n in only}
        for name, weights in chosen.items():
            loss = policy_gradient_loss(log_probs.rollout, weights, batch.rollouts.layout)
            self._keep(name + suffix, loss, batch, forward)
        if not suffix and (only is None or "cross-entropy" in only):
            assert log_probs.document is not None
            loss = cross_entropy(log_probs.document, batch.rollouts.layout.documents)
            self._keep("cross-entropy", loss, batch, forward)

    def _errors(self, batch: Batch) -> Tensor:
        """(G + 1,) squared errors of the regressions by position, and of a constant."""
        there = batch.rollouts.exists[:, None].expand(batch.generated.shape[:3])
        regressors = batch.knowledge.regressors(batch.knowledge.tokens)[there]
        features = batch.generated[there]
        predicted = torch.einsum("ngf,gfd->ngd", regressors, self.fitted.coefficients)
        by_place = (predicted - features[:, None]).square().sum(dim=(0, 2))
        assert self.fitted._old is not None
        mean = self.fitted._old.cross[0, -1] / self.fitted._old.count
        return torch.cat([by_place, (features - mean).square().sum()[None]])

    def _keep(self, name: str, loss: Tensor, batch: Batch, forward: float) -> None:
        start = time.process_time()
        gradients = torch.autograd.grad(loss, self.weights, retain_graph=True)
        seconds = time.process_time() - start + forward + batch.seconds["rollout"]
        if "fitted" in name:
            seconds += batch.seconds["states"] + batch.seconds["expectations"]
        else:
            seconds += batch.seconds["features"]
        figures = self.figures.setdefault(name, Figures())
        # Rounding of single entries averages out in products.
        figures.gradients.append(torch.cat([g.flatten() for g in gradients]).bfloat16())
        figures.seconds.append(seconds)

    def _log_probs(self, rollouts: Rollouts) -> Any:
        return replace(self.trainer._training_pass, with_document=True)._packed(
            self.model, rollouts
        )

    def advantages(self, batch: Batch) -> dict[str, Tensor]:
        """Estimator -> advantages; those after the first four are for other objectives."""
        pair = (batch.generated, batch.ground_truth)
        plain = feature_matching_rewards(*pair, use_whitening=False)
        whitened = feature_matching_rewards(*pair)
        coefficients = self.fitted.coefficients
        assert coefficients is not None
        rank = self.fitted.basis.shape[1]
        baselines = coefficients.clone()
        baselines[:, rank : 2 * rank] = 0
        last = coefficients.clone()
        last[:-1] = 0
        return {
            "rloo": compute_advantages(plain, "rloo"),
            "reinforce": compute_advantages(plain, "reinforce"),
            "fitted": fitted_advantages(*pair, batch.knowledge, coefficients),
            "fitted, last token only": fitted_advantages(*pair, batch.knowledge, last),
            "whitened by group, rloo": compute_advantages(whitened, "rloo"),
        }


def finite(*values: float) -> list[float | None]:
    """The values for JSON, in which infinity and NaN become None."""
    return [value if math.isfinite(value) else None for value in values]


def table(out: Path) -> str:
    """A Markdown table of all results.

    Noise scales are the estimator's own noise over its own estimate of the signal.
    """
    lines = [
        "| start | estimator | noise, of `rloo`'s | noise scale, documents | cosine with the CFM "
        "gradient | core-seconds a document | noise x seconds, of `rloo`'s |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(out.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        base = result["estimators"]["rloo"]
        for name, figures in result["estimators"].items():
            ratio, cost = figures["noise_to_rloo"][0], figures["core_seconds"]
            other = name.startswith(OTHER_OBJECTIVES)
            cells = [
                path.stem,
                name,
                "" if other else in_brackets(figures["noise_to_rloo"], 2),
                in_brackets(figures["documents"], 0),
                in_brackets(figures["cosine"], 2),
                f"{cost:.2f}",
                "" if other else f"{ratio * cost / base['core_seconds']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_brackets(values: list[float | None], digits: int) -> str:
    """A value and its interval, as text."""
    value, low, high = ("unknown" if x is None else f"{x:.{digits}f}" for x in values)
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
