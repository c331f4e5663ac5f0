"""FSDP2 over gloo, two processes, parameters really sharded."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.support.distributed_runs import (
    assert_evaluation_left_no_trace,
    assert_same_metrics,
    assert_same_weights,
    small_llama,
)
from tests.support.launching import STRIDED_WORKER, results

CONFIG = "fsdp2.yaml"


@pytest.fixture(scope="module")
def basics(tmp_path_factory):
    return results(STRIDED_WORKER, "basics", tmp_path_factory.mktemp("fsdp"), CONFIG)


@pytest.mark.parametrize(
    "run", ["plain", "adapters", "parts", "chunks", "chunks_of_adapters", "scheduled"]
)
def test_sharded_run_equals_one_process(basics, single, run):
    assert basics[0][run]["sharded"] and basics[1][run]["sharded"]
    assert_same_weights(basics[0][run]["weights"], basics[1][run]["weights"], 0.0)
    assert_same_weights(basics[0][run]["weights"], single[run]["weights"], 2e-5)
    assert_same_metrics(basics[0][run]["history"], single[run]["history"])


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2.yaml", "ddp.yaml"])
def test_compiled_layers_train_the_same(tmp_path, config):
    for rank in results(STRIDED_WORKER, "compiled", tmp_path, config):
        assert rank["graphs"] > 0
        assert rank["compiled"]["sharded"] == (config == CONFIG)
        assert_same_weights(rank["compiled"]["weights"], rank["plain"]["weights"], 2e-5)
        adapters = rank["compiled_adapters"]["weights"], rank["adapters"]["weights"]
        assert_same_weights(*adapters, 2e-5)


def test_batches_without_blocks_and_uneven_ends_do_not_hang(basics):
    for rank in basics:
        losses = [entry for entry in rank["no_blocks"]["history"] if "loss" in entry]
        assert losses[0]["ebft/documents_without_blocks"] == 1.0
        assert any("eval_ebft/cfm_loss" in entry for entry in rank["uneven"]["history"])


def test_evaluation_before_training_leaves_no_trace(basics):
    assert_evaluation_left_no_trace(basics, sharded=True)


@pytest.mark.slow
def test_gathering_and_placements_change_nothing_but_memory(tmp_path, tmp_path_factory):
    small_llama().save_pretrained(tmp_path / "saved")
    rank = results(STRIDED_WORKER, "sharding", tmp_path, CONFIG)[0]
    assert_same_weights(rank["gathered"]["weights"], rank["not_gathered"]["weights"], 0.0)
    assert_same_weights(rank["gathered"]["weights"], rank["feature_sharded"]["weights"], 2e-6)
    assert_same_weights(rank["copied"]["weights"], rank["shared"]["weights"], 2e-6)
    exact = [entry["loss"] for entry in rank["gathered"]["history"] if "loss" in entry]
    # Only the main process loaded real weights; policy and feature network came from it.
    assert_same_weights(rank["ram_efficient"]["weights"], rank["gathered"]["weights"], 1e-7)
    mixed = [entry["loss"] for entry in rank["mixed"]["history"] if "loss" in entry]
    assert mixed == pytest.approx(exact, rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("state_dict", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_resume_repeats_the_uninterrupted_run(tmp_path, state_dict):
    overrides = {"fsdp_state_dict_type": state_dict}
    for rank in results(STRIDED_WORKER, "resume", tmp_path, CONFIG, overrides=overrides):
        for run in ("plain", "adapters"):
            whole, resumed = rank[run]["whole"], rank[run]["resumed"]
            assert_same_weights(whole["weights"], resumed["weights"], 1e-7)
            for expected, sampled in zip(whole["sampled"][2:], resumed["sampled"], strict=True):
                assert torch.equal(expected, sampled)
    if state_dict == "FULL_STATE_DICT":
        AutoModelForCausalLM.from_pretrained(tmp_path / "final")
        with safe_open(tmp_path / "final" / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert not any("feature" in name for name in names)
        assert json.loads((tmp_path / "final" / "config.json").read_text())["vocab_size"] == 61
