"""Log-probabilities of chosen tokens against a log-softmax, and what they keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_ebft.packed.token_log_probs import contexts_of_checkpoint, token_log_probs

VOCABULARY = 13


class CountedOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def logits_and_targets(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(7, VOCABULARY)).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (7, 3))
    targets[0] = 4  # the same target several times
    return logits, targets


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients_are_those_of_a_log_softmax(
    dtype: torch.dtype, temperature: float
) -> None:
    logits, targets = logits_and_targets(dtype)
    weights = torch.randn(targets.shape)
    found = token_log_probs(logits, targets, temperature)
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    assert gradient.dtype == dtype

    exact = logits.detach().double().requires_grad_()
    expected = (exact / temperature).log_softmax(dim=-1).gather(1, targets)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    # A gradient is rounded once, to the dtype of the logits.
    relative = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=relative, atol=1e-6)


def test_logits_are_kept_in_their_own_dtype_and_nothing_else_of_their_size() -> None:
    logits, targets = logits_and_targets(torch.bfloat16)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_log_probs(logits, targets, 0.6)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert len(large) == 1 and large[0].dtype == torch.bfloat16


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_checkpoint_computes_the_values_once(temperature: float) -> None:
    logits, targets = logits_and_targets()
    weights = torch.randn(targets.shape)
    (expected,) = torch.autograd.grad(
        (token_log_probs(logits, targets, temperature) * weights).sum(), logits
    )
    with CountedOperators() as operators:
        found = checkpoint(
            lambda given: token_log_probs(given * 1.0, targets, temperature),
            logits,
            use_reentrant=False,
            context_fn=contexts_of_checkpoint,
        )
        (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    assert operators.counts["_log_softmax"] == operators.counts["_softmax"] == 1
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    # Outside of a checkpoint the values are there again.
    assert bool((token_log_probs(logits, targets, temperature) < 0).all())


@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_second_derivatives_are_those_of_a_log_softmax(in_checkpoint: bool) -> None:
    logits, targets = logits_and_targets(torch.float64)
    direction = torch.randn_like(logits)

    def second_derivative(compute: Callable[[Tensor], Tensor]) -> Tensor:
        (gradient,) = torch.autograd.grad(compute(logits).pow(2).sum(), logits, create_graph=True)
        (found,) = torch.autograd.grad((gradient * direction).sum(), logits)
        return found

    def ours(given: Tensor) -> Tensor:
        return token_log_probs(given, targets, 0.6)

    def checkpointed(given: Tensor) -> Tensor:
        found: Tensor = checkpoint(
            ours, given, use_reentrant=False, context_fn=contexts_of_checkpoint
        )
        return found

    found = second_derivative(checkpointed if in_checkpoint else ours)
    expected = second_derivative(lambda given: (given / 0.6).log_softmax(-1).gather(1, targets))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
