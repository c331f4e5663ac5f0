"""Checks that the server samples from the policy: with the same tokenizer and the same log-probs.

After every start, sync and restart, the server continues a fixed text (the probe) and the log-probs
are compared. This detects faults that would otherwise be silent: another base model, an adapter
that was not applied or applied with another scale, stale caches, raw log-probs. Rollouts from the
policy's current weights are compared, too: another run may have replaced the weights on the server
after the probe.

Dimension letters: P tokens of the probe's prompt, T sampled tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_ebft.packed.forward import evaluation_mode
from hf_ebft.packed.model_parts import bare_model
from hf_ebft.structured.vllm.answers import Completion, ServedModel
from hf_ebft.structured.vllm.client import Sampling, VLLMClient
from hf_ebft.structured.vllm.errors import VLLMServerError
from hf_ebft.structured.vllm.settings import SERVE_COMMAND

PROBE_PROMPT_TOKENS = 192
"""More than one block of any prefix cache (128 tokens on CPUs), so that a stale one is noticed."""
PROBE_TOKENS = 16
PROBE_SEED = 20260312
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest mean difference of log-probs by the coarser precision, in nats. On small models on a CPU,
differences were below 1e-6 in float32, 0.012 to 0.027 in bfloat16; faults gave tenths or more."""

LEAST_MOVE = 0.1
"""A server is expected to follow a policy that moved by more than this share of the tolerance..."""
MOVE_IN_ROUNDINGS = 3.0
"""...and by more than this many times what rounding alone made. (The difference of two roundings is
1.4 times one of them, and the mean of 16 tokens varies by a fifth.)"""
LEAST_SHARE = 0.25
"""A server that follows makes the whole move; one that makes less than this share does not."""
CHECKED_ROLLOUTS = 4
CHECKED_TOKENS = 64
"""How many completions of a fresh batch every process compares, and how many tokens of each."""

TOKENIZER_PROBES = (
    "def add(first, second):\n    return first + second  # done\n",
    "Übersetze: Größe, naïve café — “quotes”, 你好, привет, 🙂.\n\n\t  12,345.678",
    " leading space, CamelCase_snake_case, <b>tag</b> https://example.org/?q=1&r=2",
)


def check_tokenizer(client: VLLMClient, served: ServedModel, tokenizer: Any) -> None:
    """Compare the server's tokenizer with the trainer's on a few texts.

    Raises:
        VLLMServerError: they differ.
    """
    probes = [*TOKENIZER_PROBES, " ".join(tokenizer.all_special_tokens)]
    for text in probes:
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = client.tokenize(served.name, text)
        if list(ours) != list(theirs):
            raise VLLMServerError(
                f"the vLLM server at {client.url} serves {served.name} from {served.path} with "
                f"another tokenizer than the policy's: it encodes {text[:40]!r}... as "
                f"{theirs[:12]}, the policy's as {list(ours)[:12]}. Serve the model that is "
                "trained, with the tokenizer of the training (--tokenizer)."
            )


def probe_prompt(tokenizer: Any, vocabulary: int, max_length: int | None) -> list[int]:
    """Token ids (P) that are always the same, none of them special.

    Args:
        tokenizer: of the policy.
        vocabulary: rows of the policy's embedding.
        max_length: most tokens that the server takes, if it says.
    """
    length = PROBE_PROMPT_TOKENS
    if max_length is not None:
        length = min(length, max_length - PROBE_TOKENS)
    if length < 1:
        raise VLLMServerError(
            f"the vLLM server takes {max_length} tokens at most, too few to sample anything; "
            "start it with a larger --max-model-len."
        )
    special = set(tokenizer.all_special_ids)
    usable = [i for i in range(min(vocabulary, len(tokenizer))) if i not in special]
    generator = torch.Generator().manual_seed(PROBE_SEED)
    picks = torch.randint(len(usable), (length,), generator=generator)
    return [usable[pick] for pick in picks.tolist()]


def sample_probe(
    client: VLLMClient, model: str, prompt: Sequence[int], temperature: float
) -> Completion:
    """Let the server continue the probe's prompt by T tokens."""
    sampling = Sampling(
        max_tokens=PROBE_TOKENS, temperature=temperature, seed=PROBE_SEED, ignore_stop=True
    )
    return client.complete(model, prompt, 1, sampling)[0]


@dataclass(frozen=True)
class Scored:
    """Tokens that the server sampled, scored by the server and by the policy, in nats.

    Attributes:
        tokens: T token ids.
        server: (T) float64, the server's log-probs.
        policy: (T) float64, the policy's at the sampling temperature.
        policy_raw: (T) float64, the policy's at temperature 1.
    """

    tokens: list[int]
    server: Tensor
    policy: Tensor
    policy_raw: Tensor

    @property
    def mean(self) -> float:
        """Mean absolute difference over the tokens."""
        return (self.policy - self.server).abs().mean().item()

    @property
    def largest(self) -> float:
        """Largest absolute difference over the tokens."""
        return (self.policy - self.server).abs().max().item()

    @property
    def raw_mean(self) -> float:
        """The mean difference if the server's log-probs were at temperature 1."""
        return (self.policy_raw - self.server).abs().mean().item()

    @staticmethod
    def joined(parts: Sequence[Scored]) -> Scored:
        """The tokens of several parts together."""
        return Scored(
            [token for part in parts for token in part.tokens],
            torch.cat([part.server for part in parts]),
            torch.cat([part.policy for part in parts]),
            torch.cat([part.policy_raw for part in parts]),
        )


def score(
    model: nn.Module,
    device: torch.device,
    prompt: Sequence[int],
    completion: Completion,
    temperature: float,
) -> Scored:
    """Score the server's completion with the policy. All processes must call this together.

    Args:
        model: the policy, as the trainer runs it without gradient.
        device: the policy's device.
        prompt: (P) token ids.
        completion: T tokens with the server's log-probs.
        temperature: the temperature at which they were sampled.
    """
    logits_TV = completion_logits(model, device, prompt, completion.token_ids)
    tokens_T = torch.tensor(completion.token_ids, device=logits_TV.device)

    def log_probs(at: float) -> Tensor:
        chosen_T = (logits_TV / at).log_softmax(-1).gather(-1, tokens_T[:, None])[:, 0]
        return chosen_T.double().cpu()

    server_T = torch.tensor(completion.log_probs, dtype=torch.float64)
    return Scored(completion.token_ids, server_T, log_probs(temperature), log_probs(1.0))


def completion_logits(
    model: nn.Module, device: torch.device, prompt: Sequence[int], tokens: Sequence[int]
) -> Tensor:
    """Logits (T, V) in float32 of the T tokens after the prompt."""
    ids = torch.tensor([[*prompt, *tokens]], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    places_T = torch.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1, device=device)
    with evaluation_mode(model):
        if "logits_to_keep" in inspect.signature(bare_model(model).forward).parameters:
            logits_TV = model(**inputs, logits_to_keep=places_T).logits[0]
        else:
            logits_TV = model(**inputs).logits[0, places_T]
    return logits_TV.float()


# ---- Judging what was scored ---------------------------------------------------------------------


def require_agreement(
    found: Scored, tolerance: float, temperature: float, what: str, full_weights: bool
) -> None:
    """Raise unless the server samples from the policy.

    Raises:
        VLLMServerError: naming the difference and its likely causes.
    """
    if found.mean <= tolerance:
        return
    if temperature != 1.0 and found.raw_mean <= tolerance:
        raise VLLMServerError(
            f"{what}: the vLLM server returns log-probs before the temperature ({temperature:g}) "
            "is applied; start it with --logprobs-mode processed_logprobs."
        )
    causes = [
        "it serves other weights than the policy started from (another model, another checkpoint, "
        "a quantized one)",
        "it computes in a coarser precision than vllm_dtype says",
    ]
    if full_weights:
        causes.append(
            "its head is tied to its embeddings and it runs on a CPU, where a reload "
            "keeps the old head: serve an untied copy"
        )
    else:
        causes.append("it does not apply the adapter, or not to every layer that is trained")
    raise VLLMServerError(
        f"{what}: the log-probs of the vLLM server and of the policy differ by {found.mean:.3g} "
        f"nats per token (at most {found.largest:.3g}), more than {tolerance:g}, so it samples "
        f"from another model. Likely causes: {'; '.join(causes)}. If the difference is rounding "
        "that you accept, set vllm_handshake_tolerance above it."
    )


def weights_took_effect(before: Scored, now: Scored, tolerance: float, what: str) -> bool:
    """Whether the server's log-probs changed with the policy's after new weights were sent.

    In bfloat16 the policy may change a lot before its distance to a server with old weights exceeds
    the tolerance. So the change of the policy's log-probs on the probe is compared with that of the
    server's: rounding is the same before and after, and a server that ignores the new weights does
    not change at all.

    Args:
        before: the probe as an earlier version answered it.
        now: the probe as the version just sent answers it.
        tolerance: the tolerance of `require_agreement`.
        what: what was done, for the message.

    Returns:
        True: the server has the new weights. False: the policy has not changed enough to tell.

    Raises:
        VLLMServerError: the policy changed but the server did not.
    """
    if now.tokens != before.tokens:
        return True  # other tokens from the same random numbers: other weights
    policy_move = (now.policy - before.policy).abs().mean().item()
    server_move = (now.server - before.server).abs().mean().item()
    if policy_move <= max(LEAST_MOVE * tolerance, MOVE_IN_ROUNDINGS * before.mean):
        return False
    if server_move >= LEAST_SHARE * policy_move:
        return True
    raise VLLMServerError(
        f"{what}: the new weights have no effect on the vLLM server. On a fixed text the policy's "
        f"log-probs changed by {policy_move:.3g} nats per token since an earlier version, the "
        f"server's by {server_move:.3g}. It loads the weights but does not use them: look into its "
        "log for names of layers that it ignores, and restart it with only the options that "
        f"{SERVE_COMMAND} gives it."
    )


def check_vocabulary(completions: Sequence[Completion], vocabulary: int) -> None:
    """Raise for sampled tokens that the policy has no embedding for.

    Raises:
        VLLMServerError: naming the token and the size of the policy's vocabulary.
    """
    highest = max((max(completion.token_ids) for completion in completions), default=0)
    if highest >= vocabulary:
        raise VLLMServerError(
            f"the vLLM server sampled token {highest}, but the policy has embeddings for tokens 0 "
            f"to {vocabulary - 1} only: the served model has a larger vocabulary. Serve the model "
            "that is trained, saved after any change of the size of its embeddings."
        )


def choose_rollouts(count: int, limit: int) -> list[int]:
    """Indices of the completions of a batch to check: the first, the last, and some between.

    Weights that are replaced during a batch stay replaced, so the last completion reveals it.
    """
    steps = max(1, limit - 1)
    return sorted(count - 1 - round(place * (count - 1) / steps) for place in range(limit))


def require_own_rollouts(found: Scored, tolerance: float, full_weights: bool) -> None:
    """Raise unless new rollouts were sampled from the policy's weights.

    The mean of few tokens varies more than that of the probe, so the tolerance is larger.

    Raises:
        VLLMServerError: naming the difference, and that the weights were replaced.
    """
    allowed = tolerance * max(1.0, math.sqrt(PROBE_TOKENS / len(found.tokens)))
    if found.mean <= allowed:
        return
    raise VLLMServerError(
        f"the vLLM server sampled this batch from other weights than the policy's: their "
        f"log-probs differ by {found.mean:.3g} nats per token (at most {found.largest:.3g}), "
        f"more than {allowed:.3g}, although they agreed on the probe when the weights were "
        f"sent. {_replaced(full_weights)}"
    )


def require_same_server(
    before: Sequence[float], now: Sequence[float], tolerance: float, full_weights: bool
) -> None:
    """Raise unless the server scores a text as it did when it got its weights.

    For stale rollouts the policy that sampled is gone, so the server is compared with itself.

    Args:
        before: log-probs of the text's tokens when the weights were sent.
        now: the log-probs after the batch.
        tolerance: the tolerance of `require_agreement`.
        full_weights: whether full weights are sent, as opposed to an adapter.

    Raises:
        VLLMServerError: naming the difference, and that the weights were replaced.
    """
    difference = sum(abs(a - b) for a, b in zip(before, now, strict=True)) / len(before)
    if not difference <= tolerance:
        raise VLLMServerError(
            f"the vLLM server has other weights than those sent to it: its log-probs of a fixed "
            f"text have changed by {difference:.3g} nats per token since then, more than "
            f"{tolerance:g}. {_replaced(full_weights)}"
        )


def _replaced(full_weights: bool) -> str:
    advice = (
        "only one run at a time can use vllm_full_sync with a server: give each a server of its own"
        if full_weights
        else "a run with vllm_full_sync changes the base model under all adapters: give it a "
        "server of its own"
    )
    return (
        f"Most likely another run has replaced the server's weights since; {advice}. If the "
        "difference is rounding that you accept, set vllm_handshake_tolerance above it."
    )


def choose_tolerance(
    model: nn.Module, bf16: bool, fp16: bool, dtype: str, given: float | None
) -> float:
    """The largest difference of log-probs that rounding explains.

    Args:
        model: the policy.
        bf16: whether it trains in bfloat16 mixed precision.
        fp16: whether it trains in float16 mixed precision.
        dtype: `vllm_dtype`.
        given: `vllm_handshake_tolerance`, which is returned if it is set.
    """
    if given is not None:
        return given
    precisions = {
        parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()
    }
    if bf16:
        precisions.add(torch.bfloat16)
    if fp16:
        precisions.add(torch.float16)
    if dtype != "auto":
        precisions.add(getattr(torch, dtype))
    # Unknown precisions (float8 and the like) get the largest known tolerance.
    return max(TOLERANCES.get(precision, TOLERANCES[torch.bfloat16]) for precision in precisions)
