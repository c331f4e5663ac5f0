"""A server that goes away costs no completion, or ends the run."""

import threading

import pytest
import torch

pytest.importorskip("trl")

from transformers import TrainerCallback

from hf_ebft.structured.vllm.errors import BadAnswer, VLLMServerError
from hf_ebft.structured.vllm.transport import Transport
from tests.support import fake_vllm
from tests.support.fake_vllm import FakeVLLM
from tests.support.plain_forwards import plain_log_probs
from tests.support.tiny import logged
from tests.support.vllm_training import PROMPTS, full

# TRL says that rollout_func is experimental; the tests below would notice a change.
pytestmark = pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning")


def restart_before(fake, step):
    """A callback that restarts the server before a step."""

    class Restart(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                fake.restart()

    return Restart()


def test_an_adapter_lost_in_a_restart_is_loaded_again(fake, start):
    trainer = start({"vllm_sync_interval": 4}, max_steps=4)
    trainer.add_callback(restart_before(fake, 2))
    trainer.train()
    assert logged(trainer, "vllm/restarts") == [1]
    # What came after the restart is from the policy of then.
    assert len([path for path, _ in fake.requests if path == "/v1/load_lora_adapter"]) == 2
    assert trainer.state.global_step == 4


def test_full_weights_lost_in_a_restart_are_sent_again(fake, start):
    trainer = start(
        settings={"vllm_full_sync": True, "vllm_sync_interval": 4}, peft=None, max_steps=4
    )
    trainer.add_callback(restart_before(fake, 2))
    trainer.train()
    assert logged(trainer, "vllm/restarts") == [1]
    assert len([path for path, _ in fake.requests if path == "/collective_rpc"]) == 2


@pytest.mark.parametrize("how", [{"settings": {}}, full()], ids=["adapter", "full weights"])
def test_a_restart_in_the_midst_of_a_batch_loses_no_completion(fake, start, how):
    def restarts(handler):
        fake.restart()
        return False

    trainer = start(**how)
    trainer.rollout_func([PROMPTS[0]], trainer)
    fake.fail("/v1/completions", restarts)
    prompts = [text for text in PROMPTS for _ in range(2)]
    found = trainer.rollout_func(prompts, trainer)
    for prompt, tokens, theirs in zip(*found.values(), strict=True):
        ours = plain_log_probs(trainer.model, prompt, tokens, 0.7)
        torch.testing.assert_close(torch.tensor(theirs).double(), ours, atol=1e-5, rtol=0)


def test_a_server_that_is_down_for_a_while_is_waited_for(fake, start):
    trainer = start()
    first = trainer.rollout_func([PROMPTS[0]], trainer)
    fake.requests.clear()
    for path, times in (("/v1/completions", 6), ("/health", 3)):
        fake.fail(path, fake_vllm.no_answer, times=times)
    found = trainer.rollout_func([PROMPTS[0], PROMPTS[1]], trainer)
    assert found["prompt_ids"][0] == first["prompt_ids"][0]
    for prompt, tokens, theirs in zip(*found.values(), strict=True):
        ours = plain_log_probs(trainer.model, prompt, tokens, 0.7)
        torch.testing.assert_close(torch.tensor(theirs).double(), ours, atol=1e-5, rtol=0)
    assert [path for path, _ in fake.requests].count("/health") == 4
    assert trainer.rollout_func.metrics()["vllm/restarts"] == 1


def test_a_batch_waits_once_for_a_server_that_is_down(fake, start, monkeypatch):
    """Each of its requests was tried six times, over half a minute, before anything was noticed."""
    trainer = start()
    trainer.rollout_func([PROMPTS[0]], trainer)
    fake.close()
    again = []
    timer = threading.Timer(0.3, lambda: again.append(FakeVLLM(port=fake.http.server_address[1])))
    sent = []
    real = Transport.send

    def counting(self, method, path, *args, **settings):
        sent.append((path, bool(again)))
        return real(self, method, path, *args, **settings)

    monkeypatch.setattr(Transport, "send", counting)
    trainer.rollout_func.client._wait = 0.02
    timer.start()
    found = trainer.rollout_func(PROMPTS, trainer)
    again[0].close()
    assert len(found["completion_ids"]) == len(PROMPTS) and all(found["completion_ids"])
    asked = [up for path, up in sent if path == "/v1/completions"]
    # Each request once while it was down; then the probe, and each once more.
    assert asked == [False] * len(PROMPTS) + [True] * (1 + len(PROMPTS))
    assert 1 < sent.count(("/health", False)) < 20


@pytest.mark.parametrize(
    "fault",
    [fake_vllm.body('{"choices": [{"ind'), fake_vllm.body("<html>gateway</html>"), "abort"],
    ids=["half a JSON", "no JSON", "broken off"],
)
def test_a_completion_of_a_server_that_is_going_down_is_asked_for_again(fake, start, fault):
    trainer = start()
    trainer.rollout_func([PROMPTS[0]], trainer)

    def aborts_once(answer):
        fake.edit = lambda answer: answer
        return {"choices": [answer["choices"][0] | {"finish_reason": "abort"}]}

    if fault == "abort":
        fake.edit = aborts_once
    else:
        fake.fail("/v1/completions", fault)
    found = trainer.rollout_func([PROMPTS[1]], trainer)
    ours = plain_log_probs(trainer.model, found["prompt_ids"][0], found["completion_ids"][0], 0.7)
    torch.testing.assert_close(torch.tensor(found["logprobs"][0]).double(), ours, atol=1e-5, rtol=0)
    assert trainer.rollout_func.metrics()["vllm/restarts"] == 1


def test_a_server_that_dies_while_it_gets_weights(fake, start):
    trainer = start()
    fake.fail("/v1/load_lora_adapter", fake_vllm.no_answer, times=3)
    found = trainer.rollout_func([PROMPTS[0]], trainer)
    ours = plain_log_probs(trainer.model, found["prompt_ids"][0], found["completion_ids"][0], 0.7)
    torch.testing.assert_close(torch.tensor(found["logprobs"][0]).double(), ours, atol=1e-5, rtol=0)
    # Three tries of the first version had no answer; the second was loaded.
    assert len({payload["lora_name"] for path, payload in fake.requests if "load" in path}) == 2


def test_a_server_that_keeps_failing_stops_the_run(fake, start):
    trainer = start()
    trainer.rollout_func([PROMPTS[0]], trainer)
    real = fake.complete
    fake.complete = lambda payload: (
        real(payload) if payload["ignore_eos"] else (500, fake_vllm.error("engine died"))
    )
    with pytest.raises(VLLMServerError, match=r"lost the vLLM server .* 4 times.*engine died"):
        trainer.rollout_func([PROMPTS[0]], trainer)


def test_a_bad_completion_stops_the_run_and_becomes_no_empty_one(fake, start):
    trainer = start()
    trainer.rollout_func([PROMPTS[0]], trainer)
    fake.edit = lambda answer: {"choices": answer["choices"][:-1]}
    with pytest.raises(BadAnswer, match="asked for 2 completions and sent 1"):
        trainer.rollout_func([PROMPTS[0]] * 2, trainer)
