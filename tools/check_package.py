"""Build wheel and source distribution, check both, and run the demo from the installed wheel.

    python -m tools.check_package                  # about a minute; leaves both in dist/

The wheel goes into a fresh environment that borrows the libraries of this one, but not its
`hf_ebft`, and the commands run in an empty folder: nothing of the clone is in reach.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"


def main() -> None:
    """Build, check, install, run; the first failure ends it."""
    shutil.rmtree(DIST, ignore_errors=True)
    build = ("build", "--quiet", "--no-isolation", "--outdir", str(DIST))
    run(sys.executable, "-m", *build, str(ROOT))
    files = sorted(map(str, DIST.iterdir()))
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    (wheel,) = DIST.glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        home, elsewhere = Path(folder, "venv"), Path(folder, "elsewhere")
        elsewhere.mkdir()
        command = install(wheel, home)
        run(command, "--version", folder=elsewhere)
        run(command, "--help", folder=elsewhere)
        demo = ("demo", "--max_steps", "2", "--report_rows", "4", "--max_train_rows", "64")
        run(command, *demo, folder=elsewhere)
        model = elsewhere / "outputs" / "demo" / "model.safetensors"
        if not model.is_file():
            sys.exit(f"The demo ended without an error, but there is no {model}.")
    print("Checked: " + ", ".join(Path(file).name for file in files))


def install(wheel: Path, home: Path) -> str:
    """Install a wheel into a new environment with the libraries of this one.

    Returns:
        The path of its `hf-ebft`.
    """
    venv.create(home, symlinks=True)
    python = str(home / "bin" / "python")
    site = sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)})
    # A folder in a .pth file comes last, and .pth files in it are not read: not the editable
    # installation of this environment is found, but its libraries are.
    Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    options = ("--no-deps", "--ignore-installed", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, str(wheel))
    where = run(python, "-c", "import hf_ebft; print(hf_ebft.__file__)", folder=home, capture=True)
    if not Path(where.strip()).is_relative_to(home):
        sys.exit(f"The installed package is not the one that is imported, but {where.strip()}.")
    return str(home / "bin" / "hf-ebft")


def run(*command: str, folder: Path = ROOT, capture: bool = False) -> str:
    """Run a command without this clone on Python's path; what it printed, if that is captured."""
    print("+ " + " ".join(command), flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        check=False,
        text=True,
        stdout=subprocess.PIPE if capture else None,
    )
    if done.returncode:
        sys.exit(f"{command[0]} failed with exit status {done.returncode}.")
    return done.stdout or ""


if __name__ == "__main__":
    main()
