"""`hf-ebft convert`: turn an axolotl configuration into one of `hf-ebft train`.

hf-ebft convert axolotl.yaml --output run.yaml
hf-ebft convert axolotl.yaml                    # print it instead
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from hf_ebft.commands.yaml_files import read_mapping
from hf_ebft.conversion import Conversion, convert_axolotl, to_yaml


def main(argv: Sequence[str]) -> None:
    """Read, convert and write; list on stderr what could not be carried over."""
    parser = ArgumentParser(
        prog="hf-ebft convert",
        description="Turns an axolotl configuration (rl: ebft) into one of hf-ebft train, and "
        "names every key that could not be carried over.",
    )
    parser.add_argument("file", type=Path, help="axolotl's YAML")
    parser.add_argument("--output", type=Path, help="file to write; default: print")
    arguments = parser.parse_args(argv)
    refuse_source(arguments.file, arguments.output)
    config = read_mapping(arguments.file)
    try:
        conversion = convert_axolotl(config)
    except ValueError as error:
        raise ValueError(f"{arguments.file}: {error}") from error
    text = to_yaml(conversion, arguments.file.name)
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    print(summary(conversion), file=sys.stderr)


def refuse_source(source: Path, output: Path | None) -> None:
    """Raise if the output would overwrite the input.

    Raises:
        ValueError: both are the same file.
    """
    if output is not None and output.resolve() == source.resolve():
        raise ValueError(
            f"--output {output} would overwrite the file that is converted; name another file."
        )


def summary(conversion: Conversion) -> str:
    """What was carried over and what was not, for the terminal."""
    left = [f"  {key}: {why}" for key, why in conversion.left.items()]
    head = f"{len(conversion.carried)} keys carried over, {len(left)} not"
    return "\n".join([f"{head}:" if left else f"{head}.", *left])
