"""The server gets the policy's weights when they are due, and a wrong server is noticed."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from transformers import TrainerCallback
from trl import GRPOTrainer

from hf_ebft.structured.vllm.errors import RequestRefused, VLLMServerError
from tests.support import fake_vllm
from tests.support.fake_vllm import small_policy, small_tokenizer
from tests.support.plain_forwards import plain_log_probs
from tests.support.tiny import logged
from tests.support.vllm_training import PROMPTS, completions_asked, full, lora, refused

# TRL says that rollout_func is experimental; the tests below would notice a change.
pytestmark = pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning")


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
    with pytest.raises(VLLMServerError, match=r"other weights than (those sent to it|the pol)"):
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
