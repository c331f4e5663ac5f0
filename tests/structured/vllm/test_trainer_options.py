"""Options and trainers with which a server cannot sample from the policy are refused."""

from dataclasses import dataclass

import pytest

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer

from hf_ebft.structured.vllm.rollouts import VLLMRollouts
from hf_ebft.structured.vllm.settings import VLLMServerArguments, VLLMServerSettings
from hf_ebft.structured.vllm.trainer_options import tokenize_prompts
from tests.support.fake_vllm import small_policy, small_tokenizer
from tests.support.vllm_training import PROMPTS, make_trainer

# TRL says that rollout_func is experimental; the tests below would notice a change.
pytestmark = pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning")


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
