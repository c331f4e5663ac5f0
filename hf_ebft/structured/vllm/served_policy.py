"""Keeps the server's weights equal to the policy's: sends them, checks them, sends them again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor

from hf_ebft.structured.vllm.answers import Completion, ServedModel
from hf_ebft.structured.vllm.client import VLLMClient
from hf_ebft.structured.vllm.errors import ServerGone, ServerUnavailable, VLLMServerError
from hf_ebft.structured.vllm.handshake import (
    CHECKED_ROLLOUTS,
    CHECKED_TOKENS,
    Scored,
    check_tokenizer,
    check_vocabulary,
    choose_rollouts,
    choose_tolerance,
    probe_prompt,
    require_agreement,
    require_own_rollouts,
    require_same_server,
    sample_probe,
    score,
    weights_took_effect,
)
from hf_ebft.structured.vllm.metrics import RolloutMetrics
from hf_ebft.structured.vllm.processes import on_every_process, on_main_process
from hf_ebft.structured.vllm.settings import VLLMServerArguments
from hf_ebft.structured.vllm.sync import AdapterSync, FullWeightSync
from hf_ebft.structured.vllm.trainer_options import get_tokenizer, get_vocabulary_size

logger = logging.getLogger(__name__)

RECOVERIES = 3
"""Number of times that weights, or a batch, are sent again before a failing server ends the run."""


@dataclass(frozen=True)
class Version:
    """Weights that the server has.

    Attributes:
        name: their name on the server.
        step: their optimizer step.
        served: their base model.
        fingerprint: fingerprint of the trained weights of this process.
    """

    name: str
    step: int
    served: ServedModel
    fingerprint: list[float]


def sync_kind(settings: VLLMServerArguments) -> type[AdapterSync] | type[FullWeightSync]:
    """The kind of sync that the settings choose."""
    return AdapterSync if settings.vllm_lora_sync else FullWeightSync


def fingerprint(model: nn.Module) -> list[float]:
    """The sum of each trained tensor; of a sharded one, the sum of this process's shard."""
    tensors = [p.detach() for p in model.parameters() if p.requires_grad]
    shares = [one.to_local() if isinstance(one, DTensor) else one for one in tensors]
    sums = [share.sum(dtype=torch.float64) for share in shares]
    return torch.stack([one.cpu() for one in sums]).tolist() if sums else []


class ServedPolicy:
    """The policy's weights on one server. All processes call its methods together.

    Args:
        client: the client of the server.
        settings: when and how weights are sent.
        metrics: metrics, for differences and seconds.
        output_dir: the run's folder, for the default folder of weights.
        settle: waits for open requests, so that weights are not replaced while they are sampled.
    """

    def __init__(
        self,
        client: VLLMClient,
        settings: VLLMServerArguments,
        metrics: RolloutMetrics,
        output_dir: str | None,
        settle: Callable[[], None],
    ) -> None:
        self.client = client
        self._settings = settings
        self._metrics = metrics
        self._settle = settle
        self._kind = sync_kind(settings)
        self._sync = self._kind(client, settings, output_dir)
        self._served: ServedModel | None = None
        self._server_start: float | None = None
        self._version: Version | None = None
        self._probe_before: Scored | None = None
        self._scored_text: tuple[list[int], list[float]] = ([], [])

    @property
    def version(self) -> Version:
        """The version of the weights that were sent last."""
        assert self._version is not None
        return self._version

    def close(self) -> None:
        """Remove everything from the server and from the disk."""
        self._sync.close()

    # ---- Sending -----------------------------------------------------------------------------

    def send_if_due(self, trainer: Any, fresh: bool = False) -> None:
        """Send the policy's weights if the server's are too old, or if it has lost them.

        Args:
            trainer: TRL's trainer.
            fresh: whether the server needs the current weights, whatever `vllm_sync_interval` is.
        """
        step = trainer.state.global_step
        if self._version is None:
            self._send(trainer, "at the start")
            return
        age = step - self._version.step
        # The age is negative in a second `train()`, which counts steps from 0 again.
        due = age < 0 or age >= (1 if fresh else self._settings.vllm_sync_interval)
        if due or (age == 0 and self._policy_changed(trainer)):
            self._send(trainer, f"after step {step}")
        elif self.lost_weights():
            self.send_again(trainer)

    def _policy_changed(self, trainer: Any) -> bool:
        """Whether the policy's weights have changed since they were sent at the same step.

        This happens after `load_best_model_at_end`, or in the first step of a second `train()`.
        """
        changed = fingerprint(trainer.model) != self.version.fingerprint
        return any(gather_object([changed]))

    def send_again(self, trainer: Any) -> None:
        """Send the weights to a server that went away, once it is up again."""
        logger.warning(
            "the vLLM server at %s went away; sending the weights again", self.client.url
        )
        self._metrics.add("vllm/restarts", 1.0)
        self._version = None
        self._send(trainer, "after the server came back")

    def lost_weights(self) -> bool:
        """Whether the server has lost full weights.

        A restarted server answers under the base model's name, but with its original weights. (A
        lost adapter needs no check: the server refuses its name.)
        """

        def restarted_or_down() -> bool:
            try:
                return self.client.start_time() != self._server_start
            except ServerUnavailable:
                return True

        return self._settings.vllm_full_sync and on_main_process(restarted_or_down)

    def _send(self, trainer: Any, when: str) -> None:
        """Send the policy's weights and compare log-probs."""
        started = time.monotonic()
        self._settle()
        for attempt in range(RECOVERIES + 1):
            try:
                served, self._server_start = on_main_process(lambda: self._meet(trainer))
                self._served = served
                policy = trainer.accelerator.unwrap_model(trainer.model)
                name = self._sync.publish(
                    policy, trainer.accelerator, trainer.model_wrapped, served
                )
                self._shake_hands(name, trainer, served, when)
                break
            except ServerGone as error:
                if attempt == RECOVERIES:
                    raise
                logger.warning("the vLLM server went away while it got weights: %s", error)
        self._version = Version(name, trainer.state.global_step, served, fingerprint(trainer.model))
        self._metrics.add("vllm/sync_seconds", time.monotonic() - started)

    def _meet(self, trainer: Any) -> tuple[ServedModel, float | None]:
        """Wait for the server and check that it is the right one, on the main process.

        Returns:
            Its base model and its start time.
        """
        self.client.wait_until_ready()
        start = self.client.start_time()
        if self._served is not None and start is not None and start == self._server_start:
            return self._served, start
        served = self.client.base_model()
        check_tokenizer(self.client, served, get_tokenizer(trainer))
        self._kind.check_server(trainer.accelerator.unwrap_model(trainer.model), self.client)
        if self._served is None:
            self._sync.remove_leftovers()
        if self._settings.vllm_full_sync and start is None:
            raise VLLMServerError(
                f"the vLLM server at {self.client.url} does not say when it started "
                "(process_start_time_seconds in /metrics), so a restart, which would bring its old "
                "weights back, could not be seen. Start it with one API server process."
            )
        return served, start

    # ---- Checking ----------------------------------------------------------------------------

    def _shake_hands(self, name: str, trainer: Any, served: ServedModel, when: str) -> None:
        """Let the server answer the probe with the new weights, and check the answer."""
        model, temperature = trainer.model, trainer.temperature
        vocabulary = get_vocabulary_size(trainer)
        prompt = probe_prompt(get_tokenizer(trainer), vocabulary, served.max_length)
        completion = on_main_process(
            lambda: sample_probe(self.client, name, prompt, temperature),
        )
        check_vocabulary([completion], vocabulary)
        found = score(model, trainer.accelerator.device, prompt, completion, temperature)
        tolerance = self._tolerance(trainer)
        before = self._probe_before

        def judge() -> bool:
            what = f"handshake {when}"
            require_agreement(found, tolerance, temperature, what, self._settings.vllm_full_sync)
            return before is None or weights_took_effect(before, found, tolerance, what)

        # Each process has its own copy of the policy, and a single copy may differ.
        self._metrics.add("vllm/handshake_difference", max(gather_object([found.mean])))
        if on_every_process(judge):
            self._probe_before = found
        if self._settings.vllm_sync_interval > 1 or self._settings.async_prefetch:
            text = [*prompt, *completion.token_ids]
            scores = on_main_process(lambda: self.client.score(name, text))
            self._scored_text = text, scores

    def check_rollouts(
        self,
        step: int,
        prompt_ids: list[list[int]],
        completions: list[Completion],
        trainer: Any,
    ) -> None:
        """Check that a batch was sampled from the weights that were sent to the server.

        If these are the policy's current weights, some completions are compared with the policy.
        The policy of an earlier step is gone, so then the server's log-probs are compared with
        those at the time when it got the weights.

        Args:
            step: optimizer step of the weights that sampled.
            prompt_ids: tokens of each completion's prompt.
            completions: completions of this process.
            trainer: TRL's trainer.

        Raises:
            VLLMServerError: on every process, if those of any were sampled from other weights.
        """
        on_every_process(lambda: check_vocabulary(completions, get_vocabulary_size(trainer)))
        if step == trainer.state.global_step:
            self._compare_with_policy(prompt_ids, completions, trainer)
        else:
            tolerance = self._tolerance(trainer)
            on_main_process(lambda: self._compare_with_itself(tolerance))

    def _compare_with_itself(self, tolerance: float) -> None:
        text, before = self._scored_text
        try:
            now = self.client.score(self.version.name, text)
        except ServerGone:
            return  # the batch is complete; the next request notices the loss
        require_same_server(before, now, tolerance, self._settings.vllm_full_sync)

    def _compare_with_policy(
        self, prompt_ids: list[list[int]], completions: list[Completion], trainer: Any
    ) -> None:
        # Equally many forward passes on each process: with sharded weights they are collective.
        limit = min(gather_object([min(CHECKED_ROLLOUTS, len(completions))]))
        if limit == 0:
            return
        device, temperature = trainer.accelerator.device, trainer.temperature
        found = Scored.joined(
            [
                score(
                    trainer.model,
                    device,
                    prompt_ids[index],
                    completions[index].beginning(CHECKED_TOKENS),
                    temperature,
                )
                for index in choose_rollouts(len(completions), limit)
            ]
        )
        tolerance = self._tolerance(trainer)
        self._metrics.add("vllm/rollout_difference", max(gather_object([found.mean])))
        on_every_process(
            lambda: require_own_rollouts(found, tolerance, self._settings.vllm_full_sync)
        )

    def _tolerance(self, trainer: Any) -> float:
        args, settings = trainer.args, self._settings
        return choose_tolerance(
            trainer.model,
            args.bf16,
            args.fp16,
            settings.vllm_dtype,
            settings.vllm_handshake_tolerance,
        )
