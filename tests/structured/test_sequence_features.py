"""Features of whole sequences, against plain forward passes over each sequence alone."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_ebft.structured.sequence_features import SequenceFeatureNetwork, TokenSequence
from tests.support.tiny import VOCABULARY, tiny_llama
from tests.support.tiny_structured import plain_feature

METHODS = ("last_token", "completion_mean", "mean_pooling", "concat")


def learned_positions():
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=4, n_head=2, initializer_range=0.4
    )
    return GPT2LMHeadModel(config)


def positions_from_mask():
    """OPT counts its positions from the attention mask."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        init_std=0.4,
    )
    return OPTForCausalLM(config)


MODELS = {
    "rotary": lambda: tiny_llama(num_hidden_layers=4),
    "learned": learned_positions,
    "from mask": positions_from_mask,
}


def sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())

    lengths = [(5, 3), (1, 1), (9, 12), (5, 3), (2, 20), (17, 1), (4, 7)]
    return [TokenSequence(ids(prompt), ids(completion)) for prompt, completion in lengths]


def network_of(model, **settings):
    values = {
        "feature_layers": (0.25, 0.5, 0.75),
        "embed_method": "last_token",
        "normalization": "per_layer",
        "batch_tokens": 40,
    }
    return SequenceFeatureNetwork(model, **(values | settings))


def oracle(model, given, **settings):
    return np.stack(
        [plain_feature(model, s.prompt_ids, s.completion_ids, **settings) for s in given]
    )


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("method", METHODS)
def test_feature_is_that_of_a_plain_forward_over_the_sequence_alone(make, method):
    torch.manual_seed(0)
    model = make().eval()
    given = sequences()
    found = network_of(model, embed_method=method).embed(given)
    np.testing.assert_allclose(found.numpy(), oracle(model, given, method=method), atol=2e-5)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("batch_tokens", [1, 24, 60, 10_000])
def test_size_of_a_pass_changes_nothing(batch_tokens):
    """Bounds memory only; a sequence longer than the bound is read alone."""
    model = tiny_llama(num_hidden_layers=4).eval()
    given = sequences()
    passes = []
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    found = network_of(model, batch_tokens=batch_tokens).embed(given)
    assert all(rows == 1 or rows * width <= batch_tokens for rows, width in passes)
    np.testing.assert_allclose(found.numpy(), oracle(model, given), atol=2e-5)


@pytest.mark.parametrize("normalization", ["per_layer", "joint"])
def test_normalisation_and_layers_are_those_of_strided_mode(normalization):
    model = tiny_llama(num_hidden_layers=4).eval()
    given, layers = sequences(), (0.0, 0.5, 1.0)
    network = network_of(model, normalization=normalization, feature_layers=layers)
    expected = oracle(model, given, normalization=normalization, layers=layers)
    np.testing.assert_allclose(network.embed(given).numpy(), expected, atol=2e-5)


def test_pass_ends_below_the_layers_and_the_head_that_nobody_reads():
    model = tiny_llama(num_hidden_layers=4)
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    network_of(model, batch_tokens=10_000).embed(sequences())
    assert ran == [0, 1, 2]


def test_equal_sequences_get_the_very_same_feature_and_are_read_once():
    """Whitening tells duplicates by their features, so rounding must not tell them apart."""
    model = tiny_llama()
    one, other = sequences()[2:4]
    rows = []
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    features = network_of(model, batch_tokens=1000).embed([one, other, one, one])
    assert sum(rows) == 2
    assert torch.equal(features[0], features[2])
    assert torch.equal(features[0], features[3])


def test_completion_mean_leaves_out_what_others_wrote():
    model = tiny_llama(num_hidden_layers=4).eval()
    whole = sequences()[2]
    marked = TokenSequence(whole.prompt_ids, whole.completion_ids, frozenset({1, 2, 7}))
    found = network_of(model, embed_method="completion_mean").embed([marked])[0]
    ids = whole.prompt_ids + whole.completion_ids
    start, by_policy = len(whole.prompt_ids), [0, 3, 4, 5, 6, 8, 9, 10, 11]
    each = [plain_feature(model, ids[: start + place + 1], ()) for place in by_policy]
    np.testing.assert_allclose(found.numpy(), np.mean(each, axis=0), atol=2e-5)


def test_shared_policy_is_read_as_its_base_and_left_as_it_was():
    base = tiny_llama(num_hidden_layers=4)
    reference = copy.deepcopy(base).eval()
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.train()
    given = sequences()
    found = network_of(adapted, shared=True).embed(given)
    np.testing.assert_allclose(found.numpy(), oracle(reference, given), atol=2e-5)
    assert adapted.training
    assert any(weight.requires_grad for weight in adapted.parameters())


def test_network_is_frozen_and_in_evaluation_mode():
    model = tiny_llama(attention_dropout=0.9)
    network_of(model)
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


def test_empty_completion_is_refused():
    with pytest.raises(ValueError, match="completion has no tokens"):
        network_of(tiny_llama()).embed([TokenSequence((1, 2), ())])


def test_features_that_are_not_finite_are_refused():
    model = tiny_llama()
    model.model.embed_tokens.weight.data[7] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        network_of(model).embed([TokenSequence((7, 2), (3,))])


def test_model_that_reads_in_both_directions_is_refused():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="not a causal language model"):
        network_of(model)
