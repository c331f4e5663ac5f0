"""Block-parallel computation equals plain causal forward passes, on the architectures people train.

Every comparison is between the library (packed row, KV-cached sampler, feature network) and the
loops of `plain_forwards.py`, over the whole vocabulary, in float32. The same over every model
type that transformers has: `test_exactness_all.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hf_ebft.packed.deferred import TrainingPass, can_defer
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.sampling import Rollouts
from tests.support.architectures import VOCABULARY, tiny_model
from tests.support.exactness import (
    TOLERANCE,
    Case,
    lora_model,
    masked_labels,
    measure,
    packed_documents,
    ragged_batch,
    row_log_probs,
    sample,
)
from tests.support.plain_forwards import Batch, plain_blocks, plain_pass

# Rotary and learned positions; full, sliding, chunked and mixed attention; grouped queries,
# low-rank keys and values; dense and mixtures of experts; soft-capping, attention sinks.
ARCHITECTURES = (
    "deepseek_v3",
    "falcon",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "llama",
    "llama4_text",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
# Llama 4 tunes its attention temperature by the place in the row from floor_scale on.
OVERRIDES = {"llama4_text": {"floor_scale": 8192}}


# S - G - a_0 is divisible by the stride for some documents of a case and not for others; one
# document of the first case has no block at all.
CASES = {
    "ragged, stride above G": Case(ragged_batch(33, 21, 5), stride=6, generate_max_len=4),
    "left padded, stride below G": Case(
        masked_labels(ragged_batch(26, 19, left=True), slice(0, 9), slice(15, 18)),
        stride=2,
        context_length=2,
        generate_max_len=3,
        n_samples=1,
        min_completion_prefix=1,
    ),
    "packed documents": Case(
        packed_documents([15, 9, 4], [20]), stride=4, context_length=1, n_samples=3
    ),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param, **OVERRIDES.get(request.param, {}))


@pytest.mark.parametrize("name", CASES)
def test_every_way_equals_plain_forward_passes(model: nn.Module, name: str) -> None:
    assert can_defer(model, PackedForward.for_model(model))  # or gradients would not be compared
    found = measure(model, CASES[name])
    assert found.blocks > 4
    assert found.largest < TOLERANCE, found


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2", "mixtral"])
def test_eager_attention_is_exact_too(architecture: str) -> None:
    model = tiny_model(architecture, attention="eager")
    found = measure(model, CASES["ragged, stride above G"])
    assert PackedForward.for_model(model).recipe.implementation == "eager"
    assert found.largest < TOLERANCE, found


@pytest.mark.parametrize(
    ("stride", "context_length", "generate_max_len", "n_samples"),
    [(1, 4, 1, 1), (3, 2, 1, 8), (7, 5, 5, 3), (4, 4, 4, 8), (2, 1, 7, 2), (50, 3, 4, 2)],
)
def test_any_stride_context_length_and_number_of_samples(
    stride: int, context_length: int, generate_max_len: int, n_samples: int
) -> None:
    case = Case(ragged_batch(23, 17), stride, context_length, generate_max_len, n_samples=n_samples)
    found = measure(tiny_model("gemma3_text"), case)
    assert found.largest < TOLERANCE, found


def test_tolerance_is_far_below_what_a_wrong_mask_costs() -> None:
    model = tiny_model("mistral")
    assert measure(model, CASES["packed documents"]).training < TOLERANCE

    class Misread(PackedForward):
        """Takes the sliding window for full attention."""

        @classmethod
        def for_model(cls, model: nn.Module, packed_attention: str = "auto") -> PackedForward:
            forward = super().for_model(model, packed_attention)
            return replace(forward, recipe=replace(forward.recipe, window=None))

    layout = CASES["ragged, stride above G"].layout()
    rollouts, _ = sample(model, PackedForward.for_model(model), layout)
    with torch.no_grad():
        right = row_log_probs(model, PackedForward.for_model(model), rollouts)
        wrong = row_log_probs(model, Misread.for_model(model), rollouts)
    assert (right - wrong).abs().max() > 1


def test_documents_of_a_row_equal_documents_in_rows_of_their_own() -> None:
    model = tiny_model("qwen2")
    forward = PackedForward.for_model(model)
    together = Case(packed_documents([14, 11, 3]), stride=4, context_length=2)
    apart = replace(together, batch=_one_row_each(together.batch))
    layout, apart_layout = together.layout(), apart.layout()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, layout.rollout_shape, generator=generator)
    own_rows = torch.zeros(apart_layout.rollout_shape, dtype=torch.int64)
    row, block = apart_layout.blocks.exists.nonzero(as_tuple=True)
    own_rows[row, :, block] = tokens[0].transpose(0, 1)
    assert layout.blocks.exists.all()
    with torch.no_grad():
        packed = row_log_probs(model, forward, Rollouts(tokens, layout.blocks.exists, layout))
        separate = row_log_probs(
            model, forward, Rollouts(own_rows, apart_layout.blocks.exists, apart_layout)
        )
    torch.testing.assert_close(
        packed[0].transpose(0, 1), separate[row, :, block], atol=TOLERANCE, rtol=0
    )


def _one_row_each(batch: Batch) -> Batch:
    """The documents of a single packed row, one per right-padded row."""
    ids, document = batch["input_ids"][0], batch["document_ids"][0]
    rows = [ids[document == index] for index in document.unique()]
    mask = [torch.ones_like(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {"input_ids": pad(rows, True), "attention_mask": pad(mask, True)}


@pytest.mark.parametrize("whole_document", [False, True])
def test_places_kept_for_cross_entropy_do_not_change_the_rollouts(whole_document: bool) -> None:
    model = tiny_model("llama")
    forward, layout = PackedForward.for_model(model), CASES["packed documents"].layout()
    rollouts, sampled = sample(model, forward, layout)
    with torch.no_grad():
        trained = row_log_probs(model, forward, rollouts, whole_document=whole_document)
    exists = rollouts.exists[:, None].expand(trained.shape[:3])
    torch.testing.assert_close(trained[exists], sampled[exists], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("way", ["whole row", "checkpointing", "deferred"])
def test_gradient_equals_that_of_plain_forward_passes(architecture: str, way: str) -> None:
    model = tiny_model(architecture)
    case = CASES["ragged, stride above G"]
    forward, layout = PackedForward.for_model(model), case.layout()
    rollouts, _ = sample(model, forward, layout)
    weight = torch.randn(layout.rollout_shape, generator=torch.Generator().manual_seed(0))
    weight = weight * rollouts.exists[:, None, :, None]

    expected = _gradient(model, _plain_functional(model, case, rollouts, weight))
    if way == "checkpointing":
        # Newer releases of transformers call it activation checkpointing.
        new_name = hasattr(model, "activation_checkpointing_enable")
        name = "activation_checkpointing_enable" if new_name else "gradient_checkpointing_enable"
        getattr(model, name)()
    model.train()
    packed = TrainingPass(
        forward,
        temperature=1.0,
        with_document=False,
        chunk_size=7,
        training_chunk_size=12 if way == "deferred" else 10_000,
    ).log_probs(model, rollouts)
    found = _gradient(model, (weight * packed.rollout).sum())
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 0.1
    for name, gradient in expected.items():
        difference = float((found[name] - gradient).abs().max())
        assert difference < TOLERANCE * scale, (name, difference, scale)


def _plain_functional(model: nn.Module, case: Case, rollouts: Rollouts, weight: Tensor) -> Tensor:
    """Sum of weight * log p(token) over all rollouts, by plain forward passes."""
    total = torch.zeros(())
    for row, blocks in enumerate(plain_blocks(case.batch, **case.anchors)):
        for index, block in enumerate(blocks):
            own = rollouts.tokens[row, :, index]
            log_probs = plain_pass(model, block.prefix, own, hidden=False).log_probs
            chosen = log_probs.gather(-1, own[..., None]).squeeze(-1)
            total = total + (weight[row, :, index] * chosen).sum()
    return total


def _gradient(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_adapters_are_exact_too(architecture: str) -> None:
    adapted = lora_model(architecture)
    found = measure(adapted, CASES["ragged, stride above G"])
    assert found.largest < TOLERANCE, found
    # They do change the model; what is compared is not the base alone.
    ids = ragged_batch(9)["input_ids"]
    with torch.no_grad():
        on = adapted(ids).logits
        with adapted.disable_adapter():
            off = adapted(ids).logits
    assert (on - off).abs().max() > 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bfloat16_differs_by_its_rounding_alone(implementation: str) -> None:
    model = tiny_model("llama", attention=implementation).to(torch.bfloat16)
    found = measure(
        model, CASES["ragged, stride above G"], with_features=False, with_gradients=False
    )
    assert found.largest < 0.1, found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_autocast_differs_by_its_rounding_alone(architecture: str, implementation: str) -> None:
    model = tiny_model(architecture, attention=implementation)
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(
            model, CASES["ragged, stride above G"], with_features=False, with_gradients=False
        )
    assert found.largest < 0.1, found
