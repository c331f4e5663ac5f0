"""Text that is no Unicode: halves of characters, which tokenizers refuse."""

from __future__ import annotations


def fault_of(text: str) -> str | None:
    """What is wrong with the characters of a text, as the rest of a sentence; None if nothing."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return (
            f"holds a lone surrogate ({text[error.start]!r} at character {error.start}), half of a "
            "character, which no tokenizer reads; drop the row, or repair its text: "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        )
    return None


def require_unicode(text: str, where: str) -> str:
    """The text.

    Args:
        text: any text.
        where: what it is, for the error.

    Raises:
        ValueError: it holds half of a character.
    """
    fault = fault_of(text)
    if fault is not None:
        raise ValueError(f"{where} {fault}")
    return text
