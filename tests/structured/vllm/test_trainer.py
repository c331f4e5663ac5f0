"""The importance ratio of rollouts from a server is to the server's log-probs."""

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOTrainer

from tests.support.plain_forwards import plain_log_probs
from tests.support.tiny import logged
from tests.support.vllm_training import PROMPTS, CorrectingTrainer

# TRL says that rollout_func is experimental; the tests below would notice a change.
pytestmark = pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning")


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
