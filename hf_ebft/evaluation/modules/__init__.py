"""Metrics as modules of the `evaluate` library, loaded from this folder, without the hub.

import evaluate
from hf_ebft.evaluation.modules import module_path

cfm = evaluate.load(module_path("cfm"))
cfm.compute(predictions=features_of_rollouts, references=features_of_ground_truths)
"""

from pathlib import Path

MODULES = ("cfm", "cfm_text", "pass_at_k")


def module_path(name: str) -> str:
    """What `evaluate.load` takes.

    Args:
        name: one of `MODULES`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODULES:
        raise ValueError(
            f"There is no module {name!r}: use one of {', '.join(map(repr, MODULES))}."
        )
    return str(Path(__file__).parent / name)
