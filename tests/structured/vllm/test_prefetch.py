"""The next batch is sampled while this one trains, and is the right one."""

import logging

import pytest

pytest.importorskip("trl")


from hf_ebft.structured.vllm.prefetch import Following, LookAhead
from tests.support.fake_vllm import small_tokenizer
from tests.support.tiny import logged
from tests.support.vllm_training import PROMPTS, CorrectingTrainer, completions_asked

# TRL says that rollout_func is experimental; the tests below would notice a change.
pytestmark = pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning")


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


def test_looking_ahead_changes_nothing():
    ahead = LookAhead(iter(range(4)))
    assert ahead.peek(2) == 2
    assert next(ahead) == 0
    assert ahead.peek(0) == 1 and ahead.peek(2) == 3 and ahead.peek(3) is None
    assert list(ahead) == [1, 2, 3]
