"""Structured mode in miniature: a character model that can half reverse words improves by EBFT.

Everything is made here, nothing is downloaded. First, a small Llama is trained by cross-entropy,
and stopped while it still makes mistakes. Then EBFT trains it on its own completions. The ground
truth is used only through features (`--ce_coef 0`). Both models are measured on words that neither
stage has trained on, with the same seeds and the same frozen network, and compared word by word.

    python examples/structured_tiny.py
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ebft.evaluation import paired_bootstrap
from hf_ebft.structured import EBFTGRPOConfig, EBFTGRPOTrainer, FeatureMatchingReward
from hf_ebft.structured.cross_entropy import ground_truth_nll

LETTERS = "abcdefghij"
LENGTH = 8
HELD_OUT = 128


def main() -> None:
    """Teach, measure, train, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teaching_steps", type=int, default=250)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--prompts_per_step", type=int, default=16)
    parser.add_argument("--embed_method", default="last_token")
    parser.add_argument("--use_whitening", type=int, choices=(0, 1), default=1)
    parser.add_argument("--ce_coef", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    tokenizer = character_tokenizer()
    rows = word_rows(HELD_OUT + 8192, options.seed)
    held_out, train = rows[:HELD_OUT], rows[HELD_OUT:]
    start = time.perf_counter()
    model = taught(tokenizer, train, options.teaching_steps, options.seed)
    print(f"taught for {options.teaching_steps} steps in {time.perf_counter() - start:.0f} s")

    measure = FeatureMatchingReward(
        model, tokenizer, embed_method=options.embed_method, use_whitening=False
    )
    before = measure_completions(model, tokenizer, measure, held_out)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = EBFTGRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            num_generations=options.num_generations,
            per_device_train_batch_size=options.num_generations * options.prompts_per_step,
            max_completion_length=LENGTH + 2,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0,
            adam_beta2=0.999,
            loss_type="grpo",
            embed_method=options.embed_method,
            use_whitening=bool(options.use_whitening),
            ce_coef=options.ce_coef,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=options.steps + 1,
            seed=options.seed,
        )
        trainer = EBFTGRPOTrainer(
            model, args, train_dataset=Dataset.from_list(train), processing_class=tokenizer
        )
        trainer.train()
        trainer.accelerator.end_training()
    print(f"EBFT for {options.steps} steps in {time.perf_counter() - start:.0f} s")
    after = measure_completions(model, tokenizer, measure, held_out)

    print(f"\n{HELD_OUT} held-out words, {options.num_generations} completions each\n")
    print("| | before | after | difference (95 %) |\n|---|---|---|---|")
    for name, values in before.items():
        change = paired_bootstrap(values, after[name])
        print(
            f"| {name} | {change.before:.4f} | {change.after:.4f} | "
            f"{change.difference:+.4f} [{change.low:+.4f}, {change.high:+.4f}] |"
        )


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", ">", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def word_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Different words, each with its reverse as ground truth."""
    generator = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(generator.choices(LETTERS, k=LENGTH))] = None
    return [{"prompt": f"{word}>", "ground_truth": word[::-1]} for word in words]


def taught(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]], steps: int, seed: int
) -> LlamaForCausalLM:
    """A small Llama after some steps of cross-entropy on words and their reverses."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    texts = [f"{row['prompt']}{row['ground_truth']}" for row in rows]
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts])
    labels = ids.clone()
    labels[:, : LENGTH + 1] = -100
    for _ in range(steps):
        batch = torch.randint(len(ids), (64,))
        loss = model(input_ids=ids[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def measure_completions(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    measure: FeatureMatchingReward,
    rows: list[dict[str, str]],
    completions: int = 8,
) -> dict[str, NDArray[np.float64]]:
    """Metric -> its value for each row (N,), from completions sampled with a fixed seed."""
    model.eval()
    repeated = [row for row in rows for _ in range(completions)]
    prompts = [row["prompt"] for row in repeated]
    truths = [row["ground_truth"] for row in repeated]
    generate = cast(Any, model).generate  # its self is typed as a protocol
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        sampled = generate(
            **tokenizer(prompts, return_tensors="pt", return_token_type_ids=False),
            do_sample=True,
            top_k=0,
            max_new_tokens=LENGTH + 2,
        )[:, LENGTH + 1 :]
    ids = [completion_of(row.tolist(), tokenizer.eos_token_id) for row in sampled]
    rewards = measure.score(prompts, ids, truths).rewards
    examples = measure.encoder.encode(prompts[::completions], truths[::completions])
    nll = ground_truth_nll(model, model, examples, torch.device("cpu"))
    right = [
        list(example.truth_ids) == ids[completions * index + sample]
        for index, example in enumerate(examples)
        for sample in range(completions)
    ]
    return {
        "CFM loss": rewards.cfm_loss.squeeze(1).double().numpy(),
        "alignment, 2 cos unwhitened": rewards.alignment.mean(dim=(1, 2)).double().numpy(),
        "diversity, 2 dot unwhitened": rewards.diversity.mean(dim=(1, 2)).double().numpy(),
        "cross-entropy, nats/token": nll.double().numpy(),
        "exactly right": np.array(right, dtype=np.float64).reshape(-1, completions).mean(axis=1),
    }


def completion_of(ids: list[int], eos: int) -> list[int]:
    """Up to the first end-of-sequence token."""
    return ids[: ids.index(eos) + 1] if eos in ids else ids


if __name__ == "__main__":
    main()
