"""JSON that any program reads, and a page that shows what it holds."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from hf_ebft.commands.preflight import format_verdict
from hf_ebft.objective.noise_scale import Estimate, NoiseScale
from hf_ebft.preflight.page import render_preflight
from hf_ebft.preflight.verdict import judge
from hf_ebft.report.health import Finding, Severity
from tests.support.preflights import healthy, with_changes


def test_infinity_and_nan_are_null(tmp_path: Path) -> None:
    unknown = NoiseScale(-1.0, 9.0, math.inf, 12.0, math.inf, 64)
    found = with_changes("signal", ebft=unknown, cosine=Estimate(math.nan, math.nan, math.nan))
    path = tmp_path / "preflight.json"
    found.write_json(path)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read["signal"]["ebft"]["high"] is None
    assert read["signal"]["ebft"]["low"] == 12.0
    assert read["signal"]["cosine"]["value"] is None
    assert read["cost"]["hours"] == pytest.approx(1000 * 2 / 3600)
    assert read["cost"]["rows"] == 64_000
    assert read["headroom"]["lengths"][1]["length"] == 16


def test_the_page_shows_verdict_tables_and_charts() -> None:
    found = with_changes("signal", ebft=NoiseScale(1.0, 900.0, 900.0, 700.0, 1200.0, 64))
    found = dataclasses.replace(found, findings=judge(found))
    page = render_preflight(found, title="A <title>")
    assert "A &lt;title&gt;" in page
    assert page.count("<svg") == 3
    assert "Steps are mostly noise." in page
    assert "900 [700, 1,200]" in page
    assert "yours: 64" in page
    assert "random tokens" in page
    assert "1,000 steps, 64,000 documents" in page
    assert "<script" not in page
    assert "http" not in page.replace("https://arxiv.org", "").replace("http://www.w3.org", "")


def test_a_page_of_unknown_signal_says_so() -> None:
    unknown = NoiseScale(-1.0, 9.0, math.inf, 12.0, math.inf, 64)
    found = with_changes("signal", ebft=unknown, cosine=Estimate(math.nan, math.nan, math.nan))
    page = render_preflight(found)
    assert "12 or more" in page
    assert "unknown: one of the gradients cannot be distinguished from zero" in page
    assert "nan" not in page.replace("finance", "")


def test_a_healthy_run_is_told_so() -> None:
    assert "Nothing speaks against the run." in render_preflight(healthy())


@pytest.mark.parametrize(
    ("severity", "said"),
    [("note", "speaks against"), ("warning", "see the warnings"), ("serious", None)],
)
def test_a_warning_is_not_followed_by_an_all_clear(severity: Severity, said: str | None) -> None:
    finding = Finding(severity, "Title", "What was seen", "What to do")
    found = dataclasses.replace(healthy(), findings=[finding])
    sentence = found.nothing_against
    assert (sentence is None) if said is None else (sentence is not None and said in sentence)
    for shown in (render_preflight(found), format_verdict(found)):
        assert ("Nothing" in shown) == (said is not None)
        assert sentence is None or sentence in shown
