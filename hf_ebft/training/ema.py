"""An exponential moving average of the trained weights (EMA), kept beside them.

Rollouts make noisy gradients; the average of the last few weights is less noisy than the last
weights. After step t, for every trainable weight W,

    A_0 = W_0,   A_t = decay * A_(t-1) + (1 - decay) * W_t

in float32 whatever the weights are in: with a decay of 0.99, bfloat16 would round most changes
away. Frozen weights (the base under adapters) are not copied. Under FSDP2 each process averages its
own shard; under DDP every process has the same average, as it has the same weights.
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

# In output_dir and in each checkpoint. The model is one folder deeper: Trainer takes adapters in a
# folder directly below a checkpoint for adapters of the policy when it resumes.
FOLDER = "ema"
MODEL_FOLDER = "model"
STATE_FILE = "state.safetensors"
METRIC_SUFFIX = "_ema"


class WeightAverage:
    """The moving average of a model's trainable weights.

    Args:
        model: the policy, as prepared for training (sharded by then, under FSDP2).
        decay: weight of the past, in (0, 1).

    Raises:
        ValueError: a decay out of range, or a model without trainable weights.
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
            raise ValueError("There are no trainable weights to average; all are frozen.")

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights as they are now."""
        for name, weight in self._weights().items():
            local = _local(weight).to(torch.float32)
            _local(self._averages[name]).lerp_(local, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights, then with its own again, to the bit."""
        weights = self._weights()
        own = {name: _local(weight).detach().clone() for name, weight in weights.items()}
        self._copy_into_model(self._averages)
        try:
            yield
        finally:
            self._copy_into_model(own)

    def state(self) -> dict[str, Tensor]:
        """Whole averages in float32 on the CPU, by name; a collective call under FSDP2.

        Empty on all processes but the main one.
        """
        keep = PartialState().is_main_process
        state = {}
        for name, average in self._averages.items():
            whole = average.full_tensor() if isinstance(average, DTensor) else average
            if keep:
                state[name] = whole.cpu()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over averages that `state` gave, on every process.

        Raises:
            ValueError: averages of other weights.
        """
        expected = {name: tuple(average.shape) for name, average in self._averages.items()}
        found = {name: tuple(whole.shape) for name, whole in state.items()}
        if expected != found:
            different = sorted(
                name for name in expected | found if expected.get(name) != found.get(name)
            )
            raise ValueError(
                f"The saved averages are of other weights than those in training, which differ in "
                f"{len(different)}, such as {different[:3]}: resume with the same model, adapters "
                "and trainable weights."
            )
        for name, average in self._averages.items():
            whole = state[name].to(average.device)
            if isinstance(average, DTensor):
                # Every process has the whole: each takes its own shard, without communication.
                whole = distribute_tensor(
                    whole, average.device_mesh, average.placements, src_data_rank=None
                )
            _local(average).copy_(_local(whole))

    @torch.no_grad()
    def _copy_into_model(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights().items():
            _local(weight).copy_(_local(values[name]))

    def _weights(self) -> dict[str, nn.Parameter]:
        """Trainable weights by name; the shards, under FSDP2."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass without backward leaves some gathered
        return {
            name: weight for name, weight in self.model.named_parameters() if weight.requires_grad
        }


class EMACallback(TrainerCallback):
    """Averages the policy's weights during training; evaluates and saves the average as well.

    - Each evaluation is repeated with the averaged weights, on the same rows and with the same
      random numbers; its metrics are named `eval_ema_...` instead of `eval_...`, are logged, and
      may be named as `metric_for_best_model`.
    - Each checkpoint holds `ema/model`, which `from_pretrained` loads (adapters, for a PEFT
      policy), and `ema/state.safetensors`, the float32 average that a resumed run continues from.
      At the end of training the same is written to `output_dir`.

    `EBFTTrainer` adds one where `ema_decay` is set; other trainers take it by
    `trainer.add_callback(EMACallback(trainer, decay))`.

    Args:
        trainer: it evaluates and saves.
        decay: weight of the past, in (0, 1). The configurations released with the paper have 0.9.
        evaluate: repeat evaluations with the average.
        resume_from: checkpoint to continue an average from; default that of the run's step in
            `output_dir`.

    Raises:
        ValueError: a decay out of range; when training starts, DeepSpeed, FSDP1 or a
            hyperparameter search; on resuming, a checkpoint without a matching average.
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
        """The trainer's model with the averaged weights, for evaluation or saving by hand.

        Raises:
            RuntimeError: before training has started.
        """
        if self.average is None:
            raise RuntimeError("There is no average before training has started.")
        with self.average.applied():
            yield

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start from the weights as they are, or from the checkpoint that training resumes from."""
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
        """Move towards the new weights."""
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
        """Evaluate the average on the dataset that the weights were evaluated on."""
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
        """Write the averaged model, and the float32 average unless told not to.

        Every process must call this together. As `Trainer.save_model` writes no model under FSDP
        with `SHARDED_STATE_DICT`, neither does this; the float32 average is whole in any case.

        Args:
            folder: gets `model/` and `state.safetensors`.
            with_state: whether a run is to be resumed from it.
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
                "it was saved without ema_decay or with save_only_model, or lies elsewhere. Name "
                "the checkpoint's path in train(resume_from_checkpoint=...) (or resume_from of "
                "EMACallback), or start a new run."
            )
        with safe_open(path, "pt") as file:
            step = (file.metadata() or {}).get("global_step")
        if step != str(state.global_step):
            raise ValueError(
                f"{path} is the average at step {step}, but training resumes at step "
                f"{state.global_step}: name the checkpoint that it resumes from."
            )
        self.average.load(load_file(path))

    def _evaluated(self, metrics: dict[str, float]) -> tuple[str, Any]:
        """Prefix of the metrics and the dataset they are of; no dataset if that is not known."""
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
    """Where `Trainer` puts the checkpoint of this step."""
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _refuse_unsupported(trainer: Trainer, state: TrainerState) -> None:
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "ema_decay cannot average weights that DeepSpeed partitions; use DDP or FSDP2."
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            "ema_decay cannot average the flattened weights of FSDP1; use FSDP2 (fsdp_version: 2)."
        )
    if state.is_hyper_param_search:
        raise ValueError(
            "ema_decay would mix the checkpoints of the trials of a hyperparameter search; leave "
            "it unset there."
        )
