"""Completions from a server in TRL's trainer are those that the policy would sample."""

import pytest
import torch

pytest.importorskip("trl")


from hf_ebft.structured.vllm.batch import find_runs
from hf_ebft.structured.vllm.trainer_options import tokenize_prompts
from tests.support.fake_vllm import small_tokenizer
from tests.support.plain_forwards import plain_log_probs
from tests.support.vllm_training import PROMPTS, completions_asked, lora

# TRL says that rollout_func is experimental; the tests below would notice a change.
pytestmark = pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning")


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
