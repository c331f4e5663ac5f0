"""phi's embeddings are those of plain forward passes, and no unneeded layer is computed."""

from __future__ import annotations

import copy
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.objective import feature_matching_rewards
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.packed.model_parts import backbone, decoder_layers
from hf_ebft.packed.sampling import Rollouts
from tests.support.architectures import LAYERS, tiny_model
from tests.support.exactness import (
    TOLERANCE,
    Case,
    lora_model,
    packed_documents,
    ragged_batch,
    row_log_probs,
    sample,
)
from tests.support.plain_forwards import plain_blocks, plain_pass
from tests.support.tiny import batch_of, texts, tiny_llama

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from memory import peak_bytes

CASE = Case(ragged_batch(33, 21, 5), stride=6, generate_max_len=5)
# More rollout tokens than any batch here has.
WHOLE = 10_000
SETTINGS: dict[str, Any] = {
    "feature_layers": (0.25, 0.5, 0.75),
    "embed_method": "last_token",
    "normalization": "per_layer",
}


def network(model: nn.Module, **settings: Any) -> FeatureNetwork:
    return FeatureNetwork(copy.deepcopy(model), **(SETTINGS | settings))


def rollouts_of(model: nn.Module, case: Case = CASE) -> Rollouts:
    return sample(model, PackedForward.for_model(model), case.layout())[0]


def token_feature(states: list[Tensor], normalization: str) -> Tensor:
    """Feature of one token from its hidden state in each feature layer."""
    if normalization == "per_layer":
        joined = torch.cat([state / state.norm() for state in states])
        return joined / len(states) ** 0.5
    joined = torch.cat(states)
    return joined / joined.norm()


def embedding(hidden: list[Tensor], layers: list[int], method: str, normalization: str) -> Tensor:
    """Embedding of one sample's G own tokens, from the definition of each pooling."""
    length = hidden[0].shape[0]
    tokens = [
        token_feature([hidden[layer][token] for layer in layers], normalization)
        for token in range(length)
    ]
    if method == "last_token":
        return tokens[-1]
    if method == "mean_pooling":
        return torch.stack(tokens).sum(0) / length
    return torch.cat([tokens[int(part * length)] for part in (0.25, 0.5, 0.75)]) / 3**0.5


@pytest.mark.parametrize("chunk_size", [WHOLE, 30])
@pytest.mark.parametrize("normalization", ["per_layer", "joint"])
@pytest.mark.parametrize("method", ["last_token", "mean_pooling", "concat"])
@pytest.mark.parametrize("fractions", [(0.25, 0.5, 0.75), (1.0,), (0.0, 0.99, 1.0), (0.5, 0.25)])
def test_embeddings_are_those_of_plain_forward_passes(
    normalization: str, method: str, fractions: tuple[float, ...], chunk_size: int
) -> None:
    model = tiny_model("mistral")
    rollouts = rollouts_of(model)
    phi = network(
        model,
        feature_layers=fractions,
        embed_method=method,
        normalization=normalization,
        chunk_size=chunk_size,
    )
    layers = [int(fraction * LAYERS) for fraction in fractions]
    found = phi.embed(rollouts)
    compared = 0
    for row, blocks in enumerate(plain_blocks(CASE.batch, **CASE.anchors)):
        for index, block in enumerate(blocks):
            own = torch.cat([rollouts.tokens[row, :, index], torch.tensor([block.window])])
            with torch.no_grad():
                hidden = plain_pass(model, block.prefix, own, hidden=True).hidden
            expected = torch.stack(
                [
                    embedding([state[i] for state in hidden], layers, method, normalization)
                    for i in range(len(own))
                ]
            )
            embedded = torch.cat([found.generated[row, :, index], found.ground_truth[row, [index]]])
            torch.testing.assert_close(embedded, expected, atol=TOLERANCE, rtol=0)
            compared += 1
    assert compared > 5
    assert found.reference_log_probs is None


@pytest.mark.parametrize("chunk_size", [WHOLE, 1])
@pytest.mark.parametrize("method", ["last_token", "mean_pooling", "concat"])
def test_one_pass_embeds_the_beginnings_of_rollouts(method: str, chunk_size: int) -> None:
    """As if rollouts and windows had been cut to each length and embedded on their own."""
    model = tiny_model("llama")
    phi = network(model, embed_method=method, chunk_size=chunk_size)
    rollouts = rollouts_of(model)
    together = phi.embed_beginnings(rollouts, (1, 3, 5))
    assert list(together) == [1, 3, 5]
    for length, found in together.items():
        cut = Rollouts(
            tokens=rollouts.tokens[..., :length].contiguous(),
            exists=rollouts.exists,
            layout=dataclasses.replace(rollouts.layout, length=length, cache={}),
        )
        alone = phi.embed(cut)
        torch.testing.assert_close(found.generated, alone.generated, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.ground_truth, alone.ground_truth, rtol=0, atol=1e-5)
        assert found.generated.any()


@pytest.mark.parametrize("lengths", [(), (0, 2), (3, 6)])
def test_beginnings_are_no_longer_than_the_rollouts(lengths: tuple[int, ...]) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="must lie between 1 and 5, the length of these rollouts"):
        network(model).embed_beginnings(rollouts_of(model), lengths)


def test_blocks_that_do_not_exist_have_zero_embeddings() -> None:
    model = tiny_model("llama")
    rollouts = rollouts_of(model)
    features = network(model).embed(rollouts)
    assert not rollouts.exists.all()
    assert (features.generated.transpose(1, 2)[~rollouts.exists] == 0).all()
    assert (features.ground_truth[~rollouts.exists] == 0).all()
    assert features.generated.dtype == features.ground_truth.dtype == torch.float32


def test_tokens_of_other_blocks_and_samples_do_not_matter() -> None:
    model = tiny_model("llama")
    rollouts = rollouts_of(model)
    phi = network(model)
    before = phi.embed(rollouts).generated
    changed = rollouts.tokens.clone()
    changed[0, 1, 2] = (changed[0, 1, 2] + 1) % 60
    other = Rollouts(changed, rollouts.exists, rollouts.layout)
    difference = (phi.embed(other).generated - before).abs().amax(dim=-1)
    assert difference[0, 1, 2] > 0.1
    difference[0, 1, 2] = 0
    assert difference.max() < TOLERANCE


def test_model_is_frozen_and_put_into_evaluation_mode() -> None:
    model = tiny_model("llama").train()
    phi = network(model)
    assert not isinstance(phi, nn.Module)
    assert not phi.model.training
    assert not any(parameter.requires_grad for parameter in phi.model.parameters())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


class Calls:
    """How often each layer and the head of a network run."""

    def __init__(self, phi: FeatureNetwork) -> None:
        self.layers = [0] * len(phi.layers)
        self.head = 0
        for index, layer in enumerate(phi.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self._layer(index))
        phi.model.get_output_embeddings().register_forward_pre_hook(lambda *_: self._head())

    def _layer(self, index: int) -> None:
        self.layers[index] += 1

    def _head(self) -> None:
        self.head += 1


@pytest.mark.parametrize(
    ("fractions", "ran"),
    [((0.25, 0.5, 0.75), [1, 1, 1, 0]), ((0.25,), [1, 0, 0, 0]), ((0.5, 1.0), [1, 1, 1, 1])],
)
def test_no_layer_above_the_highest_and_no_head_runs(
    fractions: tuple[float, ...], ran: list[int]
) -> None:
    model = tiny_model("llama")
    phi = network(model, feature_layers=fractions)
    calls = Calls(phi)
    rollouts = rollouts_of(model)
    phi.embed(rollouts)
    assert calls.layers == ran
    calls.layers = [0] * len(ran)
    phi.chunk_size = 1
    phi.embed(rollouts)
    # The documents, then each of the five blocks of the longest.
    assert calls.layers == [6 * count for count in ran]
    assert calls.head == 0


@pytest.mark.parametrize("length", [5, 1])
@pytest.mark.parametrize("chunk_size", [WHOLE, 30, 1])
def test_reference_log_probs_are_those_of_a_plain_packed_pass(chunk_size: int, length: int) -> None:
    model = tiny_model("gemma3_text")
    rollouts = rollouts_of(model, dataclasses.replace(CASE, generate_max_len=length))
    phi = network(model, chunk_size=chunk_size)
    score = partial(packed_log_probs, temperature=1.0, with_document=False, chunk_size=7)
    features = phi.embed(rollouts, score)
    assert features.reference_log_probs is not None
    with torch.no_grad():
        expected = row_log_probs(model, phi.forward, rollouts)
    expected = expected.gather(-1, rollouts.tokens[..., None])[..., 0]
    there = rollouts.exists[:, None].expand(expected.shape[:3])
    torch.testing.assert_close(
        features.reference_log_probs[there], expected[there], atol=TOLERANCE, rtol=0
    )
    torch.testing.assert_close(
        features.generated, phi.embed(rollouts).generated, atol=TOLERANCE, rtol=0
    )


def test_memory_does_not_grow_with_the_number_of_rollouts() -> None:
    model = tiny_llama(hidden_size=32, intermediate_size=1024, num_hidden_layers=4)

    def peak(n_samples: int, chunk_size: int) -> int:
        phi = network(model, chunk_size=chunk_size)
        rollouts = rollouts_of(model, Case(batch_of(texts(64)), n_samples=n_samples))
        phi.embed(rollouts)
        return peak_bytes(lambda: phi.embed(rollouts), torch.device("cpu"))

    assert peak(32, WHOLE) > 2.5 * peak(8, WHOLE)
    assert peak(32, 256) < 1.5 * peak(8, 256)
    assert peak(32, 256) < 0.25 * peak(32, WHOLE)


def test_block_masks_get_the_chunks_that_other_masks_get() -> None:
    model = tiny_model("llama")
    rollouts = rollouts_of(model)
    phi, split = (
        network(model, packed_attention=attention, chunk_size=1)
        for attention in ("flex_attention", "split")
    )
    calls, split_calls = Calls(phi), Calls(split)
    found, expected = phi.embed(rollouts), split.embed(rollouts)
    assert calls.layers == split_calls.layers and calls.layers[0] > 2
    torch.testing.assert_close(found.generated, expected.generated, atol=TOLERANCE, rtol=0)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_removed_even_after_an_error() -> None:
    model = tiny_model("llama")
    rollouts = rollouts_of(model)
    phi = network(model)
    before = hooks(phi.model)
    phi.embed(rollouts)
    assert hooks(phi.model) == before
    with pytest.raises(IndexError):
        phi.embed(Rollouts(rollouts.tokens + 1000, rollouts.exists, rollouts.layout))
    assert hooks(phi.model) == before


def test_no_graph_is_recorded() -> None:
    model = tiny_model("llama")
    phi = network(model)
    phi.model.requires_grad_(True)
    assert not phi.embed(rollouts_of(model)).generated.requires_grad


@pytest.mark.parametrize("chunk_size", [WHOLE, 1])
def test_shared_policy_runs_without_its_adapters_and_is_restored(chunk_size: int) -> None:
    policy = lora_model("llama").train()
    state = copy.deepcopy(policy.state_dict())
    rollouts = rollouts_of(policy)
    shared = FeatureNetwork(policy, **SETTINGS, shared=True, chunk_size=chunk_size)
    base = network(tiny_model("llama")).embed(rollouts)
    found = shared.embed(rollouts)
    torch.testing.assert_close(found.generated, base.generated, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.ground_truth, base.ground_truth, atol=TOLERANCE, rtol=0)
    # The adapters do change features, and are on again, in training mode, with their gradients.
    adapted = FeatureNetwork.from_policy(policy, **SETTINGS).embed(rollouts)
    assert (adapted.generated - base.generated).abs().max() > 0.1
    assert policy.training and policy.active_adapters == ["default"]
    assert all(p.requires_grad for name, p in policy.named_parameters() if "lora_" in name)
    torch.testing.assert_close(policy.state_dict(), state)
    again = FeatureNetwork.from_policy(policy, **SETTINGS).embed(rollouts)
    torch.testing.assert_close(again.generated, adapted.generated)


@pytest.mark.parametrize("architecture", ["gemma3", "git", "got_ocr2"])
def test_layers_of_a_vision_tower_are_not_mistaken_for_the_text_model_s(architecture: str) -> None:
    # The tower of the tiny model has as many layers as its text model, and comes first.
    model = tiny_model(architecture)
    embeddings = model.get_input_embeddings()
    assert any(inner is embeddings for inner in backbone(model).modules())
    seen: list[int] = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(input_ids=torch.arange(5, 12)[None])
    assert len(seen) == LAYERS


def test_backbone_is_found_where_base_model_is_the_model_itself() -> None:
    model = tiny_model("llama4_text", floor_scale=8192)
    assert model.base_model is model
    assert backbone(model) is model.model


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("gemma3n_text", "several hidden states per token"),
        ("mllama", "skips its cross-attention layers"),
        ("hrm_text", "no list of 6 layers"),
    ],
)
def test_models_without_one_hidden_state_per_layer_are_refused(
    architecture: str, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*another model as feature_network"):
        network(tiny_model(architecture))


def test_documents_too_long_for_the_network_are_refused() -> None:
    policy = tiny_model("llama")
    phi = network(tiny_model("gpt2", limit=24))
    with pytest.raises(ValueError, match=r"33 tokens.*no position embeddings beyond 24"):
        phi.embed(rollouts_of(policy))


def test_packed_documents_do_not_see_each_other() -> None:
    model = tiny_model("qwen3")
    phi = network(model)
    together = Case(packed_documents([14, 11]), stride=4, context_length=2)
    rollouts = rollouts_of(model, together)
    ids = together.batch["input_ids"].clone()
    ids[0, :14] = (ids[0, :14] + 1) % 60
    changed = Case(together.batch | {"input_ids": ids}, stride=4, context_length=2)
    other = Rollouts(rollouts.tokens, rollouts.exists, changed.layout())
    before, after = phi.embed(rollouts), phi.embed(other)
    second = rollouts.layout.blocks.document[0] == 1
    assert second.any() and not second.all()
    torch.testing.assert_close(
        after.generated[0][:, second], before.generated[0][:, second], atol=TOLERANCE, rtol=0
    )
    assert (after.generated[0][:, ~second] - before.generated[0][:, ~second]).abs().max() > 0.1


@pytest.mark.parametrize("chunk_size", [WHOLE, 1])
@pytest.mark.parametrize(("embed_method", "read"), [("last_token", 5), ("concat", 4)])
def test_equal_rollouts_have_equal_features_whatever_is_rounded(
    chunk_size: int, embed_method: str, read: int
) -> None:
    """In bfloat16 with eager attention equal rollouts came out 6e-4 apart, and counted as different
    ones: whitening gave them a diversity of 0 in place of 1/3.
    """
    model = tiny_llama(vocabulary=64)
    rollouts = rollouts_of(model)
    tokens = rollouts.tokens.clone()
    # Equal in all tokens that the pooling reads.
    tokens[:, 1, :, :read] = tokens[:, 0, :, :read]
    rollouts = dataclasses.replace(rollouts, tokens=tokens)
    noisy = network(model, chunk_size=chunk_size, embed_method=embed_method)
    for layer in noisy.layers:
        # As the rounding of a kernel, differently at every place of the row.
        layer.register_forward_hook(lambda _, __, out: out * (1 + 5e-4 * torch.randn(out.shape)))
    generated = noisy.embed(rollouts).generated
    assert torch.equal(generated[:, 0], generated[:, 1])
    exists = rollouts.exists
    truth = noisy.embed(rollouts).ground_truth
    rewards = feature_matching_rewards(generated, truth)
    # n = 2: 2/(n - 1) times a dot product of 1/2.
    torch.testing.assert_close(
        rewards.diversity.transpose(1, 2)[exists], torch.ones(int(exists.sum()), 2)
    )
