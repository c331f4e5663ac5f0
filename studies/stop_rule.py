"""Does the warm start leave EBFT a gradient to follow? Measured before anything is trained.

    python studies/warm_start.py    # if studies/warm_start is not there
    python studies/stop_rule.py     # 2 core-minutes; results/warm/stop_rule.json

Declared before it was run:

- One gradient is computed for each of `DOCUMENTS` rows of the training text and as many held-out
  ones (`tune`): of EBFT as the study trains it, under `rloo` and under `reinforce` on the same
  rollouts, and of the cross-entropy. The held-out gradient of EBFT under `reinforce` is an unbiased
  estimate of that of the held-out CFM loss, over the tokens of a rollout
  (tests/objective/test_estimator.py).
- A step against a training gradient lowers the held-out CFM loss, to first order, by the step size
  times the product of the two expected gradients. **The matrix of EBFT is not run from this start
  unless the interval (95 %, jackknife over the documents of both splits) of that product lies above
  zero.** `DOCUMENTS` are more than a run of the study reads in three steps.

Dimension letters: N documents, P weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matrix
import torch
from matrix import ROOT
from run import as_network, load_model, load_rows, versions, write
from torch import Tensor

from hf_ebft.config import AdvantageEstimator, EBFTSettings
from hf_ebft.data.collator import EBFTDataCollator
from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.losses import cross_entropy, policy_gradient_loss
from hf_ebft.objective.noise_scale import gradient_cosine, gradient_products, noise_scale
from hf_ebft.packed.sampling import make_generator
from hf_ebft.rows.anchors import find_blocks_for
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training.measuring import Measurer

DOCUMENTS = 96
ESTIMATORS: tuple[AdvantageEstimator, ...] = ("rloo", "reinforce")


def main(argv: Sequence[str] | None = None) -> None:
    """Gradients of both splits, their products, the rule."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--setup", choices=matrix.SETUPS, default="warm")
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    setup = matrix.SETUPS[options.setup]
    out = options.out or ROOT / "studies" / "results" / setup.name / "stop_rule.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    names = (*ESTIMATORS, "cross_entropy")
    n = options.documents
    weights = sum(weight.numel() for weight in load_model(setup).parameters())
    gradients = torch.empty(2 * len(names) * n, weights)
    train, tune = gradients.split(len(names) * n)
    for split, rows in (("train", train), ("tune", tune)):
        document_gradients(setup, split, dict(zip(names, rows.split(n), strict=True)))
    seconds = time.process_time() - started
    products = gradient_products(gradients)
    block = {
        (split, name): slice(n * (s * len(names) + k), n * (s * len(names) + k + 1))
        for s, split in enumerate(("train", "tune"))
        for k, name in enumerate(names)
    }
    held_out = block["tune", "reinforce"]
    result: dict[str, Any] = {"documents": n, "cpu_seconds": round(seconds, 1), "scales": {}}
    result["cosines"] = {}
    for (split, name), own in block.items():
        scale = noise_scale(products[own, own])
        result["scales"][f"{split}/{name}"] = finite(dataclasses.asdict(scale))
        if split == "train":
            cosine = gradient_cosine(
                products[own, own],
                products[held_out, held_out],
                products[own, held_out],
                same_documents=False,
            )
            cross = products[own, held_out]
            result["cosines"][name] = finite(
                dataclasses.asdict(cosine) | {"product": float(cross.mean())} | margin(cross)
            )
    result["trains_ebft"] = {
        name: bool(result["cosines"][name]["product_low"] > 0) for name in ESTIMATORS
    }
    write(out, result | {"versions": versions()})
    print(result)


def margin(cross: Tensor) -> dict[str, float]:
    """Interval of the mean product of two samples, by the jackknife over the documents of both."""
    mean, total = float(cross.mean()), cross.sum()
    variance = 0.0
    for axis in (0, 1):
        n, others = cross.shape[axis], cross.shape[1 - axis]
        left_out = (total - cross.sum(dim=1 - axis)) / ((n - 1) * others)
        variance += (n - 1) / n * float((left_out - left_out.mean()).square().sum())
    return {
        "product_low": mean - 1.96 * math.sqrt(variance),
        "product_high": mean + 1.96 * math.sqrt(variance),
    }


def finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinities: None."""
    return {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in numbers.items()
    }


def document_gradients(setup: matrix.Setup, split: str, into: dict[str, Tensor]) -> None:
    """A gradient for each of N rows of a split.

    Args:
        setup, split: whose rows.
        into: estimator, or `cross_entropy` -> (N, P) float32, written in place.
    """
    documents = len(into["cross_entropy"])
    model = load_model(setup).eval()
    settings = EBFTSettings(
        **{name: value for name, value in setup.ebft.items() if name in _SETTINGS}
    )
    measurer = Measurer.for_model(model, settings, as_network(load_model(setup), settings))
    _, rows = load_rows(setup.name, split)
    rows = rows.spread(documents, setup.evaluation["seed"])
    weights = list(model.parameters())
    for index in range(documents):
        read = measurer.read(EBFTDataCollator()([rows[index]]))
        layout = PackedLayout(
            read,
            find_blocks_for(settings, read),
            settings.n_samples_per_prompt,
            settings.generate_max_len,
        )
        generator = make_generator(measurer.device, index, 17, 0 if split == "train" else 1)
        with torch.no_grad():
            rollouts = measurer.sample(layout, generator)
            rewards, _ = measurer.rewards(rollouts)
        scored = measurer.log_probs(rollouts, with_document=True)
        assert scored.document is not None
        losses = {
            estimator: policy_gradient_loss(
                scored.rollout, compute_advantages(rewards, estimator), layout
            )
            for estimator in ESTIMATORS
        } | {"cross_entropy": cross_entropy(scored.document, read)}
        for name, loss in losses.items():
            gradient = torch.autograd.grad(loss, weights, retain_graph=True)
            torch.cat([part.flatten() for part in gradient], out=into[name][index])


_SETTINGS = frozenset(field.name for field in dataclasses.fields(EBFTSettings))


if __name__ == "__main__":
    main()
