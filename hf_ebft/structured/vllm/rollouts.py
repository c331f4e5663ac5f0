"""Rollouts from a stock vLLM server, as a `rollout_func` for TRL's `GRPOTrainer`.

    trainer = GRPOTrainer(..., rollout_func=VLLMRollouts(VLLMServerSettings(vllm_lora_sync=True)))

Every process requests completions of its own prompts; only the main process sends weights. A batch
is complete or the run stops: completions that are lost with a server are sampled again.
"""

from __future__ import annotations

import atexit
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from accelerate.utils import gather_object

from hf_ebft.structured.vllm.answers import Completion
from hf_ebft.structured.vllm.batch import Batch, Seeds, find_runs
from hf_ebft.structured.vllm.client import Sampling, VLLMClient
from hf_ebft.structured.vllm.errors import ServerGone, ServerUnavailable
from hf_ebft.structured.vllm.metrics import RolloutMetrics
from hf_ebft.structured.vllm.prefetch import Following, StalenessAware
from hf_ebft.structured.vllm.processes import raise_together
from hf_ebft.structured.vllm.served_policy import RECOVERIES, ServedPolicy, sync_kind
from hf_ebft.structured.vllm.settings import VLLMServerArguments
from hf_ebft.structured.vllm.trainer_options import check_trainer, get_max_tokens, tokenize_prompts
from hf_ebft.structured.vllm.workers import DaemonPool

logger = logging.getLogger(__name__)


class VLLMRollouts:
    """A `rollout_func(prompts, trainer)` that samples from a stock vLLM server.

    The first call waits for the server, compares tokenizers, sends the weights and compares
    log-probs. Later calls send the weights again when `vllm_sync_interval` optimizer steps have
    passed (evaluation always samples from the current policy).

    Args:
        settings: an `EBFTGRPOConfig` or `VLLMServerSettings`.
        client: the client of the server. Default: one made from the settings.

    Raises:
        ValueError: neither kind of sync is on.
    """

    def __init__(self, settings: VLLMServerArguments, client: VLLMClient | None = None) -> None:
        if not settings.samples_on_server:
            raise ValueError(
                "rollouts from a vLLM server need vllm_lora_sync=True (PEFT) or "
                "vllm_full_sync=True, so that the server gets the policy's weights."
            )
        self.settings = settings
        self.client = VLLMClient(settings) if client is None else client
        self.following: deque[Following | None] = deque()
        self._metrics = RolloutMetrics()
        self._seeds = Seeds()
        self._policy: ServedPolicy | None = None
        self._pool: DaemonPool | None = None
        self._prefetched: Batch | None = None

    # ---- The rollout function ----------------------------------------------------------------

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """Sample one completion for each entry. All processes call this together.

        Args:
            prompts: prompts of this process, each repeated for its completions.
            trainer: TRL's trainer.

        Returns:
            `prompt_ids`, `completion_ids` and `logprobs`, one list per entry.

        Raises:
            VLLMServerError: on every process, if the batch cannot be completed.
        """
        started = time.monotonic()
        policy = self._start(trainer)
        training = trainer.model.training
        max_tokens = get_max_tokens(trainer)
        batch = self._take_prefetched(prompts, max_tokens) if training else None
        if batch is None:
            policy.send_if_due(trainer, fresh=not training)
            ids = tokenize_prompts(prompts, trainer)
            batch = self._request(policy, prompts, ids, max_tokens, trainer, training)
        completions = self._collect(policy, batch, trainer)
        if training:
            self._metrics.add("vllm/staleness", trainer.state.global_step - batch.step)
            self._prefetch(policy, trainer)
        self._metrics.add("vllm/rollout_seconds", time.monotonic() - started)
        return {
            "prompt_ids": batch.prompt_ids,
            "completion_ids": [completion.token_ids for completion in completions],
            "logprobs": [completion.log_probs for completion in completions],
        }

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], max_tokens: int, trainer: Any
    ) -> list[Completion]:
        """Sample a completion for each prompt of token ids; the weights are sent first if due.

        For rollouts of several turns. All processes call this together.

        Args:
            prompt_ids: token ids of each prompt.
            max_tokens: largest number of tokens of a completion.
            trainer: TRL's trainer.

        Raises:
            ValueError: `async_prefetch` is on; it cannot sample later turns in advance.
            VLLMServerError: on every process, if the batch cannot be completed.
        """
        if self.settings.async_prefetch:
            raise ValueError(
                "async_prefetch=True samples whole completions ahead, and what later turns follow "
                "is not known then; leave it off for rollouts of several turns."
            )
        policy = self._start(trainer)
        training = trainer.model.training
        policy.send_if_due(trainer, fresh=not training)
        ids = [list(prompt) for prompt in prompt_ids]
        batch = self._request(policy, ids, ids, max_tokens, trainer, training)
        return self._collect(policy, batch, trainer)

    def start_evaluation(self) -> None:
        """Sample the next rollouts with the seeds that are the same in every evaluation."""
        self._seeds.start_evaluation()

    def metrics(self) -> dict[str, float]:
        """Metrics since the last call.

        Returns:
            `vllm/...`: sums of counts (retries, restarts, discarded batches), and means of others
            (staleness in optimizer steps, seconds, nats).
        """
        return self._metrics.take()

    def close(self) -> None:
        """Unload adapters that were sent, and remove folders. The next call would start again."""
        if self._pool is not None:
            self._pool.close()
        if self._policy is not None:
            self._policy.close()
        self._pool = self._policy = self._prefetched = None
        atexit.unregister(self.close)

    # ---- Start -------------------------------------------------------------------------------

    def check(self, trainer: Any) -> None:
        """Raise for a trainer whose options or policy cannot work with a server.

        Raises:
            ValueError: naming the option, the reason and what to write instead.
        """
        check_trainer(trainer, self.settings)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        sync_kind(self.settings).check(policy, self.settings)

    def _start(self, trainer: Any) -> ServedPolicy:
        if self._policy is None:
            self.check(trainer)
            if isinstance(trainer, StalenessAware):
                trainer.server_rollouts = self
            self._pool = DaemonPool(self.settings.vllm_max_concurrent_requests)
            self._policy = ServedPolicy(
                self.client, self.settings, self._metrics, trainer.args.output_dir, self._settle
            )
            atexit.register(self.close)
        return self._policy

    def _settle(self) -> None:
        if self._prefetched is not None:
            self._prefetched.wait()

    # ---- Requests ----------------------------------------------------------------------------

    def _request(
        self,
        policy: ServedPolicy,
        prompts: list[Any],
        prompt_ids: list[list[int]],
        max_tokens: int,
        trainer: Any,
        training: bool,
    ) -> Batch:
        """Send the requests of one batch and return at once. All processes call this together."""
        longest = max((len(ids) for ids in prompt_ids), default=0)
        limit = policy.version.served.max_length
        too_long = None
        if limit is not None and longest + max_tokens > limit:
            too_long = ValueError(
                f"a prompt of {longest} tokens with a completion of {max_tokens} does not fit the "
                f"vLLM server's --max-model-len {limit}; raise that, shorten the prompts or lower "
                "max_completion_length."
            )
        raise_together(too_long)
        runs = find_runs(prompt_ids)
        samplings = [
            Sampling(max_tokens, trainer.temperature, tuple(trainer.eos_token_ids), seed)
            for seed in self._seeds.draw(len(runs), trainer, training)
        ]
        futures = [Future[list[Completion]]() for _ in runs]
        step = policy.version.step
        batch = Batch(prompts, prompt_ids, runs, samplings, futures, max_tokens, step)
        self._ask(policy, batch, range(len(runs)))
        return batch

    def _ask(self, policy: ServedPolicy, batch: Batch, indices: Iterable[int]) -> None:
        assert self._pool is not None
        for index in indices:
            batch.ask(index, self._pool, self.client, policy.version.name)

    def _collect(self, policy: ServedPolicy, batch: Batch, trainer: Any) -> list[Completion]:
        """Wait for a batch; requests that are lost with a server are sent again."""
        for attempt in range(RECOVERIES + 1):
            lost, failure = self._find_lost(policy, batch)
            anything_lost = any(gather_object([bool(lost)]))
            if attempt == RECOVERIES and failure is None and lost:
                cause = batch.futures[lost[0]].exception() or "it was restarted"
                failure = ServerUnavailable(
                    f"one batch lost the vLLM server at {self.client.url} {RECOVERIES + 1} times; "
                    f"the last time: {cause}"
                )
            raise_together(failure)
            if not anything_lost:
                break
            policy.send_again(trainer)
            self._ask(policy, batch, lost)
        self._metrics.add("vllm/retries", self.client.retries_done)
        self.client.retries_done = 0
        completions = batch.completions()
        policy.check_rollouts(batch.step, batch.prompt_ids, completions, trainer)
        return completions

    def _find_lost(self, policy: ServedPolicy, batch: Batch) -> tuple[list[int], Exception | None]:
        """The requests that must be sent again, and an error that a repetition cannot solve.

        All processes call this together.
        """
        lost = []
        failure: Exception | None = None
        for index, future in enumerate(batch.futures):
            error = future.exception()
            if isinstance(error, ServerGone):
                lost.append(index)
            elif error is not None:
                assert isinstance(error, Exception)
                failure = error
        if policy.lost_weights():
            lost = list(range(len(batch.futures)))
        return lost, failure

    # ---- Prefetching -------------------------------------------------------------------------

    def _prefetch(self, policy: ServedPolicy, trainer: Any) -> None:
        """Request the next batch, so that it is sampled while the current one trains."""
        following = self.following.popleft() if self.following else None
        # All processes send weights together; either all have a next batch, or none has.
        if following is None:
            return
        policy.send_if_due(trainer)
        ids = tokenize_prompts(following.prompts, trainer)
        self._prefetched = self._request(
            policy, following.prompts, ids, following.max_tokens, trainer, training=True
        )

    def _take_prefetched(self, prompts: list[Any], max_tokens: int) -> Batch | None:
        """The requests that were sent ahead for these prompts, if there are any."""
        if not self.settings.async_prefetch:
            return None
        batch, self._prefetched = self._prefetched, None
        fits = batch is not None and batch.prompts == prompts and batch.max_tokens == max_tokens
        if all(gather_object([fits])):
            return batch
        if batch is not None:
            batch.wait()
            self._metrics.add("vllm/prefetch_missed", 1.0)
            logger.warning(
                "the batch that was sampled ahead is not the one that is trained on; sampling again"
            )
        return None
