"""An exponential moving average (EMA) of the trained weights.

Gradients from rollouts are noisy, so the weights after a step are noisy, too. An average over the
last steps is less noisy. After step t, for every trainable weight W,

    A_0 = W_0,   A_t = decay * A_(t-1) + (1 - decay) * W_t

in float32, whatever the data type of the weights: with a decay of 0.99, bfloat16 would round most
changes away. Frozen weights (the base under adapters) are not copied. Under FSDP2 each process
averages its own shard. Under DDP all processes have the same weights, and so the same average.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_ebft.config import check_ema_decay

# Folder in output_dir and in each checkpoint. The model is one folder deeper: when Trainer resumes,
# it would take adapters in a folder directly below the checkpoint for adapters of the policy.
FOLDER = "ema"
MODEL_FOLDER = "model"
STATE_FILE = "state.safetensors"
METRIC_SUFFIX = "_ema"


class WeightAverage:
    """The moving average of a model's trainable weights.

    Args:
        model: the policy, prepared for training (under FSDP2, already sharded).
        decay: weight of the previous average, in (0, 1).

    Raises:
        ValueError: the decay is out of range, or the model has no trainable weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        check_ema_decay(decay)
        self.model = model
        self.decay = decay
        self._averages = {
            name: weight.detach().to(torch.float32, copy=True)
            for name, weight in self._weights().items()
        }
        if not self._averages:
            raise ValueError(
                "ema_decay has no trainable weights to average: all weights of the model are "
                "frozen. Set requires_grad on those to train."
            )

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the model's current weights."""
        for name, weight in self._weights().items():
            local = _local(weight).to(torch.float32)
            _local(self._averages[name]).lerp_(local, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights within the context; restore its own ones after it."""
        weights = self._weights()
        own = {name: _local(weight).detach().clone() for name, weight in weights.items()}
        self._copy_into_model(self._averages)
        try:
            yield
        finally:
            self._copy_into_model(own)

    def state(self) -> dict[str, Tensor]:
        """The full (unsharded) averages in float32 on the CPU, by name, on the main process.

        On other processes the result is empty. A collective call under FSDP2.
        """
        keep = PartialState().is_main_process
        state = {}
        for name, average in self._averages.items():
            whole = average.full_tensor() if isinstance(average, DTensor) else average
            if keep:
                state[name] = whole.cpu()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Set the averages to those that `state` returned; every process needs all of them.

        Raises:
            ValueError: these are averages of other weights.
        """
        expected = {name: tuple(average.shape) for name, average in self._averages.items()}
        found = {name: tuple(whole.shape) for name, whole in state.items()}
        if expected != found:
            different = sorted(
                name for name in expected | found if expected.get(name) != found.get(name)
            )
            raise ValueError(
                f"The saved averages do not fit the weights in training: {len(different)} names or "
                f"shapes differ, such as {different[:3]}. Resume with the same model, adapters and "
                "trainable weights."
            )
        for name, average in self._averages.items():
            whole = state[name].to(average.device)
            if isinstance(average, DTensor):
                # Every process has the full tensor and takes its own shard, without communication.
                whole = distribute_tensor(
                    whole, average.device_mesh, average.placements, src_data_rank=None
                )
            _local(average).copy_(_local(whole))

    @torch.no_grad()
    def _copy_into_model(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights().items():
            _local(weight).copy_(_local(values[name]))

    def _weights(self) -> dict[str, nn.Parameter]:
        """Trainable weights by name; under FSDP2, their shards."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass without backward, some are still gathered
        return {
            name: weight for name, weight in self.model.named_parameters() if weight.requires_grad
        }


class EMACallback(TrainerCallback):
    """Averages the policy's weights during training; evaluates and saves the average as well.

    - Each evaluation is repeated with the averaged weights, on the same rows and with the same
      random numbers. Its metrics are logged under `eval_ema_...` instead of `eval_...`, and one of
      them can be `metric_for_best_model`.
    - Each checkpoint contains `ema/model`, which `from_pretrained` loads (adapters, for a PEFT
      policy), and `ema/state.safetensors`, the float32 average that a resumed run continues from.
      At the end of training, both are written to `output_dir`, too.

    `EBFTTrainer` adds this callback if `ema_decay` is set. For other trainers, call
    `trainer.add_callback(EMACallback(trainer, decay))`.

    Args:
        trainer: the trainer, which evaluates and saves.
        decay: weight of the previous average, in (0, 1). The configurations released with the
            paper have 0.9.
        evaluate: repeat evaluations with the average.
        resume_from: checkpoint to continue an average from. Default: the checkpoint of the run's
            step in `output_dir`.

    Raises:
        ValueError: the decay is out of range. When training starts: with DeepSpeed, FSDP1 or a
            hyperparameter search. On resuming: the checkpoint has no matching average.
    """

    def __init__(
        self,
        trainer: Trainer,
        decay: float,
        *,
        evaluate: bool = True,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        check_ema_decay(decay)
        self.trainer = trainer
        self.decay = decay
        self.evaluate = evaluate
        self.resume_from = resume_from
        self.average: WeightAverage | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the trainer's model the averaged weights within the context.

        Raises:
            RuntimeError: training has not started.
        """
        if self.average is None:
            raise RuntimeError(
                "There is no average before training has started; call trainer.train() first."
            )
        with self.average.applied():
            yield

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start the average at the current weights, or continue that of the resumed checkpoint."""
        _refuse_unsupported(self.trainer, state)
        model: Any = self.trainer.model
        self.average = WeightAverage(model, self.decay)
        if state.global_step > 0:
            self._resume(args, state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Update the average with the new weights."""
        assert self.average is not None
        self.average.update()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Evaluate the average on the dataset on which the weights were just evaluated."""
        if not self.evaluate or self.average is None or metrics is None:
            return
        prefix, dataset = self._evaluated(metrics)
        if dataset is None:
            return
        with self.applied():
            # Not Trainer.evaluate, which would call all callbacks again, early stopping included.
            output = self.trainer.evaluation_loop(
                self.trainer.get_eval_dataloader(dataset),
                description="Evaluation of averaged weights",
                prediction_loss_only=True if self.trainer.compute_metrics is None else None,
                metric_key_prefix=prefix + METRIC_SUFFIX,
            )
        assert output.metrics is not None
        self.trainer.log(output.metrics)
        metrics.update(output.metrics)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_evaluate(args, state, control)  # ends the bar of this evaluation

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save the average into the checkpoint."""
        folder = checkpoint_folder(args, state)
        self.save(folder / FOLDER, with_state=not args.save_only_model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save the average into `output_dir`."""
        self.save(Path(str(args.output_dir), FOLDER))

    def save(self, folder: str | os.PathLike[str], *, with_state: bool = True) -> None:
        """Write the averaged model and the float32 average.

        All processes must call this together. Under FSDP with `SHARDED_STATE_DICT` the model is not
        written, since `Trainer.save_model` writes none; the float32 average is always complete.

        Args:
            folder: folder for `model/` and `state.safetensors`.
            with_state: also write the float32 average, from which a run can be resumed.
        """
        with self.applied():
            # An internal call does not push to the hub.
            self.trainer.save_model(str(Path(folder, MODEL_FOLDER)), _internal_call=True)
        if not with_state:
            return
        assert self.average is not None
        averages = self.average.state()
        if self.trainer.args.should_save:
            Path(folder).mkdir(parents=True, exist_ok=True)
            step = str(self.trainer.state.global_step)
            save_file(averages, Path(folder, STATE_FILE), metadata={"global_step": step})

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self.average is not None
        checkpoint = self.resume_from
        path = Path(checkpoint_folder(args, state) if checkpoint is None else checkpoint)
        path = path / FOLDER / STATE_FILE
        if not path.is_file():
            raise ValueError(
                f"Training resumes at step {state.global_step}, but there is no average at {path}: "
                "the checkpoint was saved without ema_decay or with save_only_model, or is in "
                "another folder. Pass the checkpoint's path to train(resume_from_checkpoint=...) "
                "(or as resume_from of EMACallback), or start a new run."
            )
        with safe_open(path, "pt") as file:
            step = (file.metadata() or {}).get("global_step")
        if step != str(state.global_step):
            raise ValueError(
                f"{path} is the average at step {step}, but training resumes at step "
                f"{state.global_step}: set resume_from to the checkpoint that training resumes "
                "from."
            )
        self.average.load(load_file(path))

    def _evaluated(self, metrics: dict[str, float]) -> tuple[str, Any]:
        """The prefix of the metrics, and the dataset that they were measured on or None."""
        datasets: Any = self.trainer.eval_dataset
        named = (
            {f"eval_{name}": data for name, data in datasets.items()}
            if isinstance(datasets, dict)
            else {"eval": datasets}
        )
        for prefix, data in named.items():
            if f"{prefix}_runtime" in metrics:
                return prefix, data
        return "", None


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder in which `Trainer` saves the checkpoint of this step."""
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _refuse_unsupported(trainer: Trainer, state: TrainerState) -> None:
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "ema_decay cannot average weights that DeepSpeed partitions; use DDP or FSDP2, or "
            "leave ema_decay unset."
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            "ema_decay cannot average the flattened weights of FSDP1; use FSDP2 (fsdp_version: 2)."
        )
    if state.is_hyper_param_search:
        raise ValueError(
            "ema_decay would mix up the checkpoints of the trials of a hyperparameter search; "
            "leave ema_decay unset for the search."
        )
