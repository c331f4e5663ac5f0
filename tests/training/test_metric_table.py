"""The table of metrics: nothing logged is missing in it, and the pages show what it says."""

from pathlib import Path

import pytest

from hf_ebft.training.metric_table import (
    HELD_OUT_METRICS,
    METRIC_BY_NAME,
    METRICS,
    PREFIX,
    measurement_table,
    training_table,
)
from hf_ebft.training.metrics import NAMES

ROOT = Path(__file__).parents[2]


def in_mode(mode: str) -> set[str]:
    return {metric.name for metric in METRICS if metric.mode in ("both", mode)}


def test_strided_mode_logs_what_the_table_says() -> None:
    squares = {"advantages_mean", "advantages_square"}  # logged as advantages_std
    logged = {PREFIX + name for name in NAMES if name not in squares} | {PREFIX + "advantages_std"}
    assert logged == in_mode("strided")


def test_structured_mode_logs_what_the_table_says(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from hf_ebft.structured import EBFTGRPOTrainer
    from tests.support.tiny_structured import config, policy, rows, tokenizer

    trainer = EBFTGRPOTrainer(
        policy(),
        args=config(
            tmp_path,
            max_steps=1,
            ce_coef=0.1,
            ce_coef_schedule="linear",
            ce_coef_final=0.0,
            adaptive_max_tokens=True,
        ),
        train_dataset=rows(),
        processing_class=tokenizer(),
    )
    trainer.train()
    logged = {
        name for entry in trainer.state.log_history for name in entry if name.startswith(PREFIX)
    }
    assert logged == in_mode("structured")


def test_every_metric_is_explained_once() -> None:
    assert len(METRIC_BY_NAME) == len(METRICS)
    assert all(metric.meaning for metric in (*METRICS, *HELD_OUT_METRICS.values()))
    assert all(name == metric.name for name, metric in HELD_OUT_METRICS.items())


@pytest.mark.parametrize(
    ("page", "table"),
    [("docs/metrics.md", training_table()), ("docs/evaluation.md", measurement_table())],
    ids=["training", "held-out"],
)
def test_the_page_shows_the_table(page: str, table: str) -> None:
    """`python -m hf_ebft.training.metric_table` prints what belongs there."""
    assert table in (ROOT / page).read_text(encoding="utf-8")
