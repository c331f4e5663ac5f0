"""Functions that every Python carries, as prompts with ground truths: the head, then the body.

For structured mode without anything to download. Which file belongs to which domain and split is
decided by `hf_ebft/data/stdlib_text.py`; the small model has seen `general/pretrain` and nothing
else.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from hf_ebft.data import stdlib_text

# Short enough for completions of a few dozen tokens, long enough to be more than `pass`.
BODY_CHARACTERS = range(20, 101)
HEAD_CHARACTERS = range(1, 301)
# Longer files have most of the functions, and take most of the time to parse.
FILE_CHARACTERS = range(1, 20_001)


def load(domain: str, split: str, root: Path | None = None) -> list[dict[str, str]]:
    """Functions in the shorter files of one split of one domain, in the order of the files.

    Args:
        domain: a key of `stdlib_text.SPLITS`.
        split: one of that domain's splits.
        root: the library's folder; `None` means the running Python's.

    Returns:
        Rows with `prompt` (from `def` to the docstring's end) and `ground_truth` (the rest of
        the function, indented as it stands).

    Raises:
        ValueError: no such domain or split, or none of its functions is short enough.
    """
    rows = [
        {"prompt": head, "ground_truth": body}
        for document in stdlib_text.load(domain, split, root).documents
        if len(document.text) in FILE_CHARACTERS
        for head, body in functions(document.text)
    ]
    if not rows:
        raise ValueError(
            f"domain {domain!r}, split {split!r} holds no short functions; use another domain, "
            "'tests' or 'general' for example."
        )
    return rows


def functions(source: str) -> Iterator[tuple[str, str]]:
    """Head and body of every short function, outermost first; nothing if it does not parse."""
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
        # Only a body that begins on a line of its own is told from the head by lines.
        if lines[start][: statements[0].col_offset].strip():
            continue
        head, body = (
            "".join(lines[node.lineno - 1 : start]),
            "".join(lines[start : node.end_lineno]),
        )
        if len(head) in HEAD_CHARACTERS and len(body) in BODY_CHARACTERS:
            yield head, body
