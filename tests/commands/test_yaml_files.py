"""YAML files that people write: their contents, and errors that name the line."""

from pathlib import Path

import pytest

from hf_ebft.commands.yaml_files import read_mapping


def test_a_mapping_is_read_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = "a: 1\nb: {c: [2, x], a: 3}\n"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(text, encoding=encoding)
        assert read_mapping(path) == {"a": 1, "b": {"c": [2, "x"], "a": 3}}
    path.write_text("# nothing yet\n")
    assert read_mapping(path) == {}


def test_anchors_and_merged_mappings_are_not_repeated_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nmore:\n  <<: *base\n  b: 3\n")
    assert read_mapping(path)["more"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", r"run\.yaml, line 3: 'a' is given a second time .*line 1"),
        (b"x:\n  b: 2\n  b: 2\n", r"run\.yaml, line 3: 'b' is given a second time .*line 2"),
        (b"a: 1\nb: 'open\n", r"run\.yaml, line 3 is not valid YAML: found unexpected end"),
        (b"a: 1\n\tb: 2\n", r"run\.yaml, line 2 is not valid YAML"),
        (b"- a\n- b\n", r"run\.yaml contains a list, .* write lines"),
        (b"a: \x07\n", r"run\.yaml is not valid YAML: .*special characters"),
        (b"a: \xff\xfe\n", r"run\.yaml is not UTF-8 text .*save it as UTF-8"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_mapping(path)
