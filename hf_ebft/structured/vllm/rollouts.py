"""Rollouts from a stock vLLM server, as a ``rollout_func`` for TRL's `GRPOTrainer`.

    trainer = GRPOTrainer(..., rollout_func=VLLMRollouts(VLLMServerSettings(vllm_lora_sync=True)))

Every process asks the server for its own prompts; the main process alone sends weights. A batch is
complete or the run stops: completions lost with a server that went away are sampled again.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import ProcessorMixin

from hf_ebft.structured.vllm.answers import Completion, ServedModel
from hf_ebft.structured.vllm.client import Sampling, VLLMClient
from hf_ebft.structured.vllm.errors import ServerGone, ServerUnavailable, VLLMServerError
from hf_ebft.structured.vllm.handshake import (
    CHECKED_ROLLOUTS,
    CHECKED_TOKENS,
    Scored,
    check_tokenizer,
    check_vocabulary,
    choose_rollouts,
    probe_prompt,
    require_agreement,
    require_own_rollouts,
    sample_probe,
    score,
    tolerance_for,
    weights_took_effect,
)
from hf_ebft.structured.vllm.prefetch import Following, StalenessAware
from hf_ebft.structured.vllm.processes import on_every_process, on_main_process, raise_together
from hf_ebft.structured.vllm.settings import VLLMServerArguments
from hf_ebft.structured.vllm.sync import AdapterSync, FullWeightSync, WeightSync
from hf_ebft.structured.vllm.workers import DaemonPool

logger = logging.getLogger(__name__)

RECOVERIES = 3
"""How often one batch may lose its server before the run stops."""
COUNTED = ("vllm/retries", "vllm/restarts", "vllm/prefetch_missed")
PLAIN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,),
    "top_k": (0,),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None, {}),
}
"""Options of TRL with the values that leave the softmax at the temperature whole."""


@dataclass
class Version:
    """Weights that the server has: the name to ask for, the optimizer step they are from."""

    name: str
    step: int


@dataclass
class Pending:
    """Requests under way for one batch of one process.

    Attributes:
        prompts: as the trainer has them.
        prompt_ids: their tokens, one list an entry.
        runs: (first entry, entries) of each request: neighbours with one prompt go together.
        samplings: one a request.
        futures: one a request.
        max_tokens: most tokens of a completion.
        step: of the weights they are sampled from.
    """

    prompts: list[Any]
    prompt_ids: list[list[int]]
    runs: list[tuple[int, int]]
    samplings: list[Sampling]
    futures: list[Future[list[Completion]]]
    max_tokens: int
    step: int


class VLLMRollouts:
    """A ``rollout_func(prompts, trainer)`` that samples from a stock vLLM server.

    Starts on its first call: waits for the server, compares tokenizers, sends the weights and
    compares log-probs. From then on it sends them whenever ``vllm_sync_interval`` optimizer steps
    have passed (evaluation always samples from the policy as it is).

    Args:
        settings: an `EBFTGRPOConfig` or `VLLMServerSettings`.
        client: to the server; default: one by the settings.

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
        self._figures: dict[str, list[float]] = {}
        self._sync: WeightSync | None = None
        self._served: ServedModel | None = None
        self._version: Version | None = None
        self._probe_before: Scored | None = None
        self._server_start: float | None = None
        self._pool: DaemonPool | None = None
        self._prefetched: Pending | None = None
        self._calls_at = -1
        self._calls = 0
        self._evaluation_calls = 0

    # ---- The rollout function ----------------------------------------------------------------

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """Sample one completion for each entry. All processes call this together.

        Args:
            prompts: of this process, repeated as often as completions are wanted of each.
            trainer: TRL's.

        Returns:
            ``prompt_ids``, ``completion_ids`` and ``logprobs``, one list an entry.

        Raises:
            VLLMServerError: on every process, if the batch cannot be completed.
        """
        started = time.monotonic()
        self._start(trainer)
        training = trainer.model.training
        max_tokens = max_tokens_of(trainer)
        pending = self._take_prefetched(prompts, max_tokens) if training else None
        if pending is None:
            self._sync_if_due(trainer, fresh=not training)
            ids = tokenize_prompts(prompts, trainer)
            pending = self._request(prompts, ids, max_tokens, trainer, training)
        completions = self._collect(pending, trainer)
        if training:
            self._note("vllm/staleness", trainer.state.global_step - pending.step)
            self._prefetch(trainer)
        self._note("vllm/rollout_seconds", time.monotonic() - started)
        return {
            "prompt_ids": pending.prompt_ids,
            "completion_ids": [completion.token_ids for completion in completions],
            "logprobs": [completion.log_probs for completion in completions],
        }

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], max_tokens: int, trainer: Any
    ) -> list[Completion]:
        """Sample a completion for each prompt of token ids, from weights that are sent if due.

        For rollouts of several turns. All processes call this together.

        Args:
            prompt_ids: token ids of each prompt.
            max_tokens: most tokens of a completion.
            trainer: TRL's.

        Raises:
            ValueError: ``async_prefetch`` is on, which cannot know the turns to come.
            VLLMServerError: on every process, if the batch cannot be completed.
        """
        if self.settings.async_prefetch:
            raise ValueError(
                "async_prefetch=True samples whole completions ahead, and what later turns follow "
                "is not known then; leave it off for rollouts of several turns."
            )
        self._start(trainer)
        training = trainer.model.training
        self._sync_if_due(trainer, fresh=not training)
        ids = [list(prompt) for prompt in prompt_ids]
        return self._collect(self._request(ids, ids, max_tokens, trainer, training), trainer)

    def start_evaluation(self) -> None:
        """The next rollouts for evaluation are the first of an evaluation: seeds start again."""
        self._evaluation_calls = 0

    def figures(self) -> dict[str, float]:
        """What happened since the last call, for the log.

        Returns:
            ``vllm/...``: sums of what is counted (retries, restarts, batches sampled in vain),
            means of the rest (staleness in optimizer steps, seconds, nats).
        """
        found = {
            name: sum(values) / (1 if name in COUNTED else len(values))
            for name, values in self._figures.items()
        }
        self._figures.clear()
        return found

    def close(self) -> None:
        """Unload what was sent, remove its folders. The next call would start afresh."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._sync is not None:
            self._sync.close()
        self._sync = None
        self._version = None
        self._probe_before = None
        self._prefetched = None
        atexit.unregister(self.close)

    # ---- Start -------------------------------------------------------------------------------

    def check(self, trainer: Any) -> None:
        """Refuse a trainer whose options or policy cannot work with a server.

        Raises:
            ValueError: naming the option, the reason and what to write instead.
        """
        check_trainer(trainer, self.settings)
        self._kind.check(trainer.accelerator.unwrap_model(trainer.model), self.settings)

    @property
    def _kind(self) -> type[AdapterSync] | type[FullWeightSync]:
        return AdapterSync if self.settings.vllm_lora_sync else FullWeightSync

    def _start(self, trainer: Any) -> None:
        if self._sync is not None:
            return
        self.check(trainer)
        if isinstance(trainer, StalenessAware):
            trainer.server_rollouts = self
        self._pool = DaemonPool(self.settings.vllm_max_concurrent_requests)
        self._sync = self._kind(self.client, self.settings, trainer.args.output_dir)
        atexit.register(self.close)

    def _meet(self, trainer: Any) -> tuple[ServedModel, float | None]:
        """Wait for the server and make sure that it is the right one, on the main process.

        Returns:
            Its base model, and when it started.
        """
        self.client.wait_until_ready()
        start = self.client.start_time()
        if self._served is not None and start is not None and start == self._server_start:
            return self._served, start
        served = self.client.base_model()
        check_tokenizer(self.client, served, tokenizer_of(trainer))
        self._kind.check_server(trainer.accelerator.unwrap_model(trainer.model), self.client)
        if self._served is None:
            assert self._sync is not None
            self._sync.remove_leftovers()
        if self.settings.vllm_full_sync and start is None:
            raise VLLMServerError(
                f"the vLLM server at {self.client.url} does not say when it started "
                "(process_start_time_seconds in /metrics), so a restart, which would bring its old "
                "weights back, could not be seen. Start it with one API server process."
            )
        return served, start

    # ---- Weights -----------------------------------------------------------------------------

    def _sync_if_due(self, trainer: Any, fresh: bool = False) -> None:
        """Send the weights if the server's are too old, or not those that were sent.

        Args:
            trainer: TRL's.
            fresh: any older weights are too old.
        """
        step = trainer.state.global_step
        if self._version is None:
            self._send_weights(trainer, "at the start")
            return
        age = step - self._version.step
        # A second `train()` starts to count again.
        if age < 0 or age >= (1 if fresh else self.settings.vllm_sync_interval):
            self._send_weights(trainer, f"after step {step}")
        elif self._server_forgot():
            self._recover(trainer)

    def _server_forgot(self) -> bool:
        """Whether the server lost full weights. All processes call this together.

        A restarted server answers under the base model's name, from the weights it started with.
        (It does not know the name of an adapter that it lost, which needs no asking.)
        """

        def restarted_or_down() -> bool:
            try:
                return self.client.start_time() != self._server_start
            except ServerUnavailable:
                return True

        return self.settings.vllm_full_sync and on_main_process(restarted_or_down)

    def _send_weights(self, trainer: Any, when: str) -> None:
        """Publish the policy and compare log-probs. All processes call this together."""
        started = time.monotonic()
        if self._prefetched is not None:
            # Requests under way must not see their weights exchanged.
            wait_for(self._prefetched.futures)
        for attempt in range(RECOVERIES + 1):
            try:
                self._served, self._server_start = on_main_process(lambda: self._meet(trainer))
                name = self._publish(trainer, self._served)
                self._handshake(name, trainer, self._served, when)
                break
            except ServerGone as error:
                if attempt == RECOVERIES:
                    raise
                logger.warning("the vLLM server went away while it got weights: %s", error)
        self._version = Version(name, trainer.state.global_step)
        self._note("vllm/sync_seconds", time.monotonic() - started)

    def _publish(self, trainer: Any, served: ServedModel) -> str:
        assert self._sync is not None
        accelerator = trainer.accelerator
        policy = accelerator.unwrap_model(trainer.model)
        return self._sync.publish(policy, accelerator, trainer.model_wrapped, served)

    def _handshake(self, name: str, trainer: Any, served: ServedModel, when: str) -> None:
        model, temperature = trainer.model, trainer.temperature
        vocabulary = vocabulary_of(trainer)
        prompt = probe_prompt(tokenizer_of(trainer), vocabulary, served.max_length)
        completion = on_main_process(
            lambda: sample_probe(self.client, name, prompt, temperature),
        )
        check_vocabulary([completion], vocabulary)
        found = score(model, trainer.accelerator.device, prompt, completion, temperature)
        tolerance = self._tolerance(trainer)
        before = self._probe_before

        def judge() -> bool:
            what = f"handshake {when}"
            require_agreement(found, tolerance, temperature, what, self.settings.vllm_full_sync)
            return before is None or weights_took_effect(before, found, tolerance, what)

        # Each process trains a policy of its own, and one alone may have gone astray.
        self._note("vllm/handshake_difference", max(gather_object([found.mean])))
        if on_every_process(judge):
            self._probe_before = found

    def _tolerance(self, trainer: Any) -> float:
        args, settings = trainer.args, self.settings
        return tolerance_for(
            trainer.model,
            args.bf16,
            args.fp16,
            settings.vllm_dtype,
            settings.vllm_handshake_tolerance,
        )

    def _check_rollouts(
        self, pending: Pending, completions: list[Completion], trainer: Any
    ) -> None:
        """Compare some rollouts with the policy, where it is the one that should have sampled them.

        Stale rollouts come from a policy that is gone. All processes call this together.
        """
        if pending.step != trainer.state.global_step:
            return
        # As many forward passes on each process: with sharded weights they are collective.
        limit = min(gather_object([min(CHECKED_ROLLOUTS, len(completions))]))
        if limit == 0:
            return
        device, temperature = trainer.accelerator.device, trainer.temperature
        found = Scored.joined(
            [
                score(
                    trainer.model,
                    device,
                    pending.prompt_ids[index],
                    completions[index].beginning(CHECKED_TOKENS),
                    temperature,
                )
                for index in choose_rollouts(len(completions), limit)
            ]
        )
        tolerance = self._tolerance(trainer)
        self._note("vllm/rollout_difference", max(gather_object([found.mean])))
        on_every_process(
            lambda: require_own_rollouts(found, tolerance, self.settings.vllm_full_sync)
        )

    def _recover(self, trainer: Any) -> None:
        """Give the weights to a server that was restarted, once it is up again."""
        logger.warning(
            "the vLLM server at %s went away; sending the weights again", self.client.url
        )
        self._note("vllm/restarts", 1.0)
        self._version = None
        self._send_weights(trainer, "after the server came back")

    # ---- Requests ----------------------------------------------------------------------------

    def _request(
        self,
        prompts: list[Any],
        prompt_ids: list[list[int]],
        max_tokens: int,
        trainer: Any,
        training: bool,
    ) -> Pending:
        """Send the requests of one batch and return at once. All processes call this together."""
        assert self._served is not None and self._version is not None
        longest = max((len(ids) for ids in prompt_ids), default=0)
        limit = self._served.max_length
        too_long = None
        if limit is not None and longest + max_tokens > limit:
            too_long = ValueError(
                f"a prompt of {longest} tokens with a completion of {max_tokens} does not fit the "
                f"vLLM server's --max-model-len {limit}; raise that, shorten the prompts or lower "
                "max_completion_length."
            )
        raise_together(too_long)
        runs = runs_of(prompt_ids)
        seeds = self._seeds(len(runs), trainer, training)
        samplings = [
            Sampling(max_tokens, trainer.temperature, tuple(trainer.eos_token_ids), seed)
            for seed in seeds
        ]
        step = self._version.step
        pending = Pending(prompts, prompt_ids, runs, samplings, [], max_tokens, step)
        pending.futures = [self._ask(pending, index) for index in range(len(runs))]
        return pending

    def _ask(self, pending: Pending, index: int) -> Future[list[Completion]]:
        assert self._pool is not None and self._version is not None
        first, count = pending.runs[index]
        return self._pool.submit(
            self.client.complete,
            self._version.name,
            pending.prompt_ids[first],
            count,
            pending.samplings[index],
        )

    def _seeds(self, count: int, trainer: Any, training: bool) -> list[int]:
        """Seeds that differ between requests, steps and processes, the same in every rerun.

        Evaluations have the same seeds whatever the step.
        """
        step = trainer.state.global_step if training else -1
        if training and self._calls_at != step:
            self._calls_at, self._calls = step, 0
        if not training:
            self._evaluation_calls += 1
        number = self._calls if training else self._evaluation_calls
        self._calls += training
        process = trainer.accelerator.process_index
        sequence = np.random.SeedSequence((trainer.args.seed, step + 1, number, process))
        return sequence.generate_state(count, np.uint32).tolist()

    def _collect(self, pending: Pending, trainer: Any) -> list[Completion]:
        """Wait for a batch; what a server that went away has lost is asked for again."""
        for attempt in range(RECOVERIES + 1):
            lost, failure = self._outcome(pending)
            anything_lost = any(gather_object([bool(lost)]))
            if attempt == RECOVERIES and failure is None and lost:
                cause = pending.futures[lost[0]].exception() or "it was restarted"
                failure = ServerUnavailable(
                    f"one batch lost the vLLM server at {self.client.url} {RECOVERIES + 1} times; "
                    f"the last time: {cause}"
                )
            raise_together(failure)
            if not anything_lost:
                break
            self._recover(trainer)
            for index in lost:
                pending.futures[index] = self._ask(pending, index)
        self._note("vllm/retries", self.client.retries_done)
        self.client.retries_done = 0
        completions = [completion for future in pending.futures for completion in future.result()]
        on_every_process(lambda: check_vocabulary(completions, vocabulary_of(trainer)))
        self._check_rollouts(pending, completions, trainer)
        return completions

    def _outcome(self, pending: Pending) -> tuple[list[int], Exception | None]:
        """Which requests must be sent again, and what cannot be helped.

        All processes call this together.
        """
        lost = []
        failure: Exception | None = None
        for index, future in enumerate(pending.futures):
            error = future.exception()
            if isinstance(error, ServerGone):
                lost.append(index)
            elif error is not None:
                assert isinstance(error, Exception)
                failure = error
        if self._server_forgot():
            lost = list(range(len(pending.futures)))
        return lost, failure

    # ---- Prefetching -------------------------------------------------------------------------

    def _prefetch(self, trainer: Any) -> None:
        """Have the next batch sampled while this one trains."""
        following = self.following.popleft() if self.following else None
        # Sending weights is for all processes together; each of them has a next batch, or none has.
        if following is None:
            return
        self._sync_if_due(trainer)
        ids = tokenize_prompts(following.prompts, trainer)
        self._prefetched = self._request(
            following.prompts, ids, following.max_tokens, trainer, training=True
        )

    def _take_prefetched(self, prompts: list[Any], max_tokens: int) -> Pending | None:
        """The requests that were sent ahead for these prompts, if there are any."""
        if not self.settings.async_prefetch:
            return None
        pending, self._prefetched = self._prefetched, None
        fits = (
            pending is not None and pending.prompts == prompts and pending.max_tokens == max_tokens
        )
        if all(gather_object([fits])):
            return pending
        if pending is not None:
            wait_for(pending.futures)
            self._note("vllm/prefetch_missed", 1.0)
            logger.warning(
                "the batch that was sampled ahead is not the one that is trained on; sampling again"
            )
        return None

    def _note(self, name: str, value: float) -> None:
        self._figures.setdefault(name, []).append(float(value))


# ---- What it needs to know of TRL's trainer ------------------------------------------------------


def check_trainer(trainer: Any, settings: VLLMServerArguments) -> None:
    """Refuse options that would make the server's distribution another than the one trained on.

    Raises:
        ValueError: naming the option, the reason and what to write instead.
    """
    args = trainer.args
    settings.validate_vllm_server(args.use_vllm)
    for name, plain in PLAIN_SAMPLING.items():
        value = getattr(args, name)
        if value not in plain:
            raise ValueError(
                f"{name}={value!r} makes the server sample from another distribution than the "
                "softmax that the policy's log-probs are of, and the importance ratio would be "
                f"wrong; leave it at {plain[0]!r}."
            )
    if trainer.tools:
        raise ValueError(
            "tools need several turns with TRL's own generation; rollouts from a stock vLLM server "
            "have one."
        )
    if settings.async_prefetch and not isinstance(trainer, StalenessAware):
        raise ValueError(
            f"async_prefetch=True needs a trainer that says which batch is next, and "
            f"{type(trainer).__name__} does not; use EBFTGRPOTrainer, or put StalenessCorrection "
            "before GRPOTrainer: class Trainer(StalenessCorrection, GRPOTrainer)."
        )
    if settings.vllm_sync_interval > 1 and not isinstance(trainer, StalenessAware):
        raise ValueError(
            f"vllm_sync_interval={settings.vllm_sync_interval} makes rollouts stale, and "
            f"{type(trainer).__name__} would take them as fresh: TRL reads the log-probs of a "
            "rollout_func only with use_vllm. Use EBFTGRPOTrainer, put StalenessCorrection before "
            "GRPOTrainer (class Trainer(StalenessCorrection, GRPOTrainer)), or set "
            "vllm_sync_interval=1."
        )


def max_tokens_of(trainer: Any) -> int:
    """Most tokens of a completion of the batch at hand."""
    if isinstance(trainer, StalenessAware):
        return trainer.rollout_budget()
    return trainer.max_completion_length


def tokenizer_of(trainer: Any) -> Any:
    """The tokenizer, taken out of a processor."""
    processing = trainer.processing_class
    return processing.tokenizer if isinstance(processing, ProcessorMixin) else processing


def vocabulary_of(trainer: Any) -> int:
    """Rows of the policy's embedding."""
    embedding = trainer.accelerator.unwrap_model(trainer.model).get_input_embeddings()
    if isinstance(embedding, BaseTunerLayer):  # an adapter around it
        embedding = embedding.get_base_layer()
    return embedding.num_embeddings


def tokenize_prompts(prompts: list[Any], trainer: Any) -> list[list[int]]:
    """Token ids of text prompts as they are, of chats by the trainer's chat template.

    Raises:
        ValueError: the prompts hold more than text.
    """
    if not prompts:
        return []
    processing = trainer.processing_class
    if isinstance(prompts[0], str):
        encoded = processing(text=prompts)
    else:
        encoded = processing.apply_chat_template(
            conversation=prompts,
            chat_template=trainer.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **trainer.chat_template_kwargs,
        )
    beyond = set(encoded) - {"input_ids", "attention_mask", "token_type_ids"}
    if beyond:
        raise ValueError(
            f"these prompts have {', '.join(sorted(beyond))} beside their tokens; rollouts from a "
            "stock vLLM server take text only."
        )
    return [list(ids) for ids in encoded["input_ids"]]


# ---- Small helpers -----------------------------------------------------------------------------


def runs_of(prompt_ids: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(first entry, entries) of each run of equal neighbours."""
    runs = []
    first = 0
    for _, group in itertools.groupby(prompt_ids):
        count = len(list(group))
        runs.append((first, count))
        first += count
    return runs


def wait_for(futures: Sequence[Future[Any]]) -> None:
    """Wait until all are done, whatever became of them."""
    for future in futures:
        future.exception()
