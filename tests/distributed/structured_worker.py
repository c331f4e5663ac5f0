"""One process of a run in structured mode; writes what it saw to `<folder>/rank<i>.pt`."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

if os.environ.get("HF_EBFT_TEST_FSDP_ON_CPU"):
    from tests.support import fsdp_on_cpu

    fsdp_on_cpu.enable()

from accelerate import PartialState
from peft import LoraConfig

from tests.support.structured_runs import (
    OUT_OF_STEP,
    cross_entropy_run,
    evaluated_first,
    lora,
    run,
)


def advantages(folder):
    """Groups that the processes share, and groups that they do not; adapters; evaluation."""
    return {
        "split": run(folder / "split", per_device_train_batch_size=2),
        "accumulated": run(
            folder / "accumulated",
            per_device_train_batch_size=3,
            per_device_eval_batch_size=3,
            num_generations=3,
            gradient_accumulation_steps=2,
            num_iterations=2,
        ),
        "out_of_step": run(folder / "out", **OUT_OF_STEP),
        # Checkpointing, because the cross-entropy is a second forward pass before one backward.
        "adapters": run(
            folder / "adapters",
            peft_config=lora(LoraConfig),
            ce_coef=0.1,
            gradient_checkpointing=True,
        ),
        "evaluated": run(folder / "evaluated", eval_strategy="steps", eval_steps=1, ce_coef=0.1),
        "evaluated_first": evaluated_first(folder / "ef"),
        "cross_entropy": cross_entropy_run(folder / "ce"),
        "adaptive": run(
            folder / "adaptive",
            adaptive_max_tokens=True,
            gt_length_multiplier=0.25,
            max_completion_length=50,
        ),
    }


def sharded(folder):
    """A feature network that FSDP2 shards, and batches that differ in number between processes."""
    return {
        "replicated": run(folder / "replicated", feature_placement="same_device", ce_coef=0.1),
        "sharded": run(folder / "sharded", feature_placement="sharded", feature_batch_tokens=30),
        "evaluated_first": evaluated_first(folder / "ef"),
    }


SCENARIOS = {"advantages": advantages, "sharded": sharded}

if __name__ == "__main__":
    scenario, target = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    seen = SCENARIOS[scenario](target)
    torch.save(seen, target / f"rank{PartialState().process_index}.pt")
    PartialState().destroy_process_group()  # left open, it sometimes aborts the process at its end
