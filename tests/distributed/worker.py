"""One process of a launched scenario; writes what it saw to `<folder>/rank<i>.pt`."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

if os.environ.get("HF_EBFT_TEST_FSDP_ON_CPU"):
    from tests.support import fsdp_on_cpu

    fsdp_on_cpu.enable()

from accelerate import PartialState

from hf_ebft import EBFTTrainer
from tests.support.distributed_runs import (
    FITTED,
    CharacterTokenizer,
    averaged,
    documents,
    evaluated_first,
    fitted,
    make_trainer,
    resumed,
    scheduled,
    summary,
    trained,
    watched,
    whitened_by_corpus,
)


def basics(folder):
    """Training with blocks and without, adapters, batches in parts, rollouts in chunks, an uneven
    epoch, a tiny evaluation set, an evaluation before training."""
    uneven = make_trainer(
        folder / "uneven",
        data=documents((40, 5, 6, 33, 7)),
        evaluation=documents((21,)),
        max_steps=-1,
        num_train_epochs=1,
        eval_strategy="epoch",
    )
    uneven.train()
    return {
        "plain": trained(folder / "plain"),
        "adapters": trained(folder / "adapters", peft=True),
        "parts": trained(folder / "parts", rollout_batch_size=1),
        "chunks": trained(folder / "chunks", training_chunk_size=8),
        "chunks_of_adapters": trained(folder / "ca", peft=True, training_chunk_size=8),
        "scheduled": scheduled(folder / "scheduled"),
        "fitted": fitted(folder / "fitted"),
        "no_blocks": trained(folder / "no_blocks", data=documents((5, 6, 5, 6)), max_steps=1),
        "uneven": summary(uneven),
        "evaluated_first": evaluated_first(folder / "ef"),
        "evaluated_first_adapters": evaluated_first(folder / "efa", peft=True),
    }


def compiled(folder):
    """Layers compiled one by one, traced and run as they are, beside the same run as written."""
    options = {"max_steps": 2, "pad_to_multiple_of": 48, "packed_attention": "sdpa"}
    compiling = options | {"torch_compile": True, "torch_compile_backend": "eager"}
    return {
        "plain": trained(folder / "plain", **options),
        "compiled": trained(folder / "compiled", **compiling),
        "adapters": trained(folder / "adapters", peft=True, **options),
        "compiled_adapters": trained(folder / "compiled_adapters", peft=True, **compiling),
        "graphs": int(torch._dynamo.utils.counters["stats"]["unique_graphs"]),
    }


def resume(folder):
    """Checkpoints, then a final model."""
    result = {
        "plain": resumed(folder / "plain"),
        "adapters": resumed(folder / "adapters", peft=True),
        "fitted": resumed(folder / "fitted", **FITTED),
    }
    trainer = make_trainer(folder / "final", max_steps=1)
    trainer.train()
    trainer.save_model()
    return result


def sharding(folder):
    """What only FSDP2 has: gathering while sampling, a sharded feature network, mixed precision."""
    return {
        "ram_efficient": trained(folder / "ram", pretrained=folder / "saved", max_steps=2),
        "gathered": trained(folder / "gathered", gather_params_for_sampling="true", max_steps=2),
        "not_gathered": trained(folder / "not", gather_params_for_sampling="false", max_steps=2),
        "feature_sharded": trained(folder / "fs", feature_placement="sharded", max_steps=2),
        "copied": trained(folder / "fc", peft=True, feature_placement="same_device", max_steps=2),
        "shared": trained(folder / "fsh", peft=True, feature_placement="shared", max_steps=2),
        "mixed": trained(folder / "mixed", bf16=True, activation_checkpointing=True, max_steps=2),
    }


def averaging(folder):
    """Averaged weights and whitening by corpus, full weights and adapters."""
    return {
        "plain": averaged(folder / "plain"),
        "adapters": averaged(folder / "adapters", peft=True),
        "corpus": whitened_by_corpus(folder / "corpus"),
    }


def watching(folder):
    """Looks at the policy during training."""
    return watched(folder / "watched", CharacterTokenizer())


class CrashOnOneRank(EBFTTrainer):
    """Fails on process 1 alone, in the middle of a step."""

    def compute_loss(self, *args, **kwargs):
        if self.args.process_index == 1 and self.state.global_step == 1:
            raise RuntimeError("planted failure on process 1")
        return super().compute_loss(*args, **kwargs)


def crash(folder):
    make_trainer(folder, trainer_class=CrashOnOneRank).train()


SCENARIOS = {
    "basics": basics,
    "compiled": compiled,
    "resume": resume,
    "sharding": sharding,
    "averaging": averaging,
    "watching": watching,
    "crash": crash,
}

if __name__ == "__main__":
    scenario, target = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    seen = SCENARIOS[scenario](target)
    torch.save(seen, target / f"rank{PartialState().process_index}.pt")
    PartialState().destroy_process_group()  # left open, it sometimes aborts the process at its end
