"""Reads the YAML files that people write by hand, and says in which line they went wrong."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice, of which YAML silently keeps the last."""

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
    """The mapping that a YAML file holds; an empty file is an empty one.

    Args:
        path: the file; UTF-8, with or without a byte-order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: naming file and line: it is no YAML, a key is given twice, or it holds something
            else than `key: value` lines.
    """
    try:
        options = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason}); save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{path}{line} is no YAML: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ValueError(
            f"{path} must hold lines of the form 'option: value', and holds a "
            f"{type(options).__name__}."
        )
    return options
