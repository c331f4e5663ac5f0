"""One of several processes that train on rollouts of a server; writes what it saw to a file.

worker.py SCENARIO URL FOLDER
"""

import os
import sys
import urllib.request
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

if os.environ.get("HF_EBFT_TEST_FSDP_ON_CPU"):
    from tests.support import fsdp_on_cpu

    fsdp_on_cpu.enable()

from accelerate import PartialState
from transformers import TrainerCallback

from hf_ebft.structured.vllm.errors import BadAnswer, ServerUnavailable
from tests.support.fake_vllm import small_policy, small_tokenizer
from tests.support.plain_forwards import plain_log_probs
from tests.support.tiny import logged
from tests.support.vllm_training import (
    make_trainer,
    rollouts_for,
    settings_for,
)


class RestartServer(TrainerCallback):
    """Restarts the server before the third step."""

    def __init__(self, url):
        self.url = url

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and state.is_world_process_zero:
            urllib.request.urlopen(urllib.request.Request(f"{self.url}/test/restart")).close()
        PartialState().wait_for_everyone()


def trained(url, folder, *, full=False, **options):
    """Three steps of 2 prompts, 4 completions each, half of them on each process."""
    settings = {"vllm_full_sync": True} if full else {}
    rollouts = rollouts_for(settings_for(url, folder, vllm_sync_interval=4, **settings, **options))
    trainer = make_trainer(
        small_policy(),
        small_tokenizer(),
        rollouts,
        folder,
        peft=None if full else "lora",
        per_device_train_batch_size=4,
        max_steps=4,
    )
    trainer.add_callback(RestartServer(url))
    differences, prompts = [], []

    def watching(batch, current):
        found = rollouts(batch, current)
        prompts.extend(batch)
        for prompt, tokens, theirs in zip(*found.values(), strict=True):
            ours = plain_log_probs(current.model, prompt, tokens, current.temperature)
            differences.append((ours - torch.tensor(theirs)).abs().max().item())
        return found

    trainer.rollout_func = watching
    trainer.train()
    rollouts.close()
    return {
        "differences": differences,
        "prompts": prompts,
        "restarts": logged(trainer, "vllm/restarts"),
        "staleness": logged(trainer, "vllm/staleness"),
        "model": type(trainer.model).__name__,
    }


def adapters(url, folder):
    return trained(url, folder)


def full_weights(url, folder):
    return trained(url, folder, full=True)


def prefetched(url, folder):
    """The next batch sampled ahead, on both processes."""
    rollouts = rollouts_for(settings_for(url, folder, async_prefetch=True))
    trainer = make_trainer(
        small_policy(), small_tokenizer(), rollouts, folder, per_device_train_batch_size=4
    )
    trainer.train()
    rollouts.close()
    names = ("vllm/staleness", "vllm/prefetch_missed", "loss")
    return {name: logged(trainer, name) for name in names}


def one_loses(url, folder):
    """One process cannot reach the server for a while; weights are sent by all together."""
    rollouts = rollouts_for(settings_for(url, folder, vllm_full_sync=True))
    trainer = make_trainer(
        small_policy(),
        small_tokenizer(),
        rollouts,
        folder,
        peft=None,
        per_device_train_batch_size=4,
        max_steps=2,
    )
    if PartialState().process_index == 1:
        real = rollouts.client.complete
        failures = [ServerUnavailable("out of reach")]

        def failing(model, prompt, count, sampling):
            if failures and not sampling.ignore_stop:
                raise failures.pop()
            return real(model, prompt, count, sampling)

        rollouts.client.complete = failing
    trainer.train()
    rollouts.close()
    return {"restarts": logged(trainer, "vllm/restarts"), "steps": trainer.state.global_step}


def one_gets_a_long_prompt(url, folder):
    """A prompt that does not fit, on one process."""
    rollouts = rollouts_for(settings_for(url, folder))
    rows = [{"prompt": "short"}, {"prompt": "def f(x): " * 120}]
    trainer = make_trainer(
        small_policy(),
        small_tokenizer(),
        rollouts,
        folder,
        rows=rows,
        per_device_train_batch_size=4,
    )
    return failure_of(trainer.train)


def one_fails(url, folder):
    """A process gets a bad answer; none may go on or wait for it."""
    rollouts = rollouts_for(settings_for(url, folder))
    trainer = make_trainer(
        small_policy(), small_tokenizer(), rollouts, folder, per_device_train_batch_size=4
    )
    if PartialState().process_index == 1:
        real = rollouts.client.complete

        def failing(model, prompt, count, sampling):
            if sampling.ignore_stop:
                return real(model, prompt, count, sampling)
            raise BadAnswer("no token ids")

        rollouts.client.complete = failing
    return failure_of(trainer.train)


def one_has_another_policy(url, folder):
    """Weights of one process that are not those of the main one, which alone sends them."""
    rollouts = rollouts_for(settings_for(url, folder))
    trainer = make_trainer(
        small_policy(), small_tokenizer(), rollouts, folder, per_device_train_batch_size=4
    )
    if PartialState().process_index == 1:
        with torch.no_grad():
            trainer.model.get_output_embeddings().weight.mul_(3.0)
    return failure_of(lambda: rollouts(["import os"] * 4, trainer))


def failure_of(action):
    """How an action ends."""
    try:
        action()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


if __name__ == "__main__":
    scenario, url, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    scenarios = (
        *(adapters, full_weights, prefetched),
        *(one_fails, one_loses, one_gets_a_long_prompt, one_has_another_policy),
    )
    seen = {run.__name__: run for run in scenarios}[scenario](url, folder)
    torch.save(seen, folder / f"rank{PartialState().process_index}.pt")
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()  # left open, it sometimes aborts the process at its end
