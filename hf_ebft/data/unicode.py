"""Detects text that is not valid Unicode: lone surrogates, which tokenizers refuse."""

from __future__ import annotations


def fault_of(text: str) -> str | None:
    """A description of what is wrong with the characters of a text, or None.

    It is the end of a sentence that begins with the name of the text.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return (
            f"contains a lone surrogate ({text[error.start]!r} at character {error.start}): half a "
            "character, which tokenizers cannot encode. Drop the row, or repair its text: "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        )
    return None


def require_unicode(text: str, where: str) -> str:
    """Return the text if it is valid Unicode.

    Args:
        text: any text.
        where: name of the text, for the error.

    Raises:
        ValueError: the text contains a lone surrogate.
    """
    fault = fault_of(text)
    if fault is not None:
        raise ValueError(f"{where} {fault}")
    return text
