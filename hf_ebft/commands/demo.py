"""`hf-ebft demo`: `hf-ebft train` on a small model and text that need no download.

hf-ebft demo
hf-ebft demo --max_steps 2 --report_rows 0                       # options of hf-ebft train
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers.integrations.integration_utils import is_tensorboard_available

from hf_ebft.commands import train
from hf_ebft.commands.runs.demo_files import DEMO_CONFIG, DEMO_MODEL, require_demo_files


def main(argv: Sequence[str]) -> None:
    """Train with the demo's YAML, into `outputs/demo`; options on the command line win.

    Raises:
        FileNotFoundError: the demo's files are not installed.
    """
    require_demo_files()
    if {"-h", "--help", "--help-all", "--help_all"} & set(argv):
        print(
            f"hf-ebft demo [--option value ...]: hf-ebft train with {DEMO_CONFIG}.\n"
            "It takes the options of hf-ebft train; those on the command line win:\n"
        )
    options = [f"--config={DEMO_CONFIG}", f"--model_name_or_path={DEMO_MODEL}"]
    if not is_tensorboard_available():
        print(
            "TensorBoard is not installed, so no curves are written. To get them: "
            "pip install 'hf_ebft[examples]'."
        )
        options.append("--report_to=none")
    train.main([*options, *argv])
