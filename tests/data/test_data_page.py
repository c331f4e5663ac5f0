"""The examples of docs/data.md run, in the order of the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

datasets = pytest.importorskip("datasets")

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def blocks(section: str) -> list[str]:
    """The Python of a section."""
    text = PAGE.read_text(encoding="utf-8")
    start = text.index(f"\n## {section}\n")
    end = text.find("\n## ", start + 1)
    return BLOCK.findall(text[start:end])


def test_the_examples_of_files_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has an assertion of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names: dict[str, Any] = {}
    found = blocks("Files")
    assert len(found) >= 5
    for code in found:
        assert "assert " in code
        exec(code, names)
