"""Callbacks that look at the policy, on two processes, by DDP and by FSDP2."""

import json

import pytest

from tests.support.distributed_runs import CharacterTokenizer, assert_same_weights, watched
from tests.support.launching import STRIDED_WORKER, results


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_see_what_one_sees(tmp_path, sharded):
    config = "fsdp2.yaml" if sharded else "ddp_cpu.yaml"
    ranks = results(STRIDED_WORKER, "watching", tmp_path, config)
    one = watched(tmp_path / "one", CharacterTokenizer(), per_device_train_batch_size=4)
    for rank in ranks:
        assert rank["sharded"] == sharded
        assert_same_weights(rank["weights"], one["weights"], 2e-5)
        assert rank["completions"] == one["completions"]
        for ours, expected in zip(rank["groups"], one["groups"], strict=True):
            assert ours["prefix"] == expected["prefix"]
            assert [r["text"] for r in ours["rollouts"]] == [
                r["text"] for r in expected["rollouts"]
            ]
            assert ours["cfm_loss"] == pytest.approx(expected["cfm_loss"], abs=1e-4)
    file = tmp_path / "watched" / "watched_rollouts.jsonl"
    steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert steps == [0, 0, 1, 1, 2, 2]  # one process writes
