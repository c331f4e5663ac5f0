"""What the source has to look like: short functions, one markup, helpers in one place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "hf_ebft").rglob("*.py"))
SUPPORT = sorted((ROOT / "tests" / "support").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FOLDERS = ("hf_ebft", "examples", "benchmarks", "studies", "tests", "tools")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]

LONGEST_FUNCTION = 80  # lines, with the docstring
LONGEST_TRAINER = 299

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def public(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Functions, classes and methods whose names do not start with an underscore.

    Methods of Python's data model and `__post_init__` explain themselves.
    """
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, Function) and not member.name.startswith("_"):
                        yield f"{node.name}.{member.name}", member


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    assert [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(parse(path))
        if isinstance(node, Function)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ] == []


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_modules_and_what_is_public_have_docstrings(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree), "a first line that says what the reader finds here"
    assert [name for name, node in public(tree) if not ast.get_docstring(node)] == []


def test_the_trainer_stays_on_one_screen() -> None:
    """What is no step of the algorithm has a module of its own."""
    text = (ROOT / "hf_ebft" / "trainer.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_TRAINER


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_docstrings_and_comments_are_markdown(path: Path) -> None:
    """As mkdocstrings and editors render it: `code`, no roles and double backticks of Sphinx."""
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"(?<!`)`{2}(?!`)|:(?:class|func|meth|mod|attr|data):`", text) == []


@pytest.mark.parametrize("path", SUPPORT[1:], ids=name_of)
def test_helpers_say_what_they_are(path: Path) -> None:
    assert ast.get_docstring(parse(path))


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_tests_import_helpers_from_support_only(path: Path) -> None:
    """A helper in a test file is found by nobody, and written again."""
    imported = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom)
        and (node.level or (node.module or "").split(".")[0] == "tests")
        for alias in node.names
    ]
    assert [name for name in imported if not name.startswith("tests.support.")] == []
