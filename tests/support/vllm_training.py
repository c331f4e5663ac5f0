"""Small GRPO runs that sample from a server."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from hf_ebft.structured.vllm.client import VLLMClient
from hf_ebft.structured.vllm.rollouts import VLLMRollouts
from hf_ebft.structured.vllm.settings import VLLMServerSettings
from hf_ebft.structured.vllm.trainer import StalenessCorrection

PROMPTS = [
    "def first(x):",
    "import os",
    "class Second:",
    "return x +",
    "for i in range(",
    "while True:",
]


class CorrectingTrainer(StalenessCorrection, GRPOTrainer):
    """TRL's trainer with the server's log-probs in its ratio."""


def settings_for(url, folder, **settings):
    defaults = {
        "vllm_server_base_url": url,
        "vllm_sync_dir": str(folder / "sync"),
        "vllm_server_timeout": 5.0,
        "vllm_request_retries": 2,
        "vllm_request_timeout": 20.0,
    }
    if "vllm_full_sync" not in settings:
        defaults["vllm_lora_sync"] = True
    return VLLMServerSettings(**(defaults | settings))


def lora(rank=4, **options):
    defaults = {"r": rank, "lora_alpha": 4 * rank, "target_modules": "all-linear"}
    # A random B: an adapter that starts as zero would not show whether it is applied.
    defaults |= {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    return LoraConfig(**(defaults | options))


def parity(completion_ids, **columns):
    """Reward for even token ids: easy to raise, different for most completions."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def make_trainer(
    model,
    tokenizer,
    rollouts,
    folder,
    *,
    kind=CorrectingTrainer,
    config=GRPOConfig,
    peft="lora",
    rows=None,
    **options,
):
    """A trainer of 4 completions a prompt, 2 prompts a step, on the CPU."""
    defaults = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "temperature": 0.7,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "beta": 0.0,
    }
    with torch.random.fork_rng(devices=[]):
        return kind(
            model=model,
            reward_funcs=parity,
            args=config(**(defaults | options)),
            train_dataset=Dataset.from_list(rows or [{"prompt": text} for text in PROMPTS]),
            eval_dataset=Dataset.from_list([{"prompt": text} for text in PROMPTS[:2]]),
            processing_class=tokenizer,
            peft_config=lora() if peft == "lora" else peft,
            rollout_func=rollouts,
        )


def rollouts_for(settings):
    """Rollouts that do not wait between tries."""
    return VLLMRollouts(settings, VLLMClient(settings, wait=0.0))


def full(**options):
    """Options of a trainer that sends all weights."""
    return {"settings": {"vllm_full_sync": True}, "peft": None} | options


def completions_asked(fake):
    """Payloads of the requests for rollouts; those of the handshake are left out."""
    asked = [payload for path, payload in fake.requests if path == "/v1/completions"]
    return [payload for payload in asked if not payload.get("ignore_eos", True)]


def refused(start, error, message, **options):
    """Make sure that the first rollouts of a trainer end in an error."""
    trainer = start(**options)
    with pytest.raises(error, match=message):
        trainer.rollout_func([PROMPTS[0]], trainer)
