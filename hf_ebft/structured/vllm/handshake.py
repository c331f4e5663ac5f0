"""Makes sure that the server samples from the policy: same tokenizer, same log-probs.

One probe after every start, sync and restart catches what would otherwise be silent: another base
model, an adapter that was not applied or applied with another scale, stale caches, raw log-probs.

Dimension letters: P tokens of the probe's prompt, T sampled tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_ebft.packed.forward import evaluation_mode
from hf_ebft.structured.vllm.client import (
    Completion,
    Sampling,
    ServedModel,
    VLLMClient,
    VLLMServerError,
)

PROBE_PROMPT_TOKENS = 192
"""More than one block of any prefix cache (128 tokens on CPUs), so that a stale one shows."""
PROBE_TOKENS = 16
PROBE_SEED = 20260312
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest mean difference of log-probs by the coarser precision, in nats. Seen on small models on a
CPU: below 1e-6 in float32, 0.012 to 0.027 in bfloat16; faults were tenths of nats or more."""

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
                f"another tokenizer than the policy's: it reads {text[:40]!r}... as "
                f"{theirs[:12]}, the policy's as {list(ours)[:12]}. Serve the model that is "
                "trained, with the tokenizer that it is trained with (--tokenizer)."
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
class Comparison:
    """How far the server's log-probs of the probe are from the policy's, in nats a token.

    Attributes:
        mean: mean absolute difference.
        largest: largest absolute difference.
        raw_mean: the mean difference if the server's were at temperature 1.
    """

    mean: float
    largest: float
    raw_mean: float


def compare(
    model: nn.Module,
    device: torch.device,
    prompt: Sequence[int],
    completion: Completion,
    temperature: float,
) -> Comparison:
    """Score the server's completion by the policy. All processes must call this together.

    Args:
        model: the policy, as the trainer runs it without gradient.
        device: where it is.
        prompt: (P) token ids.
        completion: T tokens with the server's log-probs.
        temperature: at which they were sampled.
    """
    logits = probe_logits(model, device, [*prompt, *completion.token_ids], len(prompt))
    tokens = torch.tensor(completion.token_ids, device=logits.device)
    theirs = torch.tensor(completion.log_probs, dtype=torch.float64)

    def differences(at: float) -> Tensor:
        log_probs = (logits / at).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        return (log_probs.double().cpu() - theirs).abs()

    found = differences(temperature)
    return Comparison(found.mean().item(), found.max().item(), differences(1.0).mean().item())


def probe_logits(
    model: nn.Module, device: torch.device, tokens: Sequence[int], prompt_length: int
) -> Tensor:
    """Logits (T, V) in float32 of the tokens after the prompt."""
    ids = torch.tensor([list(tokens)], device=device)
    with evaluation_mode(model):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, prompt_length - 1 : -1].float()


def require_agreement(
    found: Comparison, tolerance: float, temperature: float, what: str, full_weights: bool
) -> None:
    """Raise unless the server samples from the policy.

    Raises:
        VLLMServerError: the difference, and what it may come from.
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
        f"nats a token (at most {found.largest:.3g}), more than {tolerance:g}, so it samples from "
        f"another model. Likely causes: {'; '.join(causes)}. If the difference is rounding that "
        "you accept, set vllm_handshake_tolerance above it."
    )


def tolerance_for(
    model: nn.Module, bf16: bool, fp16: bool, dtype: str, given: float | None
) -> float:
    """Largest difference that precision explains.

    Args:
        model: the policy.
        bf16: whether it trains in bfloat16 mixed precision.
        fp16: whether it trains in float16 mixed precision.
        dtype: ``vllm_dtype``.
        given: ``vllm_handshake_tolerance``; wins.
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
    # Float8 and the like: no tighter than the coarsest that is known.
    return max(TOLERANCES.get(precision, TOLERANCES[torch.bfloat16]) for precision in precisions)
