"""Log-probabilities against direct formulas and loops, and what their computation holds in memory.

Dimension letters: B rows, K blocks, n samples, G rollout tokens, P places whose states are kept,
V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from hf_ebft.packed.compiled_layers import CompileOptions
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.packed.sampling import Rollouts
from hf_ebft.packed.targets import KeptPlaces, target_log_probs
from hf_ebft.packed.token_log_probs import plain_token_log_probs
from hf_ebft.rows.layout import PackedLayout, PackedPart
from tests.support.tiny import ragged_layout

VOCABULARY = 11


def rollouts_of(layout: PackedLayout) -> Rollouts:
    tokens = torch.randint(VOCABULARY, layout.rollout_shape)
    return Rollouts(tokens=tokens, exists=layout.blocks.exists, layout=layout)


class FixedLogits:
    """In place of a model: the logits (B, R, V) of a whole row."""

    compiler = None

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def through_head(
        self,
        _model: Any,
        ids: Tensor,
        part: PackedPart,
        keep: Tensor,
        compute: Callable[..., Any],
        *,
        cache: Any,
    ) -> list[Tensor]:
        assert ids.shape == part.queries.slot.shape
        return compute(self.logits[:, part.queries.slot[0]][:, keep], lambda rows: rows)


@pytest.mark.parametrize("chunk_size", [5, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_document", [False, True])
def test_log_probs_are_entries_of_a_log_softmax(
    temperature: float, with_document: bool, chunk_size: int
) -> None:
    layout = ragged_layout()
    rollouts = rollouts_of(layout)
    row_logits = torch.randn(3, layout.row_width, VOCABULARY)
    actual = packed_log_probs(
        None,
        FixedLogits(row_logits),
        rollouts,
        temperature=temperature,
        with_document=with_document,
        chunk_size=chunk_size,
    )
    expected = (row_logits / temperature).log_softmax(dim=-1)
    for row, sample, block, step in torch.ones(layout.rollout_shape).nonzero().tolist():
        if not layout.blocks.exists[row, block]:
            continue
        place = layout.predictor[row, sample, block, step]
        token = rollouts.tokens[row, sample, block, step]
        torch.testing.assert_close(
            actual.rollout[row, sample, block, step], expected[row, place, token]
        )
    if not with_document:
        assert actual.document is None
        return
    assert actual.document is not None
    plain = row_logits.log_softmax(dim=-1)
    documents = layout.documents
    for row, column in torch.ones_like(documents.input_ids).nonzero().tolist():
        value = actual.document[row, column]
        if documents.document[row, column] < 0 or documents.position[row, column] == 0:
            assert value == 0
        else:
            token = documents.input_ids[row, column]
            torch.testing.assert_close(value, plain[row, column - 1, token])


def test_rollouts_of_one_token() -> None:
    layout = ragged_layout(length=1)
    rollouts = rollouts_of(layout)
    row_logits = torch.randn(3, layout.row_width, VOCABULARY)
    actual = packed_log_probs(
        None,
        FixedLogits(row_logits),
        rollouts,
        temperature=1.0,
        with_document=False,
        chunk_size=100,
    ).rollout
    place, rows = layout.predictor, torch.arange(3)[:, None, None, None]
    expected = row_logits.log_softmax(-1)[rows, place, rollouts.tokens]
    torch.testing.assert_close(actual, expected)


def test_only_predictors_are_kept() -> None:
    """The head runs at the places that predict something, and nowhere else."""
    layout = ragged_layout()
    exists = layout.blocks.exists[:, None, :, None].expand(layout.rollout_shape)
    predictors = set(layout.predictor[exists].tolist())
    kept = KeptPlaces.for_layout(layout, whole_document=False)
    assert predictors <= set(kept.places.tolist())
    # Blocks that a row does not have stand where those of the longest row do.
    assert set(kept.places.tolist()) <= predictors | {0} | set(layout.predictor.flatten().tolist())
    assert kept.places.tolist() == sorted(set(kept.places.tolist()))
    last_steps = layout.coordinates.slot[0, layout.document_width :].view(-1, layout.length)[:, -1]
    assert not set(last_steps.tolist()) & set(kept.places.tolist())
    assert torch.equal(kept.places[kept.index_of[kept.places]], kept.places)

    with_document = KeptPlaces.for_layout(layout, whole_document=True)
    assert with_document.places[: with_document.n_document].tolist() == list(range(13))


def states_and_head(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States (9, 6), a head (V, 6), 15 rows that use them, and two targets for each."""
    states, head = torch.randn(9, 6, dtype=dtype), torch.randn(VOCABULARY, 6, dtype=dtype)
    index, targets = torch.randint(9, (15,)), torch.randint(VOCABULARY, (15, 2))
    return states.requires_grad_(), head.requires_grad_(), index, targets


@pytest.mark.parametrize(
    ("chunk_size", "compiler"),
    [(1, None), (4, None), (7, None), (100, None), (4, CompileOptions("aot_eager"))],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_of_any_size_give_the_same_values_and_gradients(
    chunk_size: int, temperature: float, compiler: CompileOptions | None
) -> None:
    states, head, index, targets = states_and_head(torch.float64)
    weights = torch.randn(15, 2, dtype=torch.float64)
    logits = states[index] @ head.T / temperature
    expected = logits.gather(1, targets) - torch.logsumexp(logits, dim=-1, keepdim=True)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (states, head))
    actual = target_log_probs(
        states,
        index,
        targets,
        lambda rows: rows @ head.T,
        temperature=temperature,
        chunk_size=chunk_size,
        compiler=compiler,
    )
    gradients = torch.autograd.grad((actual * weights).sum(), (states, head))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_chunks_with_dropout_in_the_head_are_recomputed_with_the_same_dropout() -> None:
    """As in a head with adapters: the gradient must be that of the value that was returned."""
    states, head, index, targets = states_and_head()
    masks: list[Tensor] = []

    def to_logits(rows: Tensor) -> Tensor:
        masks.append(torch.nn.functional.dropout(torch.ones_like(rows)))
        return (rows * masks[-1]) @ head.T

    found = target_log_probs(states, index, targets, to_logits, temperature=1.0, chunk_size=5)
    first = list(masks)
    found.sum().backward()
    assert len(first) == 3 and len(masks) == 6
    again = sorted(mask.flatten().tolist() for mask in masks[3:])
    assert again == sorted(mask.flatten().tolist() for mask in first)


def saved_sizes(compute: Callable[[], Any]) -> list[int]:
    """Sizes of the tensors that the autograd graph of `compute()` keeps for backward."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sizes


def test_no_logits_are_kept_for_backward() -> None:
    """Nothing grows with rows times vocabulary, which a plain log_softmax keeps."""
    rows, vocabulary, chunk_size = 64, 4096, 8
    states = torch.randn(rows, 4, requires_grad=True)
    head = torch.randn(vocabulary, 4, requires_grad=True)
    index, targets = torch.arange(rows), torch.zeros(rows, 1, dtype=torch.long)

    def to_logits(kept: Tensor) -> Tensor:
        assert len(kept) <= chunk_size
        return kept @ head.T

    saved = saved_sizes(
        lambda: target_log_probs(
            states, index, targets, to_logits, temperature=0.7, chunk_size=chunk_size
        )
    )
    assert max(saved) <= head.numel() < chunk_size * vocabulary
    plain = saved_sizes(lambda: (states @ head.T).log_softmax(dim=-1))
    assert max(plain) >= rows * vocabulary


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits = (4 * torch.randn(12, 1000)).bfloat16()
    targets = torch.randint(1000, (12, 1))
    expected = (logits.double() / 0.7).log_softmax(dim=-1).gather(1, targets)
    actual = target_log_probs(
        logits, torch.arange(12), targets, lambda rows: rows, temperature=0.7, chunk_size=5
    )
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_chunks_make_no_matrix_of_zeros() -> None:
    """The gradient of an entry of a row, added into zeros as wide as the vocabulary, would be the
    slowest part of a chunk's backward pass."""
    logits, targets = torch.randn(8, 16, requires_grad=True), torch.randint(16, (8, 3))

    def backward(compute: Callable[..., Tensor]) -> None:
        compute(logits, targets, 0.7).sum().backward()

    for compute, adds in ((plain_token_log_probs, False), (_by_gather, True)):
        torch.compiler.reset()
        code = run_and_get_code(backward, torch.compile(compute, dynamic=False))[1]
        assert ("scatter_add" in code[-1]) == adds


def _by_gather(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(dim=-1).gather(1, targets)
