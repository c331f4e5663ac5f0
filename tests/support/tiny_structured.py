"""Tiny policies, data and oracles that the tests of structured mode share.

The oracles are plain loops over one sequence and one group at a time.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ebft.structured import EBFTGRPOConfig, EBFTGRPOTrainer
from tests.support.tiny import tiny_llama, tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer(eos_token="<eos>", pad_token="<pad>")
    made.add_special_tokens(
        {"extra_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]}
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def policy(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    tokens = tokenizer()
    return tiny_llama(
        seed=seed, vocabulary=len(tokens), eos_token_id=tokens.eos_token_id, **settings
    )


def rows(count: int = 8) -> Dataset:
    """Prompts and ground truths of different lengths."""
    return Dataset.from_dict(
        {
            "prompt": [f"def f{number}(x" + ", y" * (number % 3) for number in range(count)],
            "ground_truth": [
                f"):\n    return {number}" + " + x" * (number % 4) for number in range(count)
            ],
        }
    )


def config(folder: Path, **settings: Any) -> EBFTGRPOConfig:
    return EBFTGRPOConfig(**(trl_settings(folder) | settings))


def trl_settings(folder: Path) -> dict[str, Any]:
    """What any of TRL's trainers is given for seconds on a CPU in float32."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "adam_beta2": 0.999,
        "seed": 3,
    }


class Recorder:
    """Mixed into one of TRL's trainers, keeps what its loss was computed from.

    Attributes:
        seen: of every micro-batch of training, rows (prompt ids, completion ids, advantage).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[list[tuple[tuple[int, ...], tuple[int, ...], float]]] = []
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = []
        for row in range(len(inputs["advantages"])):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
            completion = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
            advantage = float(inputs["advantages"][row])
            batch.append((tuple(prompt.tolist()), tuple(completion.tolist()), advantage))
        self.seen.append(batch)
        loss: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss


class RecordedEBFT(Recorder, EBFTGRPOTrainer):
    """Structured mode, recorded."""


class OnlyCrossEntropy(RecordedEBFT):
    """Leaves out the policy gradient, so that runs do not depend on what was sampled."""

    def feature_matching(self, prompts, completions, completion_ids, **columns):
        super().feature_matching(prompts, completions, completion_ids, **columns)
        return [0.0] * len(prompts)


def plain_feature(
    model: nn.Module,
    prompt: tuple[int, ...],
    completion: tuple[int, ...],
    layers: tuple[float, ...] = (0.25, 0.5, 0.75),
    method: str = "last_token",
    normalization: str = "per_layer",
) -> np.ndarray:
    """The feature of one sequence, from a forward pass over it alone."""
    ids = torch.tensor([list(prompt) + list(completion)])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    model.train(was_training)
    chosen = [states[int(fraction * (len(states) - 1))][0].double().numpy() for fraction in layers]
    tokens = []
    for place in range(ids.shape[1]):
        parts = [layer[place] for layer in chosen]
        if normalization == "per_layer":
            parts = [part / np.linalg.norm(part) for part in parts]
        joined = np.concatenate(parts)
        tokens.append(joined / np.linalg.norm(joined))
    length = len(tokens)
    if method == "last_token":
        return tokens[-1]
    if method == "completion_mean":
        return np.mean(tokens[len(prompt) :], axis=0)
    if method == "mean_pooling":
        return np.mean(tokens, axis=0)
    picked = [tokens[int(length * quarter)] for quarter in (0.25, 0.5, 0.75)]
    return np.concatenate(picked) / np.sqrt(3)


def plain_advantages(
    rollouts: list[np.ndarray], truth: np.ndarray, *, whiten: bool, estimator: str = "rloo"
) -> list[float]:
    """Advantages of one group (paper eq. 7 and 94), both coefficients 1."""
    n = len(rollouts)
    if whiten:
        _, singular, right = np.linalg.svd(np.stack(rollouts), full_matrices=False)
        inverse = [1 / s if s > 1e-5 * singular[0] else 0.0 for s in singular]
        whitening = sum(i * np.outer(v, v) for i, v in zip(inverse, right, strict=True))
        rollouts = [x @ whitening for x in rollouts]
        truth = truth @ whitening
    alignment, diversity = [], []
    for j in range(n):
        cosine = rollouts[j] @ truth / np.linalg.norm(rollouts[j]) / np.linalg.norm(truth)
        alignment.append(2 * cosine)
        others = [rollouts[j] @ rollouts[k] for k in range(n) if k != j]
        diversity.append(2 * sum(others) / (n - 1))
    advantages = []
    for j in range(n):
        reward = alignment[j] - diversity[j]
        if estimator == "rloo":
            of_alignment = (sum(alignment) - alignment[j]) / (n - 1)
            of_diversity = (sum(diversity) - 2 * diversity[j]) / (n - 2)
            advantages.append(reward - of_alignment + of_diversity)
        else:
            rewards = [a - d for a, d in zip(alignment, diversity, strict=True)]
            deviation = np.std(rewards, ddof=1)
            advantages.append((reward - np.mean(rewards)) / (deviation + 1e-4))
    return advantages


def expected_advantages(
    network: nn.Module,
    seen: list[tuple[tuple[int, ...], tuple[int, ...], float]],
    data: Dataset,
    *,
    n_samples: int,
    whiten: bool = True,
    estimator: str = "rloo",
    method: str = "last_token",
) -> list[float]:
    """What the advantages of these rows should be, found group by group.

    Args:
        network: the feature network, as a plain model.
        seen: rows of whole groups in any order, as `Recorder` keeps them.
        data: where their prompts and ground truths come from.
        n_samples, whiten, estimator, method: settings.
    """
    tokens = tokenizer()
    truths = {}
    for row in data:
        prompt = tuple(tokens(row["prompt"])["input_ids"])
        truths[prompt] = (*tokens(row["ground_truth"])["input_ids"], tokens.eos_token_id)
    members: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, _, _) in enumerate(seen):
        members.setdefault(prompt, []).append(index)
    expected = [float("nan")] * len(seen)
    for prompt, indices in members.items():
        assert len(indices) == n_samples
        features = [plain_feature(network, prompt, seen[i][1], method=method) for i in indices]
        truth = plain_feature(network, prompt, truths[prompt], method=method)
        values = plain_advantages(features, truth, whiten=whiten, estimator=estimator)
        for index, value in zip(indices, values, strict=True):
            expected[index] = value
    return expected


def assert_advantages(
    seen: list[tuple[tuple[int, ...], tuple[int, ...], float]], expected: list[float]
) -> None:
    """Compare the advantages of rows, as `Recorder` keeps them, with those expected."""
    found = [advantage for _, _, advantage in seen]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    assert np.std(found) > 0.1  # rollouts that differ, or nothing would have been tested
