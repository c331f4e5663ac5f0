"""Functions of Python's standard library as prompts (head) with ground truths (body).

They are for structured mode without downloads. `hf_ebft/data/stdlib_text.py` decides which file
belongs to which domain and split. The small model was trained on `general/pretrain` only.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from hf_ebft.data import stdlib_text

# Short enough for completions of a few dozen tokens, long enough to be more than `pass`.
BODY_CHARACTERS = range(20, 101)
HEAD_CHARACTERS = range(1, 301)
# Longer files are left out: they have most of the functions, but take most of the time to parse.
FILE_CHARACTERS = range(1, 20_001)


def load(domain: str, split: str, root: Path | None = None) -> list[dict[str, str]]:
    """Functions in the shorter files of one split of one domain, in the order of the files.

    Args:
        domain: a key of `stdlib_text.SPLITS`.
        split: one of that domain's splits.
        root: the library's folder; `None` means the running Python's.

    Returns:
        Rows with `prompt` (from `def` to the end of the docstring) and `ground_truth` (the rest of
        the function, with its indentation).

    Raises:
        ValueError: the domain or split does not exist, or none of its functions is short enough.
    """
    rows = [
        {"prompt": head, "ground_truth": body}
        for document in stdlib_text.load(domain, split, root).documents
        if len(document.text) in FILE_CHARACTERS
        for head, body in functions(document.text)
    ]
    if not rows:
        raise ValueError(
            f"domain {domain!r}, split {split!r} contains no short functions; use another domain, "
            "such as 'tests' or 'general'."
        )
    return rows


def functions(source: str) -> Iterator[tuple[str, str]]:
    """Head and body of every short function, outermost first; none if the source does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if not statements:
            continue
        start = statements[0].lineno - 1
        # Head and body can be separated by lines only if the body begins on its own line.
        if lines[start][: statements[0].col_offset].strip():
            continue
        head, body = (
            "".join(lines[node.lineno - 1 : start]),
            "".join(lines[start : node.end_lineno]),
        )
        if len(head) in HEAD_CHARACTERS and len(body) in BODY_CHARACTERS:
            yield head, body
