"""What a user installs and types: the distribution, its metadata, the files around the code."""

import ast
import configparser
import importlib.metadata
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_ebft

ROOT = Path(__file__).parents[1]

# Distributions whose import name differs from their own.
IMPORT_NAMES = {
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "pytest-xdist": "xdist",
    "pre-commit": "pre_commit",
}


def _setup_cfg() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def _requirements(section: str, option: str) -> list[Requirement]:
    lines = _setup_cfg()[section][option].splitlines()
    return [Requirement(line) for line in lines if line]


def _required() -> list[Requirement]:
    return _requirements("options", "install_requires")


def _extras() -> list[Requirement]:
    section = "options.extras_require"
    return [r for extra in _setup_cfg()[section] for r in _requirements(section, extra)]


def _import_names(requirements: list[Requirement]) -> set[str]:
    names = {canonicalize_name(r.name) for r in requirements}
    return {IMPORT_NAMES.get(name, name) for name in names}


def _only_in_extras() -> set[str]:
    # setuptools, packaging and PyYAML come with torch and accelerate whether we ask or not.
    dependencies_of_dependencies = {"setuptools", "packaging", "yaml"}
    return _import_names(_extras()) - _import_names(_required()) - dependencies_of_dependencies


def test_installed_version_is_the_package_s() -> None:
    assert importlib.metadata.version("hf_ebft") == hf_ebft.__version__


def test_citation_names_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hf_ebft.__version__


def test_type_marker_is_beside_the_modules() -> None:
    assert importlib.resources.files("hf_ebft").joinpath("py.typed").is_file()


def test_wheel_holds_the_whole_package_and_nothing_else(tmp_path: Path) -> None:
    # Built from a copy: setuptools leaves a build folder in the tree that it builds.
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "hf_ebft", source / "hf_ebft", ignore=ignore)
    shutil.copytree(ROOT / "tests", source / "tests", ignore=ignore)
    shutil.copytree(ROOT / "examples", source / "examples", ignore=ignore)
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps"]
    command += ["--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run(command, check=True)

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"hf_ebft-{hf_ebft.__version__}-py3-none-any")
    packed = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    expected = {
        path.relative_to(source)
        for path in (source / "hf_ebft").rglob("*")
        if path.is_file() and path.suffix in (".py", ".typed", ".jinja")
    }
    demo = Path("hf_ebft/commands/demo_files")  # where demo_files.py looks
    model = source / "examples" / "tiny_model"
    expected |= {demo / "tiny_model" / path.name for path in model.iterdir()}
    expected.add(demo / "demo.yaml")
    info = f"hf_ebft-{hf_ebft.__version__}.dist-info"
    assert {path for path in packed if path.parts[0] != info} == expected
    assert Path(info, "licenses", "LICENSE") in packed


@pytest.mark.parametrize("name", ["objective.compute_advantages", "config.EBFTSettings"])
def test_modules_are_attributes_of_the_package(name: str) -> None:
    """As they were while `import hf_ebft` imported them all."""
    program = f"import hf_ebft; hf_ebft.{name}; print(hasattr(hf_ebft, 'no_such_module'))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n"


def test_import_needs_no_extra() -> None:
    blocked = _only_in_extras()
    assert {"datasets", "evaluate", "trl", "tensorboard"} <= blocked
    # A None in sys.modules is how Python says "not there": imports of the name and of what lies
    # under it raise, and importlib.util.find_spec, which transformers asks, finds nothing.
    program = f"""
import sys
for name in {sorted(blocked)!r}:
    sys.modules[name] = None
import hf_ebft
print(hf_ebft.EBFTConfig, hf_ebft.EBFTTrainer, hf_ebft.Rollouts)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_tests_are_collected_without_the_extras(tmp_path: Path) -> None:
    """What needs an extra is skipped; it does not keep the rest from running."""
    extras = set(_setup_cfg()["options.extras_require"]) - {"test", "dev"}
    wanted = [r for extra in extras for r in _requirements("options.extras_require", extra)]
    blocked = _import_names(wanted) & _only_in_extras()
    assert {"datasets", "trl", "tensorboard", "matplotlib"} <= blocked
    plugin = tmp_path / "blocker.py"
    plugin.write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({sorted(blocked)!r}))\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "pytest", "-p", "blocker", "--collect-only", "-q", "-n0"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def _imported(path: Path) -> Iterator[str]:
    """Top-level names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_every_import_of_the_package_is_declared() -> None:
    declared = _import_names(_required()) | _import_names(_extras())
    known = declared | set(sys.stdlib_module_names) | {"hf_ebft"}
    files = sorted((ROOT / "hf_ebft").rglob("*.py"))
    undeclared = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in _imported(path)
        if name not in known
    }
    assert not undeclared


def test_constraints_pin_what_setup_cfg_asks_for() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    by_name = {canonicalize_name(pin.name): pin for pin in pins}
    assert len(by_name) == len(pins), "a distribution is pinned twice"
    for requirement in _required() + _extras():
        pin = by_name[canonicalize_name(requirement.name)]
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version), (str(requirement), str(pin))


def _configuration_files(*patterns: str) -> list[Path]:
    found = {pattern: list(ROOT.glob(pattern)) for pattern in patterns}
    assert all(found.values()), found  # a pattern that matches no file checks nothing
    return sorted(path for paths in found.values() for path in paths)


@pytest.mark.parametrize(
    "path",
    _configuration_files("*.yaml", ".*.yaml", "*.cff", "*_configs/**/*.yaml", "examples/**/*.yaml"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_yaml_parses(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize(
    "path", _configuration_files("*.toml"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_toml_parses(path: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    assert tomllib.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path", _configuration_files("accelerate_configs/*.yaml"), ids=lambda path: path.name
)
def test_accelerate_accepts_its_configuration(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    load_config_from_file(str(path))  # raises on a key that it does not know


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documented_make_targets_exist(document: str) -> None:
    path = ROOT / document
    if not path.exists():
        pytest.skip(f"there is no {document}")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, flags=re.MULTILINE))
    # In code only, inline or at the start of a line: prose may "make sure" of things.
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, flags=re.MULTILINE)
    assert named
    assert set(named) <= targets


def test_makefile_recipes_name_files_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:examples|accelerate_configs|benchmarks)/[\w./]+", makefile))
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()
