"""What README and docs point at exists: files, links, and names of the package."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

from tests.support.pages import PAGES, ROOT, text_of

# Links of Markdown, without titles; and code that reads like a file of this repository.
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
FILE = re.compile(
    r"\b(?:hf_ebft|tests|examples|docs|benchmarks|studies|tools|accelerate_configs)/[\w./-]*\w"
)
PLACEHOLDERS = ("accelerate_configs/X.yaml", "tests/test_x.py")
NAME = re.compile(r"\bhf_ebft(?:\.\w+)+")

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


@page
def test_relative_links_lead_somewhere(path: Path) -> None:
    links = [link for link in LINK.findall(text_of(path)) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


@page
def test_files_that_are_named_exist(path: Path) -> None:
    text = re.sub(r"\]\([^)]*\)|https?://\S+", "", text_of(path))
    named = [name for name in FILE.findall(text) if Path(name).suffix and name not in PLACEHOLDERS]
    assert [name for name in named if not (ROOT / name).exists()] == []


def importable(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@page
def test_names_of_the_package_can_be_imported(path: Path) -> None:
    names = sorted(set(NAME.findall(re.sub(r"https?://\S+", "", text_of(path)))))
    assert [name for name in names if not importable(name)] == []


def test_the_page_on_architecture_lists_every_folder() -> None:
    text = text_of(ROOT / "docs" / "architecture.md")
    folders = {path.parent.name for path in (ROOT / "hf_ebft").glob("*/__init__.py")}
    assert folders and [name for name in sorted(folders) if f"`{name}/`" not in text] == []


def test_readme_and_contributing_link_the_page_on_architecture() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        assert "(docs/architecture.md)" in text_of(ROOT / name)


def titles_of_findings(module: str) -> list[str]:
    """The constant beginnings of what the `Finding`s of a module are called."""
    calls = [
        node
        for node in ast.walk(ast.parse(text_of(ROOT / module)))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Finding"
    ]
    parts = [ast.unparse(call.args[1]) for call in calls]
    return [title for part in parts for title in re.findall(r"'([A-Z][^'{]+)", part)]


@pytest.mark.parametrize(
    ("name", "module"),
    [("report.md", "hf_ebft/report/health.py"), ("preflight.md", "hf_ebft/preflight/verdict.py")],
)
def test_the_page_explains_every_finding(name: str, module: str) -> None:
    titles, text = titles_of_findings(module), text_of(ROOT / "docs" / name)
    assert len(titles) > 10
    assert [title for title in titles if title.strip() not in text] == []


def test_readme_is_short_and_narrow() -> None:
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) < 150
    assert [line for line in lines if len(line) > 100] == []


def test_the_site_has_every_page_in_its_menu() -> None:
    menu = set(re.findall(r'= "([\w/]+\.md)"', text_of(ROOT / "zensical.toml")))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {"tutorial.md"}
    assert menu == pages | {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"}


def test_the_page_on_settings_shows_the_code() -> None:
    """`python -m tools.settings_table` writes it."""
    pytest.importorskip("trl")
    from tools.settings_table import page as settings_page

    assert text_of(ROOT / "docs" / "settings.md") == settings_page()


def test_the_tutorial_is_kept_without_outputs() -> None:
    """`make docs` runs it; outputs in the repository would be those of an older code."""
    cells = json.loads(text_of(ROOT / "docs" / "tutorial.ipynb"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"]] == []
