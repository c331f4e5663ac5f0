"""Writes a conversion as a YAML file that people can read and `hf-ebft train` can run."""

from __future__ import annotations

import textwrap

import yaml

from hf_ebft.conversion.axolotl import Conversion

WIDTH = 100


def to_yaml(conversion: Conversion, source: str) -> str:
    """The options, under comments that list what was not carried over and further notes.

    Args:
        conversion: the conversion.
        source: name of the original file.
    """
    paragraphs = [f"Converted from {source}."]
    if conversion.left:
        paragraphs.append("Not carried over:")
        paragraphs += [f"- {key}: {why}." for key, why in conversion.left.items()]
    if conversion.notes:
        paragraphs.append("To know:")
        paragraphs += [f"- {note}" for note in conversion.notes]
    lines = [
        line
        for paragraph in paragraphs
        for line in textwrap.wrap(
            paragraph,
            WIDTH - 2,
            subsequent_indent="  " if paragraph.startswith("- ") else "",
            break_long_words=False,
        )
    ]
    comments = "".join(f"# {line}\n" for line in lines)
    return comments + yaml.safe_dump(conversion.options, sort_keys=False, width=WIDTH)
