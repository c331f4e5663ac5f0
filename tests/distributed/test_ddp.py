"""DDP over gloo, two processes."""

import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.launching import launch, results

CONFIG = "ddp_cpu.yaml"


@pytest.fixture(scope="module")
def basics(tmp_path_factory):
    return results("basics", tmp_path_factory.mktemp("ddp"), CONFIG)


def assert_same_weights(left, right, tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=tolerance, atol=tolerance, msg=name
        )


def assert_same_metrics(history, reference_history):
    """Training logs agree in everything but clocks."""
    pairs = zip(training_logs(history), training_logs(reference_history), strict=True)
    for ours, reference in pairs:
        assert ours.keys() == reference.keys()
        for key, value in reference.items():
            assert ours[key] == pytest.approx(value, rel=2e-3, abs=2e-5), key


def training_logs(history):
    """The entries that a training log made, without clocks."""
    return [
        {
            key: value
            for key, value in entry.items()
            if "seconds" not in key and "runtime" not in key
        }
        for entry in history
        if "loss" in entry
    ]


@pytest.mark.parametrize("run", ["plain", "adapters", "parts", "chunks", "chunks_of_adapters"])
def test_processes_agree_and_equal_one_process_with_the_whole_batch(basics, single, run):
    """Guards gradient synchronisation, PEFT included (a loss computed past the wrapped model left
    every process with its own adapter), and the global mean of gradient and metrics."""
    assert_same_weights(basics[0][run]["weights"], basics[1][run]["weights"], 0.0)
    assert_same_weights(basics[0][run]["weights"], single[run]["weights"], 2e-5)
    assert_same_metrics(basics[0][run]["history"], single[run]["history"])


def test_processes_sample_different_rollouts(basics):
    """Guards the seed of the sampler, which must contain the process."""
    first, second = (torch.cat([t.flatten() for t in rank["plain"]["sampled"]]) for rank in basics)
    shared = min(len(first), len(second))
    assert (first[:shared] == second[:shared]).float().mean() < 0.2


def test_batches_without_blocks_and_uneven_ends_do_not_hang(basics):
    for rank in basics:
        losses = [entry for entry in rank["no_blocks"]["history"] if "loss" in entry]
        assert losses[0]["ebft/documents_without_blocks"] == 1.0
        assert any("eval_ebft/cfm_loss" in entry for entry in rank["uneven"]["history"])
    assert_same_weights(basics[0]["uneven"]["weights"], basics[1]["uneven"]["weights"], 0.0)


def assert_evaluation_left_no_trace(ranks, sharded):
    """Weights after `evaluate()`, `predict()` and `train()` are those after `train()` alone.

    Born from an upstream fault: preparing the model for evaluation kept `train()` from wrapping it,
    so each process trained on its own gradients; FSDP2 crashed.
    """
    for run in ("evaluated_first", "evaluated_first_adapters"):
        first, second = (rank[run] for rank in ranks)
        assert_same_weights(first["measured"]["weights"], second["measured"]["weights"], 0.0)
        assert_same_weights(first["measured"]["weights"], first["plain"]["weights"], 0.0)
        assert first["measured"]["sharded"] == sharded
        assert "eval_ebft/cfm_loss" in first["before"]
        assert sharded or first["wrapper"] == "DistributedDataParallel"


def test_evaluation_before_training_leaves_no_trace(basics):
    assert_evaluation_left_no_trace(basics, sharded=False)


def test_exception_on_one_process_ends_the_run_with_its_message(tmp_path):
    start = time.monotonic()
    finished = launch("crash", tmp_path, CONFIG, timeout=120)
    assert finished.returncode != 0
    assert "planted failure on process 1" in finished.stderr
    assert time.monotonic() - start < 90  # start-up of the processes included


@pytest.mark.slow
def test_resume_repeats_the_uninterrupted_run(tmp_path):
    ranks = results("resume", tmp_path, CONFIG)
    for rank in ranks:
        for run in ("plain", "adapters"):
            whole, resumed = rank[run]["whole"], rank[run]["resumed"]
            assert_same_weights(whole["weights"], resumed["weights"], 0.0)
            for expected, sampled in zip(whole["sampled"][2:], resumed["sampled"], strict=True):
                assert torch.equal(expected, sampled)
    AutoModelForCausalLM.from_pretrained(tmp_path / "final")
