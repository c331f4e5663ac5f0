"""Structured mode in two processes over gloo: groups that the processes share, and gradients."""

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("trl")

from tests.support.distributed_runs import assert_same_weights
from tests.support.launching import STRUCTURED_WORKER, results
from tests.support.structured_runs import cross_entropy_run
from tests.support.tiny_structured import expected_advantages, policy, rows, tokenizer


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results(
        STRUCTURED_WORKER, "advantages", tmp_path_factory.mktemp("structured"), "ddp_cpu.yaml"
    )


def sampled_together(ranks, run, micro_batches):
    """The rows of each generation, from all processes and micro-batches."""
    both = [rank[run]["seen"] for rank in ranks]
    return [
        [row for seen in both for batch in seen[start : start + micro_batches] for row in batch]
        for start in range(0, len(both[0]), micro_batches)
    ]


def assert_exact(rows_seen, n_samples):
    expected = expected_advantages(policy(), rows_seen, rows(12), n_samples=n_samples)
    found = [advantage for _, _, advantage in rows_seen]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    assert np.std(found) > 0.1


@pytest.mark.parametrize(
    ("run", "n_samples", "micro_batches"),
    [
        ("split", 4, 1),  # every group lies half on one process, half on the other
        ("accumulated", 3, 2),
        ("out_of_step", 6, 1),  # one group of three is split
        ("adapters", 4, 1),
        ("evaluated", 4, 1),
    ],
)
def test_advantages_are_the_papers_whatever_process_holds_a_group(
    ranks, run, n_samples, micro_batches
):
    generations = sampled_together(ranks, run, micro_batches)
    for seen in generations:
        assert_exact(seen, n_samples)
    if run == "split":
        first, second = (
            {prompt for batch in rank["split"]["seen"] for prompt, _, _ in batch} for rank in ranks
        )
        assert first == second
    if run == "accumulated":  # two passes over each generation
        assert sorted(generations[0]) == sorted(generations[1])


def test_processes_sample_different_completions(ranks):
    first, second = (
        {completion for batch in rank["split"]["seen"] for _, completion, _ in batch}
        for rank in ranks
    )
    assert not first & second


@pytest.mark.parametrize("run", ["split", "accumulated", "adapters", "cross_entropy"])
def test_processes_have_the_same_weights_and_logs(ranks, run):
    one, other = (rank[run] for rank in ranks)
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name
    for ours, theirs in zip(one["history"], other["history"], strict=True):
        for key in ours:
            if key.startswith("ebft/") and "seconds" not in key:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


def test_logged_metrics_are_means_over_both_processes(ranks):
    for step, seen in enumerate(sampled_together(ranks, "split", 1)):
        entry = ranks[0]["split"]["history"][step]
        advantages = [advantage for _, _, advantage in seen]
        assert entry["ebft/advantages_std"] == pytest.approx(np.std(advantages), rel=1e-4)


def test_cross_entropy_trains_as_in_one_process(ranks, tmp_path):
    """Groups split over processes and micro-batches, and still every prompt counts once."""
    single = cross_entropy_run(
        tmp_path, per_device_train_batch_size=24, gradient_accumulation_steps=1
    )
    for name, weight in single["weights"].items():
        ours = ranks[0]["cross_entropy"]["weights"][name]
        torch.testing.assert_close(ours, weight, rtol=0, atol=2e-4, msg=name)
    for ours, theirs in zip(ranks[0]["cross_entropy"]["history"], single["history"], strict=True):
        if "ebft/ce_loss" in theirs:
            assert ours["ebft/ce_loss"] == pytest.approx(theirs["ebft/ce_loss"], rel=1e-4)


def test_evaluation_counts_every_prompt(ranks):
    entries = [entry for entry in ranks[0]["evaluated"]["history"] if "eval_ebft/ce_loss" in entry]
    assert len(entries) == 2
    assert np.isfinite([entry["eval_ebft/cfm_loss"] for entry in entries]).all()


def test_processes_agree_on_the_budget(ranks):
    tokens = tokenizer()
    lengths = {
        tuple(tokens(row["prompt"])["input_ids"]): len(tokens(row["ground_truth"])["input_ids"]) + 1
        for row in rows(12)
    }
    for seen in sampled_together(ranks, "adaptive", 1):
        longest = max(lengths[prompt] for prompt, _, _ in seen)
        assert max(len(completion) for _, completion, _ in seen) == -(-longest // 4)


@pytest.mark.slow
def test_feature_network_sharded_by_fsdp2(tmp_path):
    """Processes need the same number of forward passes, whatever lengths they have."""
    ranks = results(STRUCTURED_WORKER, "sharded", tmp_path, "fsdp2.yaml")
    for run in ("replicated", "sharded"):
        for seen in sampled_together(ranks, run, 1):
            assert_exact(seen, 4)
    assert_evaluation_left_no_trace(ranks)


def test_evaluation_before_training_leaves_no_trace(ranks):
    """As `run_ebft.py` evaluates first, every launched run had processes that drifted apart."""
    assert_evaluation_left_no_trace(ranks)


def assert_evaluation_left_no_trace(ranks):
    """Weights after `evaluate()` and `train()` are those after `train()` alone, everywhere."""
    first, second = (rank["evaluated_first"] for rank in ranks)
    assert_same_weights(first["measured"]["weights"], second["measured"]["weights"], 0.0)
    assert_same_weights(first["measured"]["weights"], first["plain"]["weights"], 0.0)
    assert np.isfinite(first["measured"]["before"]["eval_loss"])
