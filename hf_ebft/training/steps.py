"""Optimizer steps: micro-batches are weighted by their documents, and are processed in parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from hf_ebft.objective.schedules import Coefficients, coefficients_at
from hf_ebft.packed.deferred import TrainingPass
from hf_ebft.packed.fsdp import is_sharded
from hf_ebft.rows.documents import Documents, split_rows
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training.block_choice import choose_blocks
from hf_ebft.training.ema import EMACallback
from hf_ebft.training.fitted_baseline import FittedBaseline
from hf_ebft.training.metrics import sum_over_processes
from hf_ebft.training.preparation import refuse_frozen, refuse_no_batch
from hf_ebft.training.random_streams import RolloutStreams
from hf_ebft.training.reading import ReadingMixin
from hf_ebft.training.rounding import warn_of_still_weights
from hf_ebft.training.step_log import StepLog


class StepsMixin(ReadingMixin):
    """The part of `EBFTTrainer` that runs and logs optimizer steps.

    Attributes:
        ebft: the settings; `rollout_batch_size` is the number of rows processed at once.
        step_log: collects metrics.
        random_streams: the generators of rollouts, restarted with every run.
        averaging: the moving average of the weights; None if unused.
        fitted: the baselines that are fitted between steps; None if unused.
    """

    step_log: StepLog
    random_streams: RolloutStreams
    averaging: EMACallback | None = None
    fitted: FittedBaseline | None = None

    _in_training_step = False
    # Tells Trainer to divide the loss by the number of accumulation steps; see share_of_step.
    loss_is_scaled_for_ga = False

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; it compiles nothing, since we compile layers one by one."""
        super().create_accelerator_and_postprocess()
        if self.args.torch_compile:
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as `Trainer` does, with fresh metrics and random streams.

        Earlier runs, and losses that the user computed before, have no influence.

        Raises:
            ValueError: no weight of the model is trainable, or there are too few rows for a batch.
        """
        refuse_no_batch(self.args, self.train_dataset)
        if self.model_init is None:
            refuse_frozen(self.model)
        unnamed = resume_from_checkpoint is None or isinstance(resume_from_checkpoint, bool)
        for kept in (self.averaging, self.fitted):
            if kept is not None:
                kept.resume_from = None if unnamed else str(resume_from_checkpoint)
        if self.model_init is None and self.accelerator.is_main_process:
            sharded = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
            warn_of_still_weights(
                self.model,
                self.args,
                self.optimizer,
                upcast=sharded and self.accelerator.mixed_precision != "no",
            )
        self.step_log.restart()
        self.random_streams.restart()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, and their number of documents on all processes.

        `Trainer` counts label tokens here, but EBFT's loss is a mean over documents.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(float(self.document_reader.read(batch).count) for batch in batches)
        return batches, sum_over_processes(torch.tensor(count, device=device))

    def choose_blocks(
        self, model: nn.Module, layout: PackedLayout, generator: torch.Generator
    ) -> PackedLayout:
        """The layout with the blocks that a step samples: in training, a share `block_share`."""
        share = self.ebft.block_share
        if share == 1.0 or self.random_streams.evaluating:
            return layout
        return choose_blocks(
            model,
            self._forward,
            layout,
            share,
            generator=generator,
            chunk_size=self.ebft.log_prob_chunk_size,
            counts=self._buckets[1],
        )

    @property
    def _training_pass(self) -> TrainingPass:
        return TrainingPass(
            self._forward,
            temperature=self.ebft.temperature,
            with_document=self.coefficients.ce > 0,
            chunk_size=self.ebft.log_prob_chunk_size,
            training_chunk_size=self.ebft.training_chunk_size,
            adds_to_grad=self._in_training_step,
        )

    def share_of_step(
        self, documents: Documents, documents_of_step: Tensor | int | None
    ) -> Tensor | float:
        """The factor that turns a mean over this micro-batch into its part of the step's mean.

        `Trainer` then divides by the number of accumulation steps, and DDP or FSDP by the number of
        processes. The factor is 1 if all micro-batches have equally many documents, or if this
        batch is the whole step.
        """
        if documents_of_step is None:
            return 1.0
        return documents.count * self._shares / documents_of_step

    @property
    def coefficients(self) -> Coefficients:
        """Weights of the loss's parts at the current optimizer step (before a run, the first)."""
        return coefficients_at(self.ebft, self.state.global_step, self.state.max_steps)

    @property
    def _shares(self) -> int:
        return self.current_gradient_accumulation_steps * self.accelerator.num_processes

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """`Trainer`'s step, in parts of `rollout_batch_size` rows, timed by phase."""
        parts = split_rows(inputs, self.ebft.rollout_batch_size)
        if num_items_in_batch is None and len(parts) > 1:
            # This batch is the whole step; each of its parts is not.
            num_items_in_batch = self.document_reader.read(inputs).count * self._shares
        losses = []
        self._in_training_step = True
        try:
            with self.step_log.phase("training"):
                for part in parts:
                    # FSDP2 adds up shards, and would have to keep whole gradients to do it later.
                    later = part is not parts[-1] and not is_sharded(model)
                    with self.accelerator.no_sync(model) if later else nullcontext():
                        losses.append(super().training_step(model, part, num_items_in_batch))
        finally:
            self._in_training_step = False
        self.step_log.end_batch()
        return torch.stack(losses).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training log also gets the `ebft/*` means since the last one, of all processes."""
        if "loss" in logs:
            logs = logs | self.step_log.take()
        super().log(logs, start_time)
