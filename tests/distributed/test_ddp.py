"""DDP over gloo, two processes."""

import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.distributed_runs import (
    assert_evaluation_left_no_trace,
    assert_same_metrics,
    assert_same_weights,
)
from tests.support.launching import STRIDED_WORKER, launch, results

CONFIG = "ddp_cpu.yaml"


@pytest.fixture(scope="module")
def basics(tmp_path_factory):
    return results(STRIDED_WORKER, "basics", tmp_path_factory.mktemp("ddp"), CONFIG)


@pytest.mark.parametrize(
    "run", ["plain", "adapters", "parts", "chunks", "chunks_of_adapters", "scheduled", "fitted"]
)
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


def test_evaluation_before_training_leaves_no_trace(basics):
    assert_evaluation_left_no_trace(basics, sharded=False)


def test_exception_on_one_process_ends_the_run_with_its_message(tmp_path):
    start = time.monotonic()
    finished = launch(STRIDED_WORKER, "crash", tmp_path, CONFIG, timeout=120)
    assert finished.returncode != 0
    assert "planted failure on process 1" in finished.stderr
    assert time.monotonic() - start < 90  # start-up of the processes included


@pytest.mark.slow
def test_resume_repeats_the_uninterrupted_run(tmp_path):
    ranks = results(STRIDED_WORKER, "resume", tmp_path, CONFIG)
    for rank in ranks:
        for run in ("plain", "adapters", "fitted"):
            whole, resumed = rank[run]["whole"], rank[run]["resumed"]
            assert_same_weights(whole["weights"], resumed["weights"], 0.0)
            for expected, sampled in zip(whole["sampled"][2:], resumed["sampled"], strict=True):
                assert torch.equal(expected, sampled)
    AutoModelForCausalLM.from_pretrained(tmp_path / "final")
