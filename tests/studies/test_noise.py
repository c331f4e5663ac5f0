"""The study of noise: its table is the one on the page."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "studies"))

import noise  # noqa: E402


def test_the_page_shows_the_results() -> None:
    page = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")
    assert noise.table(noise.OUT) in page


def test_what_is_not_finite_is_unknown() -> None:
    assert noise.in_brackets(noise.finite(1.26, float("nan"), float("inf")), 1) == (
        "1.3 [unknown, unknown]"
    )
