"""The pages that tests read: README, CONTRIBUTING and docs."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(path: Path) -> str:
    """A page as it is written."""
    return path.read_text(encoding="utf-8")
