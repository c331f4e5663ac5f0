"""A mixin for GRPO trainers that corrects for rollouts older than the policy.

    class Trainer(StalenessCorrection, GRPOTrainer): ...

Dimension letters: B completions, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from hf_ebft.structured.vllm.prefetch import Following, LookAhead, StalenessAware
from hf_ebft.structured.vllm.rollouts import VLLMRollouts
from hf_ebft.structured.vllm.settings import VLLMServerArguments

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer as Base
else:
    Base = object


class StalenessCorrection(StalenessAware, Base):
    """A base class to list before `trl.GRPOTrainer` (or a subclass of it).

    It changes nothing unless `VLLMRollouts` is the source of rollouts.

    - The importance ratio is exp(log p(token | policy) - log p(token | server)), with the server's
      log-probs at sampling time. This is correct for stale weights, several passes over a batch,
      and the server's rounding. TRL alone would assume that the current policy sampled. Clipping
      and the loss are TRL's.
    - With `async_prefetch` the next batch of rollouts is requested as soon as the current one is
      complete, so rollouts are one batch old. The first batch of an epoch is never prefetched.
    """

    _look_ahead: LookAhead | None = None
    _drawn = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.rollout_func, VLLMRollouts):
            self.rollout_func.check(self)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss of a batch, with the server's log-probs (B, T) as the old policy's."""
        if self.server_rollouts is None:
            self._refuse_unused_server()
        else:
            # The only place with TRL's names for entries of a batch: the `logprobs` that
            # rollout_func returned, and the log-probs in the ratio's denominator.
            inputs = {**inputs, "old_per_token_logps": inputs["sampling_per_token_logps"]}
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _refuse_unused_server(self) -> None:
        """Raise if the settings name a server but another source of rollouts is used."""
        args: Any = self.args
        if isinstance(args, VLLMServerArguments) and args.samples_on_server:
            raise ValueError(
                "vllm_lora_sync or vllm_full_sync is on, but this trainer's rollout_func does not "
                "sample from the server; leave rollout_func unset, hand it VLLMRollouts(args) (for "
                "several turns MultiTurnRollouts(generate_on_server(VLLMRollouts(args)))), or turn "
                "the sync off."
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Get the batches of one optimizer step, and tell the rollouts which batches follow."""
        rollouts = self.rollout_func
        if not isinstance(rollouts, VLLMRollouts) or not rollouts.settings.async_prefetch:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._look_ahead is None or self._look_ahead.source is not epoch_iterator:
            self._look_ahead = LookAhead(epoch_iterator)
        ahead: Any = self._look_ahead
        drawn, items = super().get_batch_samples(ahead, num_batches, device)
        # TRL samples at every `every`-th batch and skips the others.
        steps = cast("GRPOConfig", self.args).steps_per_generation
        assert steps is not None  # GRPOConfig has worked it out
        every = steps * self.num_iterations
        # Batches after the last step are never trained on.
        steps_left = self.state.max_steps - self.state.global_step - 1
        end = len(drawn) + steps_left * self.args.gradient_accumulation_steps
        rollouts.following.clear()
        for place in range(len(drawn)):
            if (self._drawn + place) % every == 0:
                later = place + every
                if later >= end:
                    batch = None
                elif later < len(drawn):
                    batch = drawn[later]
                else:
                    batch = ahead.peek(later - len(drawn))
                rollouts.following.append(None if batch is None else self._follows(batch))
        self._drawn += len(drawn)
        return drawn, items

    def _follows(self, inputs: list[dict[str, Any]]) -> Following:
        return Following([row["prompt"] for row in inputs], self.rollout_budget(inputs))

    def rollout_budget(self, inputs: list[dict[str, Any]] | None = None) -> int:
        """See `StalenessAware.rollout_budget`: `max_completion_length` for every batch."""
        assert self.max_completion_length is not None
        return self.max_completion_length

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """TRL's loop; the server samples with the same seeds in every evaluation."""
        if self.server_rollouts is not None:
            self.server_rollouts.start_evaluation()
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's metrics and those of the rollouts (`vllm/...`)."""
        if self.server_rollouts is not None and cast(nn.Module, self.model).training:
            logs = {**logs, **self.server_rollouts.metrics()}
        super().log(logs, start_time)
