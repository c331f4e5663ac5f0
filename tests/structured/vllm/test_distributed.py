"""Two processes over gloo that sample from one server: DDP and FSDP2, adapters and full weights."""

import pytest

pytest.importorskip("trl")

from tests.support.fake_vllm import serving
from tests.support.launching import VLLM_WORKER, results
from tests.support.vllm_training import PROMPTS

pytestmark = pytest.mark.slow


def launched(scenario, url, folder, config):
    """What both processes of a scenario saw."""
    return results(VLLM_WORKER, scenario, folder, config, url=url)


@pytest.mark.parametrize(
    ("scenario", "config", "path", "class_name"),
    [
        ("adapters", "ddp_cpu.yaml", "/v1/load_lora_adapter", "PeftModelForCausalLM"),
        ("adapters", "fsdp2_lora.yaml", "/v1/load_lora_adapter", "FSDPPeftModelForCausalLM"),
        ("full_weights", "ddp_cpu.yaml", "/collective_rpc", "LlamaForCausalLM"),
        ("full_weights", "fsdp2.yaml", "/collective_rpc", "FSDPLlamaForCausalLM"),
    ],
)
def test_processes_share_one_server_through_a_restart(tmp_path, scenario, config, path, class_name):
    with serving() as fake:
        ranks = launched(scenario, fake.url, tmp_path, config)
        paths = [path for path, _ in fake.requests]
    for rank in ranks:
        assert rank["model"] == class_name
        assert len(rank["prompts"]) == 16
        # Fresh at the start and, since the server was restarted, at the third step.
        fresh = rank["differences"][:4] + rank["differences"][8:12]
        assert max(fresh) < 1e-4
        assert max(rank["differences"][4:8]) > 1e-3  # stale
    # Each process its own prompts, together those of the run.
    seen = [set(rank["prompts"][:4]) for rank in ranks]
    assert seen[0].isdisjoint(seen[1])
    assert seen[0] | seen[1] <= set(PROMPTS)
    assert ranks[0]["restarts"] == [1]
    # One process sends weights: at the start and after the restart.
    assert paths.count(path) == 2


def test_an_error_on_one_process_stops_all(tmp_path):
    with serving() as fake:
        ranks = launched("one_fails", fake.url, tmp_path, "ddp_cpu.yaml")
    assert "another process failed: BadAnswer: no token ids" in ranks[0]["error"]
    assert ranks[1]["error"] == "BadAnswer: no token ids"


def test_prefetching_on_two_processes(tmp_path):
    with serving() as fake:
        ranks = launched("prefetched", fake.url, tmp_path, "ddp_cpu.yaml")
        rollouts = [
            payload
            for path, payload in fake.requests
            if path == "/v1/completions" and not payload.get("ignore_eos", True)
        ]
    assert ranks[0]["vllm/staleness"] == [0, 1, 1]
    assert ranks[0]["vllm/prefetch_missed"] == []
    # Three steps of one prompt on each process; seeds differ everywhere.
    assert len(rollouts) == len({payload["seed"] for payload in rollouts}) == 6


def test_one_process_that_loses_the_server_has_all_send_weights_again(tmp_path):
    with serving() as fake:
        ranks = launched("one_loses", fake.url, tmp_path, "ddp_cpu.yaml")
    assert [rank["steps"] for rank in ranks] == [2, 2]
    assert ranks[0]["restarts"] == [1]


def test_a_prompt_too_long_on_one_process_stops_all(tmp_path):
    with serving() as fake:
        ranks = launched("one_gets_a_long_prompt", fake.url, tmp_path, "ddp_cpu.yaml")
    errors = sorted(rank["error"] for rank in ranks)
    assert errors[0].startswith("VLLMServerError: another process failed: ValueError")
    assert "--max-model-len" in errors[1]


def test_a_policy_that_differs_on_one_process_stops_all(tmp_path):
    """Rank 1 was 2.5 nats from the server while rank 0, which alone was checked, saw 9e-7."""
    with serving() as fake:
        ranks = launched("one_has_another_policy", fake.url, tmp_path, "ddp_cpu.yaml")
    assert ranks[0]["error"].startswith("VLLMServerError: another process failed: VLLMServerError")
    assert "log-probs of the vLLM server and of the policy differ" in ranks[1]["error"]
