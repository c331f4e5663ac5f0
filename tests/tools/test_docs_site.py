"""Pages and links of the documentation site, before zensical renders it."""

from pathlib import Path

import pytest

pytest.importorskip("nbconvert")

from tools.docs_site import NOTEBOOK, ROOT, Pages, page_of


@pytest.mark.parametrize(
    ("file", "page"),
    [
        ("README.md", "index.md"),
        ("docs/data.md", "data.md"),
        (NOTEBOOK, "tutorial.md"),
        ("docs/packed_row.svg", "packed_row.svg"),
        ("hf_ebft/rows/layout.py", "reference/hf_ebft/rows/layout.md"),
        ("hf_ebft/rows/__init__.py", "reference/hf_ebft/rows/index.md"),
        ("examples/configs/demo.yaml", "files/examples/configs/demo.yaml.md"),
        ("studies/results/study.png", "files/studies/results/study.png"),
    ],
)
def test_every_file_has_its_page(file: str, page: str) -> None:
    assert (ROOT / file).exists()
    assert page_of(file) == page


@pytest.mark.parametrize(
    ("file", "link", "on_the_site"),
    [
        ("README.md", "docs/data.md#text", "data.md#text"),
        ("docs/data.md", "../README.md", "index.md"),
        ("docs/paper.md", "../hf_ebft/rows/layout.py", "reference/hf_ebft/rows/layout.md"),
        ("hf_ebft/report/page.py", "charts.md", "charts.md"),  # no such file: strict finds it
        ("docs/data.md", "https://example.org/data.md", "https://example.org/data.md"),
    ],
)
def test_links_lead_to_pages_of_the_site(file: str, link: str, on_the_site: str) -> None:
    pages = Pages(Path("nowhere"), ROOT / NOTEBOOK)
    assert pages.with_links(f"see [it]({link}).", file) == f"see [it]({on_the_site})."


def test_a_linked_file_gets_a_page_and_so_does_what_it_links(tmp_path: Path) -> None:
    pages = Pages(tmp_path, ROOT / NOTEBOOK)
    pages.waiting = ["docs/paper.md"]
    pages.write_all()
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")}
    assert {"paper.md", "how_it_works.md", "reference/hf_ebft/objective/rewards.md"} <= written
    listed = (tmp_path / "files/tests/objective/test_rewards.py.md").read_text(encoding="utf-8")
    assert listed.startswith("# tests/objective/test_rewards.py\n\n````python\n")
