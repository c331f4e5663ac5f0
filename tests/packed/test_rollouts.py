"""Sampling, mechanically: the right prefixes, the right passes, nothing else touched.

That the distribution is right is tested in test_sampling.py.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, PreTrainedModel

from hf_ebft.packed.drawing import draw, uniform_numbers
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.sampling import Rollouts, make_generator, sample_rollouts
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from tests.support.tiny import tiny_causal_lm

VOCABULARY, LENGTH = 11, 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return tiny_causal_lm(LlamaConfig, vocabulary=VOCABULARY, seed=0, initializer_range=0.5)


def random_documents(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def make_layout(texts: list[Tensor], n: int = 2, **settings: int) -> PackedLayout:
    """One document a row, padded on the right."""
    batch = {
        "input_ids": nn.utils.rnn.pad_sequence(texts, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence(
            [torch.ones_like(text) for text in texts], batch_first=True
        ),
    }
    documents = Documents.from_inputs(batch)
    anchors = {"stride": 3, "context_length": 3, "generate_max_len": LENGTH} | settings
    blocks = find_blocks(documents, **anchors)
    return PackedLayout(documents, blocks, n, anchors["generate_max_len"])


def sample(
    model: PreTrainedModel, layout: PackedLayout, *, temperature: float = 1.0, seed: int = 0
) -> Rollouts:
    return sample_rollouts(
        model,
        PackedForward.for_model(model),
        layout,
        temperature=temperature,
        top_p=1.0,
        chunk_size=7,
        generator=make_generator(CPU, seed),
    )


@contextmanager
def forward_calls(model: PreTrainedModel) -> Iterator[list[dict[str, Any]]]:
    """Record the arguments of every forward pass of the model."""
    calls: list[dict[str, Any]] = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


# ---- Rollouts ------------------------------------------------------------------------------------


def test_cold_rollouts_are_greedy_continuations_of_their_prefixes(policy: PreTrainedModel) -> None:
    """At a temperature near zero, every rollout is what greedy decoding by plain forwards gives."""
    texts = random_documents(19, 11, 7)
    rollouts = sample(policy, make_layout(texts), temperature=1e-4)
    blocks = rollouts.layout.blocks
    assert blocks.exists.sum(dim=1).tolist() == [5, 2, 1]
    for b, k in blocks.exists.nonzero().tolist():
        text = texts[b][: int(blocks.position[b, k])]
        for _ in range(LENGTH):
            with torch.no_grad():
                logits = policy(input_ids=text[None], use_cache=False).logits
            text = torch.cat([text, logits[0, -1].argmax()[None]])
        for i in range(2):
            assert rollouts.tokens[b, i, k].tolist() == text[-LENGTH:].tolist()


def test_rollouts_have_the_promised_shape_and_type(policy: PreTrainedModel) -> None:
    layout = make_layout(random_documents(19, 11, 7), n=3)
    rollouts = sample(policy, layout)
    assert rollouts.tokens.shape == layout.rollout_shape == (3, 3, 5, LENGTH)
    assert rollouts.tokens.dtype == torch.int64
    assert rollouts.tokens.is_contiguous()
    assert not rollouts.tokens.requires_grad
    assert torch.equal(rollouts.exists, layout.blocks.exists)
    assert rollouts.layout is layout
    assert 0 <= int(rollouts.tokens.min()) <= int(rollouts.tokens.max()) < VOCABULARY


def test_one_token_rollouts_need_the_prefill_only(policy: PreTrainedModel) -> None:
    layout = make_layout(random_documents(9), generate_max_len=1)
    with forward_calls(policy) as calls:
        rollouts = sample(policy, layout)
    assert len(calls) == 1
    assert rollouts.tokens.shape == (1, 2, 2, 1)


@pytest.mark.parametrize("lengths", [(19, 11), (30,), (7,), (5, 2)], ids=str)
def test_number_of_forward_passes_does_not_depend_on_the_batch(
    policy: PreTrainedModel, lengths: tuple[int, ...]
) -> None:
    """G passes, with no block at all too: processes that share parameters must keep in step."""
    with forward_calls(policy) as calls:
        sample(policy, make_layout(random_documents(*lengths)))
    assert len(calls) == LENGTH


def test_each_pass_feeds_new_tokens_only(policy: PreTrainedModel) -> None:
    """The documents once, then one token of every rollout: everything else is in the cache."""
    texts = random_documents(19, 19)
    with forward_calls(policy) as calls:
        rollouts = sample(policy, make_layout(texts, n=3))
    assert calls[0]["input_ids"].shape == (2, 19)
    # The first tokens are predicted by prefix ends, which all samples share: 5 places of 19.
    assert calls[0]["logits_to_keep"].tolist() == [2, 5, 8, 11, 14]
    for step, call in enumerate(calls[1:]):
        fed = rollouts.layout.from_row(call["input_ids"].repeat_interleave(LENGTH, dim=1))
        assert torch.equal(fed[..., 0], rollouts.tokens[..., step])
        assert call["input_ids"].shape == (2, 3 * 5)


def test_batch_without_blocks_gives_one_rollout_that_does_not_exist(
    policy: PreTrainedModel,
) -> None:
    rollouts = sample(policy, make_layout(random_documents(5, 2)))
    assert rollouts.exists.tolist() == [[False], [False]]
    assert rollouts.tokens.shape == (2, 2, 1, LENGTH)


def test_other_tokens_keep_the_blocks(policy: PreTrainedModel) -> None:
    rollouts = sample(policy, make_layout(random_documents(19, 11)))
    other = rollouts.with_tokens(rollouts.tokens.flip(1))
    assert torch.equal(other.tokens, rollouts.tokens.flip(1))
    assert other.exists is rollouts.exists and other.layout is rollouts.layout
    for wrong in (rollouts.tokens[:, :1], rollouts.tokens.int()):
        with pytest.raises(ValueError, match=r"needs .* = \(2, 2, 5, 4\) of torch.int64"):
            rollouts.with_tokens(wrong)


# ---- What sampling must leave alone --------------------------------------------------------------


def test_every_module_keeps_its_own_mode(policy: PreTrainedModel) -> None:
    """A layer that the user keeps in evaluation mode inside a training model stays there."""
    policy.train()
    frozen = policy.model.layers[0]
    frozen.eval()
    before = [module.training for module in policy.modules()]
    seen: list[bool] = []
    hook = policy.model.layers[1].register_forward_hook(
        lambda module, _args, _output: seen.append(module.training or torch.is_grad_enabled())
    )
    try:
        sample(policy, make_layout(random_documents(11)))
        assert [module.training for module in policy.modules()] == before
    finally:
        hook.remove()
        policy.eval()
    assert seen == [False] * LENGTH
    assert torch.is_grad_enabled()


def test_modes_come_back_after_a_failure() -> None:
    broken = tiny_causal_lm(LlamaConfig, vocabulary=VOCABULARY, seed=0, initializer_range=0.5)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = torch.nan
    broken.train()
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        sample(broken, make_layout(random_documents(11)))
    assert all(module.training for module in broken.modules())
    assert torch.is_grad_enabled()


def test_weights_and_gradients_stay(policy: PreTrainedModel) -> None:
    before = [parameter.clone() for parameter in policy.parameters()]
    sample(policy, make_layout(random_documents(11)))
    for parameter, old in zip(policy.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None
        assert parameter.requires_grad


def test_documents_beyond_the_models_positions_are_refused() -> None:
    """Rollouts share the document's positions: only the document's own length counts."""
    model = tiny_causal_lm(
        GPT2Config, vocabulary=VOCABULARY, seed=0, initializer_range=0.5, max_position_embeddings=12
    )
    layout = make_layout(random_documents(12), n=4)
    assert layout.row_width > 12
    sample(model, layout)
    with pytest.raises(ValueError, match="13"):
        sample(model, make_layout(random_documents(13)))


# ---- Randomness ----------------------------------------------------------------------------------


def test_generators_are_a_function_of_their_numbers() -> None:
    first = torch.rand(4, generator=make_generator(CPU, 1, 2, 3))
    again = torch.rand(4, generator=make_generator(CPU, 1, 2, 3))
    assert torch.equal(first, again)


def test_neighbouring_seeds_steps_and_processes_draw_differently() -> None:
    """(seed, step, process) is not summed up: (0, 1) and (1, 0) are different streams."""
    streams = {
        tuple(torch.rand(4, generator=make_generator(CPU, *numbers)).tolist())
        for numbers in itertools.product(range(6), repeat=3)
    }
    assert len(streams) == 6**3


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 2**64 - 1])
def test_any_seed_makes_a_generator(seed: int) -> None:
    """transformers accepts seeds of any size."""
    ordinary = torch.rand(4, generator=make_generator(CPU, 0, 7))
    assert not torch.equal(torch.rand(4, generator=make_generator(CPU, seed, 7)), ordinary)


@pytest.mark.parametrize("each", [1, 3])
def test_draw_takes_tokens_of_each_distribution(each: int) -> None:
    certain = torch.tensor([2, 0, 1, 1, 1, 2])
    uniform = uniform_numbers((6, each), make_generator(CPU, 0))
    tokens = draw(nn.functional.one_hot(certain, 3).float(), uniform)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, certain[:, None].expand(-1, each))


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_draw_never_takes_a_token_without_probability(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At either end of what a generator may return."""
    monkeypatch.setattr(
        torch, "rand", lambda shape, **_: torch.full(shape, uniform, dtype=torch.float64)
    )
    probabilities = torch.tensor([[0.0, 0.3, 0.7, 0.0], [0.0, 1e-30, 1.0, 0.0]])
    found = draw(probabilities, uniform_numbers((2, 1), make_generator(CPU, 0)))[:, 0].tolist()
    assert found == ([1, 1] if uniform == 0.0 else [2, 2])


def test_draw_keeps_the_share_of_rare_tokens_late_in_a_large_vocabulary() -> None:
    """Sums in single precision would round 1e-9 away next to 1."""
    probabilities = torch.full((1, 50_000), 1e-9)
    probabilities[0, 0] = 1.0
    rare = float(probabilities[0, 1])
    total = 1.0 + 49_999 * rare
    for token in (1, 777, 49_999):
        uniform = (1.0 + (token - 0.5) * rare) / total
        assert int(draw(probabilities, torch.tensor([[uniform]], dtype=torch.float64))) == token


@pytest.mark.parametrize("vocabulary", [3, 10, 4096])
def test_draw_stays_in_the_vocabulary_where_probabilities_are_not_finite(vocabulary: int) -> None:
    """Sampling looks for NaN once, at its end; until then no index may be out of range."""
    for first in (0, vocabulary - 1):
        probabilities = torch.full((2, vocabulary), 1 / vocabulary)
        probabilities[1, first:] = torch.nan
        tokens = draw(probabilities, uniform_numbers((2, 5), make_generator(CPU, 0)))
        assert int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary


@pytest.mark.parametrize("step", range(LENGTH))
def test_sampling_refuses_what_is_not_finite_at_any_step(
    step: int, policy: PreTrainedModel
) -> None:
    layout, calls = make_layout(random_documents(11, 5)), itertools.count()

    def spoil(_module: nn.Module, _args: Any, output: Any) -> None:
        if next(calls) == step:
            output.last_hidden_state[0, :, 0] = torch.nan

    hook = policy.model.register_forward_hook(spoil)
    try:
        with pytest.raises(FloatingPointError, match="logits are not finite"):
            sample(policy, layout)
    finally:
        hook.remove()
