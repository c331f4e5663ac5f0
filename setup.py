"""Puts the demo's model and configuration into the wheel; all else is in setup.cfg.

The repository keeps both in `examples/`, where people look for them, so they are no package data.
`hf_ebft/commands/runs/demo_files.py` finds them in either place.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCES = (Path("examples/tiny_model"), Path("examples/configs/demo.yaml"))
TARGET = Path("hf_ebft/commands/demo_files")


class BuildWithDemo(build_py):
    """Copies the demo's files beside the modules, except for editable installations."""

    def run(self) -> None:
        """Copy modules, then the demo's files."""
        super().run()
        if not self.editable_mode:
            for source, target in self.demo_files().items():
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(source), str(target))

    def demo_files(self) -> dict[Path, Path]:
        """Source -> place in the wheel."""
        place = Path(self.build_lib) / TARGET
        model, config = SOURCES
        files = {path: place / model.name / path.name for path in sorted(model.iterdir())}
        return files | {config: place / config.name}

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What is written, for the list of installed files."""
        return super().get_outputs(include_bytecode) + list(map(str, self.demo_files().values()))


setup(cmdclass={"build_py": BuildWithDemo})
