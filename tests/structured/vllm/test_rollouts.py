"""Rollouts from a server in TRL's trainer: right completions, weights, ratios, and recovery."""

import logging
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from hf_ebft.structured.vllm.batch import find_runs
from hf_ebft.structured.vllm.errors import BadAnswer, RequestRefused, VLLMServerError
from hf_ebft.structured.vllm.rollouts import VLLMRollouts
from hf_ebft.structured.vllm.settings import VLLMServerArguments, VLLMServerSettings
from hf_ebft.structured.vllm.trainer_options import tokenize_prompts
from hf_ebft.structured.vllm.transport import Transport
from tests.support import fake_vllm
from tests.support.fake_vllm import FakeVLLM, serving, small_policy, small_tokenizer
from tests.support.plain_forwards import plain_log_probs
from tests.support.tiny import logged
from tests.support.vllm_training import (
    PROMPTS,
    CorrectingTrainer,
    lora,
    make_trainer,
    rollouts_for,
    settings_for,
)

# TRL says that rollout_func is experimental; the tests below would notice a change.
pytestmark = pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning")


@pytest.fixture
def fake():
    with serving() as server:
        yield server


@pytest.fixture
def start(fake, tmp_path):
    """Builds trainers for the server of the test, and closes their rollouts."""
    made = []

    def build(settings=None, **options):
        settings = settings or {}
        options.setdefault("model", small_policy())
        rollouts = rollouts_for(settings_for(fake.url, tmp_path, **settings))
        made.append(rollouts)
        tokenizer = options.pop("tokenizer", None) or small_tokenizer()
        return make_trainer(options.pop("model"), tokenizer, rollouts, tmp_path, **options)

    yield build
    for rollouts in made:
        rollouts.close()


def full(**options):
    return {"settings": {"vllm_full_sync": True}, "peft": None} | options


def completions_asked(fake, tokens=None):
    """Payloads of the requests for rollouts; those of the handshake are left out."""
    asked = [payload for path, payload in fake.requests if path == "/v1/completions"]
    return [payload for payload in asked if not payload.get("ignore_eos", True)]


# ---- Right completions ---------------------------------------------------------------------------


def test_rollouts_are_in_order_and_their_log_probs_are_the_policys(fake, start):
    trainer = start()
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[2], PROMPTS[2]]
    found = trainer.rollout_func(prompts, trainer)
    tokenizer = small_tokenizer()
    assert found["prompt_ids"] == [tokenizer(prompt)["input_ids"] for prompt in prompts]
    # Neighbours with one prompt are one request.
    assert sorted(payload["n"] for payload in completions_asked(fake)) == [1, 2, 3]
    assert len({tuple(ids) for ids in found["completion_ids"]}) == len(prompts)
    for prompt, tokens, theirs in zip(*found.values(), strict=True):
        ours = plain_log_probs(trainer.model, prompt, tokens, 0.7)
        torch.testing.assert_close(torch.tensor(theirs).double(), ours, atol=1e-5, rtol=0)


def test_an_adapter_of_the_embedding_is_sampled_from(fake, start):
    """PEFT's embedding has no number of rows; asking it for one was an AttributeError."""
    trainer = start(peft=lora(target_modules=["embed_tokens", "q_proj"]))
    found = trainer.rollout_func([PROMPTS[0]] * 2, trainer)
    for prompt, tokens, theirs in zip(*found.values(), strict=True):
        ours = plain_log_probs(trainer.model, prompt, tokens, 0.7)
        torch.testing.assert_close(torch.tensor(theirs).double(), ours, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_seeds_differ_between_requests_and_steps_and_repeat_in_a_rerun(fake, start):
    def seeds():
        fake.requests.clear()
        start(max_steps=2).train()
        return sorted(payload["seed"] for payload in completions_asked(fake))

    first = seeds()
    assert len(set(first)) == len(first) == 4
    assert seeds() == first


def test_chats_are_tokenized_by_the_trainers_template(start):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    trainer = start(tokenizer=tokenizer)
    chat = [{"role": "user", "content": "hello"}]
    expected = tokenizer("<user>hello<assistant>")["input_ids"]
    assert tokenize_prompts([chat], trainer) == [expected]


def test_stop_tokens_are_those_of_the_trainer_and_belong_to_the_completion(fake, start):
    trainer = start(max_completion_length=8)
    assert trainer.eos_token_ids == [0]
    trainer.eos_token_ids = list(range(60))  # of 300: often enough to be seen
    found = trainer.rollout_func([PROMPTS[0]] * 12, trainer)
    stop = set(trainer.eos_token_ids)
    assert set(completions_asked(fake)[0]["stop_token_ids"]) == stop
    ended = [ids for ids in found["completion_ids"] if len(ids) < 8]
    assert ended and all(ids[-1] in stop for ids in ended)
    assert not any(set(ids[:-1]) & stop for ids in found["completion_ids"])


def test_runs_of_equal_neighbours():
    assert find_runs([[1], [1], [2], [1]]) == [(0, 2), (2, 1), (3, 1)]
    assert find_runs([]) == []


# ---- Weights -------------------------------------------------------------------------------------


def test_a_plain_grpo_trainer_trains_on_fresh_weights(fake, start):
    trainer = start(kind=GRPOTrainer)
    trainer.train()
    loaded = [payload for path, payload in fake.requests if path == "/v1/load_lora_adapter"]
    assert len(loaded) == 3  # one for each of the three steps
    assert len({payload["lora_name"] for payload in loaded}) == 3
    assert len({payload["lora_path"] for payload in loaded}) == 3
    asked = [payload["model"] for payload in completions_asked(fake)]
    names = [payload["lora_name"] for payload in loaded]
    assert asked == [names[0]] * 2 + [names[1]] * 2 + [names[2]] * 2


def test_what_the_server_samples_follows_the_policy(fake, start, tmp_path):
    trainer = start(max_steps=2)
    before = fake.original(torch.tensor([[3, 4, 5]])).logits
    trainer.train()
    outputs = []
    for name in list(fake.adapters)[-1:]:
        outputs.append(fake.adapters[name](torch.tensor([[3, 4, 5]])).logits)
    assert (outputs[0] - before).abs().max() > 1e-2
    differences = logged(trainer, "vllm/handshake_difference")
    assert len(differences) == 2 and max(differences) < 1e-5


def test_the_server_and_the_disk_keep_two_versions_and_nothing_in_the_end(fake, start, tmp_path):
    trainer = start(max_steps=3)
    trainer.train()
    assert len(fake.adapters) == 2
    folders = [path.name for path in (tmp_path / "sync").glob("*/*")]
    assert sorted(folders) == sorted(fake.adapters)
    trainer.rollout_func.close()
    assert fake.adapters == {}
    assert list((tmp_path / "sync").iterdir()) == []


def test_weights_are_sent_every_so_many_steps(fake, start):
    trainer = start({"vllm_sync_interval": 2}, max_steps=5)
    trainer.train()
    assert len([path for path, _ in fake.requests if path == "/v1/load_lora_adapter"]) == 3
    assert logged(trainer, "vllm/staleness") == [0, 1, 0, 1, 0]


def test_a_policy_that_changed_without_a_step_is_sent_again(fake, start):
    """By load_best_model_at_end, say, or by hand; the count of steps does not show it."""
    trainer = start()
    for scale in (1.0, 1.0, 3.0):
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(scale if parameter.requires_grad else 1.0)
        found = trainer.rollout_func([PROMPTS[0]], trainer)
        prompt, tokens = found["prompt_ids"][0], found["completion_ids"][0]
        ours = plain_log_probs(trainer.model, prompt, tokens, 0.7)
        theirs = torch.tensor(found["logprobs"][0]).double()
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert [path for path, _ in fake.requests].count("/v1/load_lora_adapter") == 2


def test_a_second_training_begins_with_the_policy_as_it_is(fake, start):
    """Its steps count from 0 again, as those of the weights that the server has."""
    trainer = start({"vllm_sync_interval": 4}, max_steps=2)
    trainer.train()
    trainer.train()
    assert [path for path, _ in fake.requests].count("/v1/load_lora_adapter") == 2
    assert max(logged(trainer, "vllm/rollout_difference")) < 1e-5


@pytest.mark.slow
def test_the_server_may_know_the_folder_by_another_path(fake, start, tmp_path):
    mounted = tmp_path / "mounted"
    (tmp_path / "sync").mkdir()
    mounted.symlink_to(tmp_path / "sync")
    trainer = start({"vllm_sync_dir_on_server": str(mounted)}, max_steps=1)
    trainer.train()
    loaded = [payload for path, payload in fake.requests if path == "/v1/load_lora_adapter"]
    assert all(Path(payload["lora_path"]).parent.parent == mounted for payload in loaded)


def test_full_weights_are_reloaded(fake, start, tmp_path):
    trainer = start(**full(max_steps=3))
    trainer.train()
    reloads = [path for path, _ in fake.requests if path == "/collective_rpc"]
    assert len(reloads) == 3
    assert max(logged(trainer, "vllm/handshake_difference")) < 1e-5
    assert {payload["model"] for payload in completions_asked(fake)} == {"base"}
    assert len(list((tmp_path / "sync").glob("*/*"))) == 1


@pytest.mark.slow
def test_evaluation_samples_from_the_policy_as_it_is_with_the_same_seeds(fake, start):
    trainer = start({"vllm_sync_interval": 3}, max_steps=2)
    trainer.train()
    fake.requests.clear()
    trainer.evaluate()
    assert [path for path, _ in fake.requests].count("/v1/load_lora_adapter") == 1
    first = sorted(payload["seed"] for payload in completions_asked(fake))
    fake.requests.clear()
    trainer.evaluate()
    assert [path for path, _ in fake.requests].count("/v1/load_lora_adapter") == 0
    assert sorted(payload["seed"] for payload in completions_asked(fake)) == first


def test_a_deleted_folder_stops_no_run(fake, start, tmp_path):
    """Folders of earlier versions may be cleaned away while a run goes on."""
    trainer = start()
    trainer.rollout_func([PROMPTS[0]], trainer)
    for step in range(1, 5):
        shutil.rmtree(tmp_path / "sync")
        trainer.state.global_step = step
        trainer.rollout_func([PROMPTS[0]], trainer)
    assert len(fake.adapters) == 2
    trainer.rollout_func.close()
    assert fake.adapters == {}


def test_a_load_without_an_answer_leaves_no_adapter_behind(fake, start):
    """The server loads it, but the trainer has given up waiting."""

    def loads_without_an_answer(handler):
        payload = fake.requests[-1][1]
        fake.load(payload["lora_name"], Path(payload["lora_path"]))
        raise fake_vllm.Dropped

    trainer = start({"vllm_request_retries": 0})
    fake.fail("/v1/load_lora_adapter", loads_without_an_answer, times=2)
    trainer.rollout_func([PROMPTS[0]], trainer)
    loaded = [payload for path, payload in fake.requests if path == "/v1/load_lora_adapter"]
    assert len({payload["lora_name"] for payload in loaded}) == 3
    assert len(fake.adapters) == 2
    trainer.rollout_func.close()
    assert fake.adapters == {}


# ---- The importance ratio ------------------------------------------------------------------------


class Recording:
    """Keeps what a trainer's loss was computed from, and the policy's log-probs at that time."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        rows = []
        for row in range(len(inputs["completion_ids"])):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
            tokens = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist()
            ours = plain_log_probs(self.model, prompt, tokens, self.temperature).detach()
            rows.append((tuple(prompt), tuple(tokens), ours, inputs["advantages"][row].item()))
        self.recorded.append((loss.item(), rows))
        return loss


class RecordingCorrected(Recording, CorrectingTrainer):
    pass


class RecordingPlain(Recording, GRPOTrainer):
    pass


def oracle_loss(rows, theirs, epsilon):
    """GRPO's loss by plain loops: mean over completions of the mean over tokens."""
    total = 0.0
    for prompt, tokens, ours, advantage in rows:
        terms = []
        for log_p, log_q in zip(ours.tolist(), theirs[prompt, tokens], strict=True):
            ratio = torch.tensor(log_p - log_q).double().exp().item()
            clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
            terms.append(-min(ratio * advantage, clipped * advantage))
        total += sum(terms) / len(terms)
    return total / len(rows)


def recorded_run(start, kind, settings, epsilon, **options):
    """Losses of a run, with those by the oracle from the server's log-probs."""
    options |= {"loss_type": "grpo", "epsilon": epsilon, "max_steps": 3}
    trainer = start(settings, kind=kind, **options)
    trainer.recorded = []
    theirs = {}
    rollouts = trainer.rollout_func

    def listening(prompts, current):
        found = rollouts(prompts, current)
        for prompt, tokens, log_probs in zip(*found.values(), strict=True):
            theirs[tuple(prompt), tuple(tokens)] = log_probs
        return found

    trainer.rollout_func = listening
    trainer.train()
    return [(loss, oracle_loss(rows, theirs, epsilon)) for loss, rows in trainer.recorded]


@pytest.mark.parametrize(
    "epsilon",
    [100.0, pytest.param(0.05, marks=pytest.mark.slow)],
    ids=["unclipped", "clipped"],
)
def test_the_ratio_of_stale_rollouts_is_to_the_servers_log_probs(start, epsilon):
    run = recorded_run(start, RecordingCorrected, {"vllm_sync_interval": 3}, epsilon)
    for loss, expected in run:
        assert loss == pytest.approx(expected, abs=2e-6)
    assert abs(run[-1][1]) > 1e-3  # stale: the ratios are not all 1


def test_the_ratio_of_prefetched_rollouts_is_to_the_servers_log_probs(start):
    trainer = start({"async_prefetch": True}, kind=RecordingCorrected, loss_type="grpo", epsilon=9)
    trainer.recorded = []
    theirs = {}
    complete = trainer.rollout_func.client.complete

    def listening(model, prompt, count, sampling):
        found = complete(model, prompt, count, sampling)
        for completion in found:
            theirs[tuple(prompt), tuple(completion.token_ids)] = completion.log_probs
        return found

    trainer.rollout_func.client.complete = listening
    trainer.train()
    assert logged(trainer, "vllm/staleness") == [0, 1, 1]
    for loss, rows in trainer.recorded:
        assert loss == pytest.approx(oracle_loss(rows, theirs, 9), abs=2e-6)


def test_trl_alone_would_not_use_them(start, monkeypatch):
    """Why `StalenessCorrection` exists; if this fails, TRL has learned it and it can go."""
    monkeypatch.setattr("hf_ebft.structured.vllm.rollouts.check_trainer", lambda *args: None)
    run = recorded_run(start, RecordingPlain, {"vllm_sync_interval": 3}, 100.0)
    assert abs(run[-1][0] - run[-1][1]) > 1e-3


@pytest.mark.slow
def test_several_passes_over_stale_rollouts(start):
    options = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    options |= {"per_device_train_batch_size": 4}
    rows = [{"prompt": text} for text in PROMPTS + PROMPTS[:2]]
    trainer = start({"async_prefetch": True}, max_steps=6, rows=rows, **options)
    trainer.train()
    # 8 micro-batches, so 4 optimizer steps, to a batch of rollouts.
    assert logged(trainer, "vllm/staleness") == [0, 4]


# ---- Prefetching ---------------------------------------------------------------------------------


def test_the_next_batch_is_asked_for_before_this_one_is_trained_on(fake, start):
    class Watching(CorrectingTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            asked.append(self.rollout_func._prefetched is not None)
            return super().compute_loss(model, inputs, *args, **kwargs)

    asked = []
    start({"async_prefetch": True}, kind=Watching, max_steps=2).train()
    assert asked == [True, False]


def test_prefetching_trains_on_the_same_prompts_in_the_same_order(fake, start):
    def prompts(**settings):
        fake.requests.clear()
        # 6 prompts and 2 a step: the fourth step is the first of another epoch.
        trainer = start(settings, max_steps=5)
        seen = []
        rollouts = trainer.rollout_func
        trainer.rollout_func = rollouts
        original = type(rollouts).__call__

        def listening(self, batch, current):
            seen.append(batch)
            return original(self, batch, current)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(rollouts), "__call__", listening)
            trainer.train()
        return seen, trainer

    straight, _ = prompts()
    ahead, trainer = prompts(async_prefetch=True)
    assert ahead == straight
    assert logged(trainer, "vllm/staleness") == [0, 1, 1, 0, 1]
    assert logged(trainer, "vllm/prefetch_missed") == []
    # Nothing was sampled in vain: two requests a step.
    assert len(completions_asked(fake)) == 10


def test_a_batch_that_is_not_the_one_sampled_ahead_is_sampled_again(fake, start, caplog):
    trainer = start({"async_prefetch": True}, max_steps=1)
    trainer.train()
    rollouts = trainer.rollout_func
    from hf_ebft.structured.vllm.prefetch import Following

    rollouts.following.append(Following([PROMPTS[0]] * 4, 6))
    trainer.model.train()
    rollouts([PROMPTS[1]] * 4, trainer)
    with caplog.at_level(logging.WARNING):
        found = rollouts([PROMPTS[2]] * 4, trainer)
    assert found["prompt_ids"][0] == small_tokenizer()(PROMPTS[2])["input_ids"]
    assert "not the one that is trained on" in caplog.text


@pytest.mark.slow
def test_evaluation_in_the_midst_of_prefetching(fake, start):
    trainer = start({"async_prefetch": True}, max_steps=3, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert logged(trainer, "vllm/staleness") == [0, 1, 1]
    assert logged(trainer, "vllm/prefetch_missed") == []


# ---- A server that goes away ---------------------------------------------------------------------


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


# ---- The wrong server ----------------------------------------------------------------------------


def refused(start, error, message, **options):
    trainer = start(**options)
    with pytest.raises(error, match=message):
        trainer.rollout_func([PROMPTS[0]], trainer)


def test_another_model_is_refused_at_the_start(start):
    refused(start, VLLMServerError, "handshake at the start.*other weights", model=small_policy(1))


def test_a_server_with_a_larger_vocabulary_is_refused(fake, start):
    """Its own tokens beyond the policy's ended in an IndexError of the policy's embedding."""
    larger = small_policy()
    larger.resize_token_embeddings(340, mean_resizing=False)
    with torch.no_grad():
        larger.lm_head.weight[300:] = larger.lm_head.weight[:300].abs().max() * 4
    fake.original = larger.eval()
    fake.restart()
    refused(start, VLLMServerError, r"sampled token 3\d\d, .* tokens 0 to 299 only")


def test_a_token_beyond_the_policys_in_a_rollout_is_refused(fake, start):
    trainer = start()
    trainer.rollout_func([PROMPTS[0]], trainer)

    def beyond(answer):
        return {"choices": [choice | {"token_ids": [300]} for choice in answer["choices"]]}

    fake.edit = lambda answer: beyond(answer) if len(answer["choices"]) == 2 else answer
    trainer.args.max_completion_length = trainer.max_completion_length = 1
    with pytest.raises(VLLMServerError, match=r"sampled token 300, .* tokens 0 to 299 only"):
        trainer.rollout_func([PROMPTS[0]] * 2, trainer)


def test_another_tokenizer_is_refused_at_the_start(fake, start):
    other = small_tokenizer()
    other.add_tokens(["return"])
    fake.tokenizer = other
    refused(start, VLLMServerError, "another tokenizer")


def test_an_adapter_that_is_not_applied_is_noticed(fake, start):
    fake.ignore_adapters = True
    refused(start, VLLMServerError, "does not apply the adapter")


@pytest.mark.parametrize("how", [{"settings": {}}, full()], ids=["adapter", "full weights"])
def test_weights_replaced_after_the_handshake_are_noticed(fake, start, how):
    """Two full-weight runs on one server trained 4 to 12 nats away from it, as staleness 0."""
    trainer = start(**how)
    other = small_policy(seed=1).eval()
    served = fake.complete

    def another_run_reloads(payload):
        # After the handshake, and only when the last of three requests comes.
        if not payload["ignore_eos"] and payload["prompt"] == last:
            fake.base = other
            fake.adapters = dict.fromkeys(fake.adapters, other)
        return served(payload)

    fake.complete = another_run_reloads
    last = small_tokenizer()(PROMPTS[2])["input_ids"]
    trainer.rollout_func.settings.vllm_max_concurrent_requests = 1
    with pytest.raises(VLLMServerError, match="sampled this batch from other weights"):
        trainer.rollout_func(PROMPTS[:3], trainer)


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ({"settings": {"vllm_sync_interval": 4}}, {}),
        (full(settings={"vllm_full_sync": True, "vllm_sync_interval": 4}), {}),
        ({"settings": {"async_prefetch": True}}, {"max_steps": 4}),
    ],
    ids=["adapter", "full weights", "prefetched"],
)
def test_weights_replaced_under_stale_rollouts_are_noticed(fake, start, how, options):
    """Their policy is gone, so nothing but the server can show it."""
    trainer = start(**how, **options)
    other = small_policy(seed=1).eval()

    class Replace(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                fake.base = other
                fake.adapters = dict.fromkeys(fake.adapters, other)

    trainer.add_callback(Replace())
    with pytest.raises(VLLMServerError, match=r"other weights than (those it was sent|the pol)"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_fresh_rollouts_are_compared_and_stale_ones_are_not(start):
    trainer = start({"vllm_sync_interval": 2}, max_steps=4, learning_rate=3e-2)
    trainer.train()
    assert logged(trainer, "vllm/staleness") == [0, 1, 0, 1]
    differences = logged(trainer, "vllm/rollout_difference")
    assert len(differences) == 2 and max(differences) < 1e-5


def test_an_adapter_without_any_effect_is_noticed_within_a_coarse_tolerance(fake, start):
    """At bfloat16's tolerance the policy trains for many steps before it is 0.1 nats away."""
    fake.ignore_adapters = True
    trainer = start(
        {"vllm_dtype": "bfloat16"},
        peft=lora(init_lora_weights=True),  # starts as zero: the first handshake has to pass
        learning_rate=1e-3,
        max_steps=8,
    )
    with pytest.raises(VLLMServerError, match="the new weights have no effect on the vLLM server"):
        trainer.train()
    # Long before the difference itself would have been too large.
    assert max(logged(trainer, "vllm/handshake_difference")) < 0.05


def test_log_probs_before_the_temperature_are_recognised(fake, start):
    fake.raw_log_probs = True
    refused(start, VLLMServerError, "--logprobs-mode processed_logprobs")


def test_a_tolerance_of_ones_own(fake, start):
    fake.raw_log_probs = True
    trainer = start({"vllm_handshake_tolerance": 1e3})
    found = trainer.rollout_func([PROMPTS[0]], trainer)
    # What was accepted is the server's: log-probs at temperature 1, far from the policy's at 0.7.
    ours = plain_log_probs(trainer.model, found["prompt_ids"][0], found["completion_ids"][0], 1.0)
    torch.testing.assert_close(torch.tensor(found["logprobs"][0]).double(), ours, atol=1e-5, rtol=0)
    assert trainer.rollout_func.metrics()["vllm/handshake_difference"] > 0.05


def test_a_rank_that_the_server_does_not_take_shows_its_words(start):
    refused(
        start,
        RequestRefused,
        "LoRA rank 32 is greater than max_lora_rank 16",
        settings={"vllm_max_lora_rank": 64},
        peft=lora(32),
    )


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_sent(fake, start):
    trainer = start()
    with pytest.raises(ValueError, match="--max-model-len 256"):
        trainer.rollout_func(["def f(x): " * 120], trainer)
    assert completions_asked(fake) == []


def test_full_weights_without_a_start_time_are_refused(fake, start):
    fake.fail("/metrics", fake_vllm.status(404), times=9)
    refused(start, VLLMServerError, "does not say when it started", **full())


def test_tied_embeddings_on_a_cpu_server_are_refused(fake, start):
    tied = small_policy(tie_word_embeddings=True)
    refused(start, VLLMServerError, "keeps the old head", model=tied, **full())


def test_tied_embeddings_elsewhere_are_reloaded(fake, start, caplog):
    fake.original = small_policy(tie_word_embeddings=True).eval()
    fake.restart()
    fake.device = "cuda"
    trainer = start(**full(model=small_policy(tie_word_embeddings=True)))
    assert trainer.rollout_func([PROMPTS[0]], trainer)["completion_ids"][0]
    assert "old head" not in caplog.text


def test_tied_embeddings_on_a_server_that_says_nothing_are_warned_of(fake, start, caplog):
    fake.original = small_policy(tie_word_embeddings=True).eval()
    fake.restart()
    fake.fail("/server_info", fake_vllm.status(404))
    trainer = start(**full(model=small_policy(tie_word_embeddings=True)))
    with caplog.at_level(logging.WARNING):
        trainer.rollout_func([PROMPTS[0]], trainer)
    assert "keep the old head" in caplog.text


# ---- Options that cannot work --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 20}, "top_k=20"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"generation_kwargs": {"seed": 1}}, "generation_kwargs"),
        ({"kind": GRPOTrainer, "settings": {"vllm_sync_interval": 2}}, "vllm_sync_interval=2"),
        ({"kind": GRPOTrainer, "settings": {"async_prefetch": True}}, "async_prefetch=True"),
        ({"peft": None}, "vllm_lora_sync sends an adapter"),
        ({"settings": {"vllm_full_sync": True}}, "vllm_full_sync sends all weights"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_sent(
    fake, start, options, message
):
    with pytest.raises(ValueError, match=message):
        trainer = start(**options)
        trainer.rollout_func([PROMPTS[0]], trainer)
    assert fake.requests == []


def test_rollouts_need_a_kind_of_sync():
    with pytest.raises(ValueError, match="vllm_lora_sync=True"):
        VLLMRollouts(VLLMServerSettings())


def test_turns_of_chats_are_not_prefetched(start):
    trainer = start({"async_prefetch": True})
    with pytest.raises(ValueError, match="several turns"):
        trainer.rollout_func.sample([[3, 4]], 4, trainer)


@dataclass
class ServerConfig(VLLMServerArguments, GRPOConfig):
    """As `EBFTGRPOConfig` has them."""


def test_a_server_that_nobody_asks_is_refused(tmp_path):
    def constant(prompts, trainer):
        ids = tokenize_prompts(prompts, trainer)
        return {
            "prompt_ids": ids,
            "completion_ids": [[5]] * len(ids),
            "logprobs": [[-1.0]] * len(ids),
        }

    trainer = make_trainer(
        small_policy(),
        small_tokenizer(),
        constant,
        tmp_path,
        config=ServerConfig,
        vllm_lora_sync=True,
    )
    with pytest.raises(ValueError, match="does not sample from the server"):
        trainer.train()
