"""Reads YAML files that people write by hand; errors name the file and the line."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Raises for a key that is given twice; YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in first:
                raise ValueError(
                    f"line {line}: {key.value!r} is given a second time (first in line "
                    f"{first[key.value]}); keep one of the two."
                )
            first[key.value] = line
        return super().construct_mapping(node, deep)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; an empty file gives an empty mapping.

    Args:
        path: the file; UTF-8, with or without a byte-order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not valid YAML, repeats a key, or is not a list of `key: value`
            lines. The message names file and line.
    """
    try:
        options = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = error.problem or error.context
        raise ValueError(f"{path}{line} is not valid YAML: {problem}.") from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ValueError(
            f"{path} contains a {type(options).__name__}, but it must be a mapping; write lines of "
            "the form 'option: value'."
        )
    return options
