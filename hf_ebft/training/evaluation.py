"""Evaluation: teacher-forced loss as in `Trainer`, then rollouts for the `eval_ebft/*` metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.sampling import Rollouts
from hf_ebft.packed.teacher_forcing import teacher_forcing_inputs
from hf_ebft.rows.documents import split_rows
from hf_ebft.training.before_training import BeforeTrainingMixin
from hf_ebft.training.metrics import (
    MetricAccumulator,
    block_metrics,
    rollout_metrics,
    sum_over_processes,
)
from hf_ebft.training.outputs import Scores
from hf_ebft.training.random_streams import RolloutStreams
from hf_ebft.training.reading import ReadingMixin


class EvaluationMixin(BeforeTrainingMixin, ReadingMixin):
    """The part of `EBFTTrainer` that evaluates.

    Attributes:
        ebft: the settings; `eval_rollouts` says whether to sample rollouts, `rollout_batch_size`
            is the number of rows sampled at once.
        random_streams: the generators of rollouts, which also know whether an evaluation is in
            progress.
    """

    random_streams: RolloutStreams
    _forward: PackedForward
    _teacher_forced = False  # whether compute_loss computes Trainer's loss
    _evaluation_metrics: MetricAccumulator

    def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
        """Sample rollouts for a batch."""
        raise NotImplementedError

    def score_rollouts(self, rollouts: Rollouts) -> Scores:
        """Rewards and advantages of rollouts."""
        raise NotImplementedError

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Teacher-forced loss and logits as in `Trainer`, then rollouts for `ebft/*` metrics."""
        inputs = self._prepare_inputs(inputs)
        documents = self.document_reader.read(inputs)
        self._teacher_forced = True
        try:
            result = super().prediction_step(
                model,
                teacher_forcing_inputs(inputs, documents, self._forward.recipe),
                prediction_loss_only,
                ignore_keys,
            )
        finally:
            self._teacher_forced = False
        if self.ebft.eval_rollouts and self.random_streams.evaluating:
            for part in split_rows(inputs, self.ebft.rollout_batch_size):
                with torch.no_grad():
                    rollouts = self.sample_rollouts(model, part)
                    scores = self.score_rollouts(rollouts)
                self._evaluation_metrics.add(
                    block_metrics(scores.rewards, scores.advantages, rollouts.layout)
                    | rollout_metrics(rollouts.tokens, rollouts.layout)
                )
        return result

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as `Trainer` does, and add `{prefix}_ebft/*` from rollouts with a fixed seed."""
        self._evaluation_metrics = MetricAccumulator(self.args.device)
        # Iterating a DataLoader draws from torch's global generator, which would change the
        # dropout of the training steps that follow.
        with self.random_streams.evaluation(), torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if self.ebft.eval_rollouts:
            assert output.metrics is not None
            for name, value in self._evaluation_metrics.take(sum_over_processes).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output
