"""Builds the documentation site into build/site/html: `python -m tools.docs_site`, or `make docs`.

README.md and docs/ are read on a repository's page, too, where they link to files of the code.
The site has a page for each such file: the API reference for modules of `hf_ebft`, the text itself
for others. So no link leads out of the site, and a strict build checks them all.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
CONFIGURATION = ROOT / "zensical.toml"
TOP_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
NOTEBOOK = "docs/tutorial.ipynb"
# Links and pictures of Markdown: text, target, anchor.
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cfg": "ini", ".toml": "toml", ".cff": "yaml"}
PICTURES = (".svg", ".png")


@cache
def sources() -> dict[str, str]:
    """Pages that people write: file of the repository -> page of the site."""
    pages = dict(TOP_PAGES)
    for path in sorted((ROOT / "docs").rglob("*.md")):
        pages[path.relative_to(ROOT).as_posix()] = path.relative_to(ROOT / "docs").as_posix()
    pages[NOTEBOOK] = "tutorial.md"
    return pages


@cache
def modules() -> list[str]:
    """Every module of the package, as a file of the repository."""
    paths = sorted((ROOT / "hf_ebft").rglob("*.py"))
    return [path.relative_to(ROOT).as_posix() for path in paths if path.name != "__main__.py"]


def module_page(file: str) -> str:
    """`hf_ebft/rows/layout.py` -> `reference/hf_ebft/rows/layout.md`."""
    path = PurePosixPath(file)
    stem = path.parent / "index" if path.name == "__init__.py" else path.with_suffix("")
    return f"reference/{stem}.md"


def page_of(file: str) -> str:
    """The page of the site for a file or folder of the repository."""
    pages = sources()
    if file in pages:
        return pages[file]
    if file in modules():
        return module_page(file)
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    suffix = PurePosixPath(file).suffix
    return f"files/{file}" if suffix in (*PICTURES, ".md") else f"files/{file}.md"


def relative(target: str, page: str) -> str:
    """`target` as a link of `page`, both pages of the site."""
    return Path(os.path.relpath(target, PurePosixPath(page).parent)).as_posix()


class Pages:
    """The pages of the site, written one by one; links bring in further ones."""

    def __init__(self, folder: Path, notebook: Path) -> None:
        self.folder = folder
        self.notebook = notebook
        self.waiting: list[str] = [*sources(), *modules()]
        self.written: set[str] = set()

    def write_all(self) -> None:
        while self.waiting:
            file = self.waiting.pop()
            if file not in self.written:
                self.written.add(file)
                self.write(file)

    def write(self, file: str) -> None:
        source, page = ROOT / file, page_of(file)
        target = self.folder / page
        target.parent.mkdir(parents=True, exist_ok=True)
        if file == NOTEBOOK:
            target.write_text(self.with_links(self.notebook_text(target), file), encoding="utf-8")
        elif source.suffix == ".md":
            text = self.with_links(source.read_text(encoding="utf-8"), file)
            target.write_text(text, encoding="utf-8")
        elif file in modules():
            target.write_text(f"# {dotted(file)}\n\n::: {dotted(file)}\n", encoding="utf-8")
        elif source.is_dir():
            target.write_text(self.with_links(listing(source), file + "/"), encoding="utf-8")
        elif source.suffix in PICTURES:
            shutil.copy(source, target)
        else:
            language = LANGUAGES.get(source.suffix, "text")
            text = source.read_text(encoding="utf-8")
            target.write_text(f"# {file}\n\n````{language}\n{text}\n````\n", encoding="utf-8")

    def notebook_text(self, target: Path) -> str:
        """The notebook as Markdown; its pictures are written beside the page."""
        notebook = nbformat.read(self.notebook, as_version=4)
        for cell in notebook.cells:  # progress bars and notices of libraries
            if cell.cell_type == "code":
                cell.outputs = [given for given in cell.outputs if given.get("name") != "stderr"]
        body, resources = MarkdownExporter().from_notebook_node(
            notebook, {"unique_key": "tutorial"}
        )
        for name, content in resources["outputs"].items():
            (target.parent / name).write_bytes(content)
        return body

    def with_links(self, text: str, file: str) -> str:
        """`text` of a file of the repository, with links to pages of the site."""
        page = page_of(file.rstrip("/"))

        def replace(match: re.Match[str]) -> str:
            before, link, after = match.groups()
            path = (ROOT / file).parent / link if not file.endswith("/") else ROOT / file / link
            if "://" in link or not path.exists():
                return match.group()
            linked = path.resolve().relative_to(ROOT).as_posix()
            self.waiting.append(linked)
            return f"{before}{relative(page_of(linked), page)}{after}"

        return LINK.sub(replace, text)


def dotted(file: str) -> str:
    """`hf_ebft/rows/layout.py` -> `hf_ebft.rows.layout`."""
    parts = PurePosixPath(file).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def listing(folder: Path) -> str:
    """A page that lists the files of a folder."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return "\n".join([f"# {folder.relative_to(ROOT).as_posix()}", "", *(f"- {n}" for n in names)])


def reference(folder: Path) -> Iterator[str]:
    """Lines of `nav` for the modules below a folder of the package."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        file = path.relative_to(ROOT).as_posix()
        if path.is_dir() and (path / "__init__.py").exists():
            yield f'{{ "{path.name}" = ['
            yield from reference(path)
            yield "] },"
        elif file in modules():
            yield f'{{ "{dotted(file).split(".")[-1]}" = "{module_page(file)}" }},'


def write_configuration(folder: Path) -> None:
    """zensical.toml with the API reference as the last part of `nav`."""
    lines = CONFIGURATION.read_text(encoding="utf-8").splitlines()
    end = lines.index("]")  # of nav, the first list that closes at the left margin
    entry = ['{ "API reference" = [', *reference(ROOT / "hf_ebft"), "] },"]
    text = "\n".join([*lines[:end], *entry, *lines[end:], ""])
    (folder / "zensical.toml").write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--notebook",
        type=Path,
        default=ROOT / NOTEBOOK,
        help="the tutorial with its outputs (default: as committed, without)",
    )
    given = parser.parse_args(arguments)
    shutil.rmtree(SITE, ignore_errors=True)
    (SITE / "pages").mkdir(parents=True)
    Pages(SITE / "pages", given.notebook).write_all()
    write_configuration(SITE)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=SITE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
