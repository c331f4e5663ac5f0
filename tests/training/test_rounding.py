"""Weights that rounding keeps from changing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ebft import EBFTTrainer
from hf_ebft.training.rounding import share_that_stands_still, still_weights
from tests.support.tiny import config, texts, tiny_llama


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [0.0, 1e-7, 1e-6, 2e-4, 0.003, 0.1])
def test_a_step_below_half_a_unit_is_rounded_away(dtype: torch.dtype, step: float) -> None:
    """Away from zero, where neighbours are a whole unit apart, by adding the step."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, generator=generator) * 10 ** (
        torch.rand(5000, generator=generator) * 8 - 7
    )
    weight = torch.cat([weight, torch.tensor([0.0, 1.0, -1.0, 0.5, 2**-20])]).to(dtype)
    moved = (weight.double() + step * torch.where(weight < 0, -1.0, 1.0)).to(dtype)
    assert int(still_weights(weight, step)) == int((moved == weight).sum())


def test_share_counts_weights_of_any_precision() -> None:
    weights = [torch.ones(30, dtype=torch.bfloat16), torch.ones(10), torch.zeros(60).bfloat16()]
    assert share_that_stands_still(weights, 1e-3) == pytest.approx(0.3)
    assert share_that_stands_still(weights, 0.01) == 0.0
    assert share_that_stands_still([], 1e-3) == 0.0


def warnings_of(folder: Path, caplog: pytest.LogCaptureFixture, **settings: Any) -> list[str]:
    dtype = settings.pop("dtype", torch.bfloat16)
    optimizers = settings.pop("optimizers", None)
    model = tiny_llama().to(dtype)
    extra = {}
    if optimizers is not None:
        extra["optimizers"] = (optimizers(model.parameters(), lr=1e-6), None)
    args = config(folder, max_steps=1, verify_packing=False, **settings)
    trainer = EBFTTrainer(model, args, train_dataset=texts(24, 20), **extra)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hf_ebft"):
        trainer.train()
    lines = (record.getMessage() for record in caplog.records)
    return [line for line in lines if "last place" in line]


def test_the_paper_s_learning_rate_does_not_change_bfloat16_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = warnings_of(tmp_path, caplog, learning_rate=1e-6)
    share = share_that_stands_still(tiny_llama().bfloat16().parameters(), 1e-6)
    assert share > 0.9
    assert f"bfloat16. For {100 * share:.1f} % of them" in line
    assert "learning_rate=1e-06" in line and "bf16=True" in line and "master weights" in line


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.01},
        {"learning_rate": 1e-6, "dtype": torch.float32},
        {"learning_rate": 1e-6, "dtype": torch.float32, "bf16": True},
        # Its step is not the learning rate.
        {"learning_rate": 1e-6, "optim": "sgd"},
        {"learning_rate": 1e-6, "optimizers": torch.optim.SGD},
    ],
    ids=["large steps", "float32", "autocast", "sgd", "own sgd"],
)
def test_no_warning_for_weights_that_can_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    assert not warnings_of(tmp_path, caplog, **settings)
