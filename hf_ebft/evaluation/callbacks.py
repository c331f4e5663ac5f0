"""Callbacks that sample from the policy during training: fixed prefixes, metrics of completions.

Both have their own random numbers, so they do not change training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_ebft.evaluation.completions import CompletionMetrics
from hf_ebft.evaluation.documents import Rows
from hf_ebft.evaluation.samples import RolloutGroup, sample_groups
from hf_ebft.packed.forward import evaluation_mode
from hf_ebft.packed.fsdp import is_sharded
from hf_ebft.packed.sampling import make_generator
from hf_ebft.trainer import EBFTTrainer
from hf_ebft.training.random_streams import Stream

WATCHED_FILE = "watched_rollouts.jsonl"


class RolloutWatcher(TrainerCallback):
    """Continues the same prefixes at regular steps, so that people can follow how they change.

    The prefix in the middle of each row is continued n times, with the same seed at every step:
    only the policy changes. `latest` contains the groups of the last step, as `RolloutGroup`s.
    `output_dir/watched_rollouts.jsonl` gets a line for each prefix and step, with the rewards of
    training, and with texts if the trainer has a tokenizer. A resumed run continues the file.

    Args:
        trainer: the trainer, which has the policy, the feature network and the settings.
        rows: a few tokenized rows, which form one batch. Rows without room for a block are skipped.
        every_steps: optimizer steps between two samplings; the weights before and after training
            are always sampled from.
        n_samples: rollouts for each prefix. Default: as in training.
        length: tokens of a rollout. Default: as in training.
        seed: seed of the rollouts.

    Raises:
        ValueError: `every_steps` is below 1.
    """

    def __init__(
        self,
        trainer: EBFTTrainer,
        rows: Rows,
        *,
        every_steps: int,
        n_samples: int | None = None,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} must be at least 1.")
        self.trainer = trainer
        self.rows = rows
        self.every_steps = every_steps
        self.n_samples = n_samples
        self.length = length
        self.seed = seed
        self.latest: list[RolloutGroup] = []
        self._looked_at: int | None = None

    def look(self) -> list[RolloutGroup]:
        """Continue the prefixes with the policy as it is now.

        All processes must call this together; each samples all prefixes, so that sharded policies
        work.
        """
        trainer = self.trainer
        model: Any = trainer.model
        return sample_groups(
            model,
            trainer.feature_network,
            self.rows,
            trainer.ebft,
            n_samples=self.n_samples,
            length=self.length,
            data_collator=trainer.data_collator,
            corpus_whitening=trainer.corpus_whitening(),
            eos_token_id=getattr(trainer.processing_class, "eos_token_id", None),
            seed=self.seed,
        )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Sample from the initial weights; on resuming, drop lines of later steps from the file."""
        self._looked_at = None
        if args.process_index == 0:
            path = self._path(args)
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] < state.global_step]
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._record(args, state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Sample at every `every_steps`-th step."""
        if state.global_step % self.every_steps == 0:
            self._record(args, state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Sample from the last weights."""
        if self._looked_at != state.global_step:
            self._record(args, state)

    def _record(self, args: TrainingArguments, state: TrainerState) -> None:
        self.latest = self.look()
        self._looked_at = state.global_step
        if args.process_index != 0:
            return
        tokenizer: Any = self.trainer.processing_class
        decode = None if tokenizer is None else tokenizer.decode
        with self._path(args).open("a", encoding="utf-8") as file:
            for group in self.latest:
                line = {"step": state.global_step} | group.to_dict(decode)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _path(self, args: TrainingArguments) -> Path:
        return Path(str(args.output_dir), WATCHED_FILE)


class CompletionMetricsCallback(TrainerCallback):
    """Generates completions of fixed prompts at each evaluation, and logs metrics of them.

    They are logged as `eval_completions/...` (in TensorBoard `eval/completions/...`) and are added
    to the metrics of the evaluation, so that `metric_for_best_model` can be one of them. It works
    with any `Trainer` of a causal language model, in strided and in structured mode. The prompts
    are divided among processes.

    Args:
        trainer: the trainer, which has the model and the tokenizer.
        metrics: the metrics to compute.
        prompts: texts.
        ground_truths: one for each prompt.
        max_new_tokens: largest number of tokens of a completion.
        n_samples: completions of each prompt.
        temperature: sampling temperature; 0 is greedy.
        batch_size: number of prompts generated at once on a process.
        generation_options: further arguments of `model.generate`, such as `stop_strings`.
        seed: seed of the completions, the same at every evaluation.

    Raises:
        ValueError: there is no tokenizer, prompts and ground truths do not match, several greedy
            completions of a prompt are asked for, or a number is below 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        metrics: CompletionMetrics,
        prompts: Sequence[str],
        ground_truths: Sequence[str],
        *,
        max_new_tokens: int,
        n_samples: int = 1,
        temperature: float = 0.0,
        batch_size: int = 8,
        generation_options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if trainer.processing_class is None:
            raise ValueError("The trainer has no tokenizer; pass it one as processing_class.")
        if not prompts or len(prompts) != len(ground_truths):
            raise ValueError(
                f"{len(prompts)} prompts and {len(ground_truths)} ground truths: there must be one "
                "for each, and at least one."
            )
        numbers = {
            "max_new_tokens": max_new_tokens,
            "n_samples": n_samples,
            "batch_size": batch_size,
        }
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if temperature < 0 or (temperature == 0 and n_samples > 1):
            raise ValueError(
                f"temperature={temperature} with n_samples={n_samples}: it must be above 0 to "
                "sample several completions, or 0 for a greedy one."
            )
        self.trainer = trainer
        self.metrics = metrics
        self.prompts = list(prompts)
        self.ground_truths = list(ground_truths)
        self.max_new_tokens = max_new_tokens
        self.n_samples = n_samples
        self.temperature = temperature
        self.batch_size = batch_size
        self.generation_options = dict(generation_options or {})
        self.seed = seed
        self.completions: list[list[str]] = []  # of the last evaluation
        self._evaluated_at: int | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start afresh."""
        self._evaluated_at = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Generate and log once per step, even if there are several evaluation datasets."""
        if self._evaluated_at == state.global_step and self.trainer.is_in_train:
            return
        self._evaluated_at = state.global_step
        self.completions = self.generate()
        found = self.metrics.compute(self.completions, self.ground_truths)
        logs = {f"eval_completions/{name}": value for name, value in found.items()}
        self.trainer.log(logs)
        if metrics is not None:
            metrics.update(logs)

    def generate(self) -> list[list[str]]:
        """n completions of every prompt, on every process; a collective call."""
        accelerator = self.trainer.accelerator
        with accelerator.split_between_processes(
            list(range(len(self.prompts))), apply_padding=True
        ) as mine:
            own = self._generate(mine)
        gathered = dict(gather_object(list(own.items())))
        return [gathered[index] for index in range(len(self.prompts))]

    def _generate(self, indices: list[int]) -> dict[int, list[str]]:
        """Completions of the prompts of this process."""
        trainer, found = self.trainer, {}
        # Under DDP this is the model without its wrapper; FSDP2 has no wrapper.
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        tokenizer: Any = trainer.processing_class
        device = next(model.parameters()).device
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        on_accelerator = {} if device.type == "cpu" else {"device_type": device.type}
        forked = [] if device.type == "cpu" else [device]
        with evaluation_mode(model), torch.random.fork_rng(forked, **on_accelerator):
            for first in range(0, len(indices), self.batch_size):
                some = indices[first : first + self.batch_size]
                # generate takes no generator, so torch's global one is seeded.
                torch.manual_seed(
                    make_generator(
                        torch.device("cpu"), self.seed, Stream.COMPLETIONS, some[0]
                    ).initial_seed()
                )
                inputs = _left_padded([tokenizer(self.prompts[i])["input_ids"] for i in some])
                generated = model.generate(
                    **{name: value.to(device) for name, value in inputs.items()},
                    **sampling | self.generation_options,
                    max_new_tokens=self.max_new_tokens,
                    num_return_sequences=self.n_samples,
                    use_cache=True,
                    pad_token_id=_pad_token_id(tokenizer),
                    # Sharded weights are gathered by all processes together, until all are done.
                    synced_gpus=is_sharded(model),
                    **(
                        {"tokenizer": tokenizer}
                        if "stop_strings" in self.generation_options
                        else {}
                    ),
                )
                new = generated[:, inputs["input_ids"].shape[1] :]
                texts = tokenizer.batch_decode(new, skip_special_tokens=True)
                for place, index in enumerate(some):
                    found[index] = texts[place * self.n_samples : (place + 1) * self.n_samples]
        return found


def _left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, whatever side the tokenizer pads on."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _pad_token_id(tokenizer: Any) -> int:
    """The token with which generate fills ended rows; it is skipped when decoded, if known."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
