"""Paths of the demo's model and configuration: in the wheel, or in `examples/` of a clone."""

from __future__ import annotations

from pathlib import Path

_PACKAGED = Path(__file__).parents[1] / "demo_files"
_EXAMPLES = Path(__file__).parents[3] / "examples"

_IS_PACKAGED = _PACKAGED.is_dir()
#: A Llama of 1.9 million parameters with its tokenizer (7.7 MB).
DEMO_MODEL = (_PACKAGED if _IS_PACKAGED else _EXAMPLES) / "tiny_model"
DEMO_CONFIG = _PACKAGED / "demo.yaml" if _IS_PACKAGED else _EXAMPLES / "configs" / "demo.yaml"


def require_demo_files() -> None:
    """Raise if the demo's files are missing.

    Raises:
        FileNotFoundError: naming the missing file and what to do.
    """
    missing = [path for path in (DEMO_MODEL / "config.json", DEMO_CONFIG) if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"This installation of hf_ebft lacks the demo: {missing[0]} is missing. Install the "
            "wheel again (pip install --force-reinstall --no-deps hf_ebft) or work in a clone of "
            "the repository. For a run of your own, set --model_name_or_path and "
            "--dataset_name_or_path."
        )
