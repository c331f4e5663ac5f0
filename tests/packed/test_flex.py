"""flex_attention over packed rows, forward and backward, against split attention and plain sums.

torch refuses a gradient of flex_attention on a CPU, since no fused kernel has one there. Its own
backward pass, written out, runs everywhere: with the refusal out of the way it is held against
other ways to the same gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from hf_ebft.packed.flex import FLEX, compiled, flex_attention_forward
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.masks import CHUNKED, FULL, SLIDING, SPLIT, MaskRecipe
from hf_ebft.packed.split_attention import split_attention
from tests.support.architectures import WINDOW, tiny_model
from tests.support.exactness import Case, packed_documents, ragged_batch, row_log_probs, sample

KINDS = (FULL, SLIDING, CHUNKED)
CASES = {
    "ragged": Case(ragged_batch(33, 21, 5), stride=6),
    "packed documents": Case(packed_documents([15, 9, 4], [20]), stride=4, context_length=1),
    "several tiles": Case(ragged_batch(190, 60), stride=8, generate_max_len=6, n_samples=4),
}


pytestmark = pytest.mark.usefixtures("flex_gradient_on_a_cpu")


def recipe(implementation: str) -> MaskRecipe:
    return MaskRecipe(
        implementation, KINDS, by_layer_type=True, window=WINDOW, chunk=5, dtype=torch.float32
    )


def attend(*tensors: Tensor, **options: Any) -> Tensor:
    module = nn.Identity()
    module.num_key_value_groups = 2  # which transformers' sdpa reads
    return flex_attention_forward(module, *tensors, **options)[0]


def inputs(case: Case) -> tuple[Any, list[Tensor], Tensor]:
    """The row of a case, queries (four heads), keys and values (two), and which queries exist."""
    part = case.layout().row_part
    rows, length = part.queries.slot.shape
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(rows, heads, length, 16, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    return part, tensors, (part.queries.document >= 0)[:, :, None, None]


def plain_attention(
    tensors: list[Tensor],
    dense: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax by its definition in double precision, (B, Q, heads, F)."""
    query, key, value = (tensor.double() for tensor in tensors)
    heads = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(heads, dim=1) for tensor in (key, value))
    scores = torch.einsum("bhqe,bhce->bhqc", query, key) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.exp() * dense
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[None, :, None, None]
    return torch.einsum("bhqc,bhcf->bqhf", weights / total, value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_split_attention(name: str, kind: str) -> None:
    part, tensors, exists = inputs(CASES[name])
    mask = recipe(FLEX).masks_for(part)[kind]
    assert isinstance(mask, BlockMask)
    found = attend(*tensors, mask, scaling=0.3)
    expected = split_attention(*tensors, recipe(SPLIT).plan(kind, part), 0.3)
    torch.testing.assert_close(found * exists, expected * exists, atol=2e-6, rtol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)) * exists
    gradients = [torch.autograd.grad(output, tensors, weights) for output in (found, expected)]
    for left, right in zip(*gradients, strict=True):
        assert right.abs().max() > 1
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["block mask", "dense"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_bounds_and_sinks_are_those_of_the_definition(
    form: str, softcap: float | None, with_sinks: bool
) -> None:
    part, tensors, exists = inputs(CASES["ragged"])
    dense = recipe("sdpa").build(part.queries, part.keys)[FULL]
    mask = recipe(FLEX).masks_for(part)[FULL] if form == "block mask" else dense
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True) if with_sinks else None
    inputs_ = [*tensors, *([] if sinks is None else [sinks])]
    found = attend(*tensors, mask, scaling=0.3, softcap=softcap, s_aux=sinks)
    expected = plain_attention(tensors, dense, 0.3, softcap, sinks).float()
    torch.testing.assert_close(found * exists, expected * exists, atol=2e-6, rtol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)) * exists
    gradients = [torch.autograd.grad(output, inputs_, weights) for output in (found, expected)]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-5)


def test_what_a_block_mask_cannot_carry_is_refused() -> None:
    part, tensors, _ = inputs(CASES["ragged"])
    mask = recipe(FLEX).masks_for(part)[FULL]
    with pytest.raises(ValueError, match=r"Identity uses dropout.*packed_attention='sdpa'"):
        attend(*tensors, mask, dropout=0.1)
    with pytest.raises(ValueError, match="uses position_bias"):
        attend(*tensors, mask, position_bias=torch.zeros(1))


def test_autocast_computes_in_its_own_dtype() -> None:
    part, tensors, _ = inputs(CASES["ragged"])
    mask = recipe(FLEX).masks_for(part)[FULL]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(*tensors, mask, scaling=0.3)
    expected = attend(*(tensor.bfloat16() for tensor in tensors), mask, scaling=0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize(
    ("architecture", "other"),
    # A bound on the scores, and sinks: what sdpa leaves out.
    [("llama", "sdpa"), ("gemma3_text", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")],
)
def test_gradients_of_a_model_are_those_with_a_dense_mask(
    architecture: str, other: str, checkpointing: bool | None
) -> None:
    model = tiny_model(architecture, limit=4096)
    layout = Case(ragged_batch(33, 21), stride=6).layout()
    gradients = []
    for attention in (other, "flex_attention"):
        forward = PackedForward.for_model(model, attention)
        if attention == other:
            rollouts, _ = sample(model, forward, layout)
        elif checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        model.train()
        model.zero_grad()
        found = row_log_probs(model, forward, rollouts)
        exists = rollouts.exists[:, None].expand(found.shape[:3])
        found[exists][..., 3].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 1
    torch.testing.assert_close(gradients[1], gradients[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("has_argument", [True, False])
def test_many_shapes_are_compiled_in_every_thread(
    has_argument: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward passes on a GPU run in another thread; torch below 2.13 has a global limit alone."""
    if not has_argument:
        compile: Callable[..., Any] = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda function, **options: compile(function, **options)
        )
    lengths: list[int] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        lengths.append(len(inputs[0]))
        return graph

    double = compiled(lambda numbers: 2 * numbers, backend=backend)

    def call() -> None:
        for length in range(2, 18):
            double(torch.ones(length))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert lengths == list(range(2, 18))
