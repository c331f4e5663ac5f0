"""Averaged weights and whitening by corpus on two processes, by DDP and by FSDP2."""

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.distributed_runs import (
    assert_same_weights,
    averaged,
    small_llama,
    whitened_by_corpus,
)
from tests.support.launching import STRIDED_WORKER, results


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The same runs in this process: batches twice as large instead of two processes."""
    folder, batch = tmp_path_factory.mktemp("one"), {"per_device_train_batch_size": 4}
    return {
        "plain": averaged(folder / "plain", **batch),
        "adapters": averaged(folder / "adapters", peft=True, **batch),
        "corpus": whitened_by_corpus(folder / "corpus", **batch),
    }


def last(history, name):
    return [entry[name] for entry in history if name in entry][-1]


def launched(tmp_path, sharded):
    config = "fsdp2.yaml" if sharded else "ddp_cpu.yaml"
    return results(STRIDED_WORKER, "averaging", tmp_path, config)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_average_like_one(tmp_path, one_process, sharded):
    for rank in launched(tmp_path, sharded):
        for run in ("plain", "adapters"):
            ours, reference = rank[run]["whole"], one_process[run]["whole"]
            assert ours["sharded"] == sharded
            assert_same_weights(ours["weights"], reference["weights"], 2e-5)
            assert_same_weights(ours["averages"], reference["averages"], 2e-5)
            # Saving, evaluating and resuming put every weight and average back where it was.
            tolerance = 1e-7 if sharded else 0.0
            assert_same_weights(rank[run]["resumed"]["weights"], ours["weights"], tolerance)
            assert_same_weights(rank[run]["resumed"]["averages"], ours["averages"], tolerance)
            loss, expected = (last(each["history"], "eval_ema_loss") for each in (ours, reference))
            assert loss == pytest.approx(expected, rel=1e-4)
        corpus, expected = rank["corpus"], one_process["corpus"]
        # Adam makes steps of 1e-2 out of gradients that are all but rounding.
        assert_same_weights(corpus["weights"], expected["weights"], 1e-4)
        assert last(corpus["history"], "ebft/diversity") == pytest.approx(
            last(expected["history"], "ebft/diversity"), abs=1e-4
        )
    reference = one_process["plain"]["whole"]["averages"]
    state = load_file(tmp_path / "plain" / "checkpoint-4" / "ema" / "state.safetensors")
    assert state.keys() == {name for name, _ in small_llama().named_parameters()}
    assert_same_weights(state, reference, 2e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "plain" / "ema" / "model")
    assert_same_weights(dict(saved.named_parameters()), reference, 2e-5)
