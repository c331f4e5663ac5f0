"""The study of noise: its table is the one on the page."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "studies"))

import noise  # noqa: E402


def test_the_page_shows_the_results() -> None:
    page = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")
    assert noise.table(noise.OUT) in page


def test_pages_claim_the_noise_that_was_measured() -> None:
    """Ratios of noise are known; a noise scale of one set of documents is half luck."""
    tiny = json.loads((noise.OUT / "tiny.json").read_text(encoding="utf-8"))
    ratio = noise.in_brackets(tiny["estimators"]["fitted"]["noise_to_rloo"], 2)
    again = noise.in_brackets(tiny["reference"], 0)
    for name in ("docs/estimators.md", "docs/study.md"):
        page = (ROOT / name).read_text(encoding="utf-8")
        assert ratio in page
        assert again in page
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"the noise of EBFT's gradient to {ratio.split()[0]} of `rloo`'s" in readme


def test_what_is_not_finite_is_unknown() -> None:
    assert noise.in_brackets(noise.finite(1.26, float("nan"), float("inf")), 1) == (
        "1.3 [unknown, unknown]"
    )
