"""Every command that README and the docs show: the program exists, and so do its options."""

import contextlib
import functools
import io
import re
from pathlib import Path

import pytest

from hf_ebft.cli import COMMANDS, main
from tests.support.pages import PAGES, ROOT, text_of

pytest.importorskip("datasets")
pytest.importorskip("trl")

BLOCK = re.compile(r"```(?:bash|sh)\n(.*?)```", re.DOTALL)
OPTION = re.compile(r"(?<=\s)--([a-zA-Z][\w-]*)")
OURS = re.compile(r"\bhf[-_]ebft ([a-z]+)(.*)")
SCRIPT = re.compile(r"\bpython ((?:examples|benchmarks|studies)/\w+\.py)(.*)")


def commands() -> list[tuple[str, str]]:
    """Page and command, one line each, without comments."""
    found = []
    for path in PAGES:
        for block in BLOCK.findall(text_of(path)):
            for line in block.replace("\\\n", " ").splitlines():
                found.append((path.name, line.split(" #")[0].strip()))
    return [(page, line) for page, line in found if OURS.search(line) or SCRIPT.search(line)]


@functools.cache
def options_of(command: str) -> frozenset[str]:
    """What a command explains, in every mode."""
    asked = [["--help"]]
    if command in ("train", "demo"):
        asked = [["--help-all"], ["--mode", "structured", "--help-all"]]
    text = io.StringIO()
    for arguments in asked:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([command, *arguments])
    if command == "preflight":  # which takes those of the run that it is about, too
        return options_of("train") | frozenset(OPTION.findall(text.getvalue()))
    return frozenset(OPTION.findall(text.getvalue()))


@functools.cache
def options_of_folder(folder: str) -> frozenset[str]:
    sources = [text_of(path) for path in (ROOT / folder).rglob("*.py")]
    return frozenset(re.findall(r"\"--([a-zA-Z][\w-]*)\"", "\n".join(sources)))


def test_there_are_commands() -> None:
    named = {match[1] for _, line in commands() if (match := OURS.search(line))}
    assert {"train", "report", "evaluate", "serve", "convert"} <= named


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_documented_command_exists_with_its_options(page: str, line: str) -> None:
    if ours := OURS.search(line):
        name, rest = ours.groups()
        assert name in COMMANDS
        known = options_of(name)
    else:
        script = SCRIPT.search(line)
        assert script is not None
        assert (ROOT / script[1]).exists()
        rest, known = script[2], options_of_folder(Path(script[1]).parts[0])
    assert set(OPTION.findall(rest)) <= known
