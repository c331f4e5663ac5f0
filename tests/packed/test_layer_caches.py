"""Which layers may be handed their own part of a cache under the number 0, and that they get it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache

from hf_ebft.packed.layer_caches import NumberedModules, OneLayer, RowCache
from hf_ebft.packed.model_parts import decoder_layers
from tests.support.architectures import tiny_model
from tests.support.exactness import lora_model


class Attention(nn.Module):
    """As transformers' models write it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx = number

    def forward(self, states: Tensor, past_key_values: Cache | None = None) -> Any:
        if past_key_values is not None:
            return past_key_values.update(states, states, self.layer_idx)
        return states


class ScalesByNumber(Attention):
    def forward(self, states: Tensor, past_key_values: Cache | None = None) -> Any:
        return super().forward(states / (self.layer_idx + 1), past_key_values)


class NumberByName(Attention):
    def forward(self, states: Tensor, past_key_values: Cache | None = None) -> Any:
        return super().forward(states * getattr(self, "layer_idx"), past_key_values)  # noqa: B009


class AsksForLength(Attention):
    def forward(self, states: Tensor, past_key_values: Cache | None = None) -> Any:
        assert past_key_values is not None
        return super().forward(states[past_key_values.get_seq_length() :], past_key_values)


class LooksIntoLayers(Attention):
    def forward(self, states: Tensor, past_key_values: Any = None) -> Any:
        return past_key_values.layers[0].keys


class ComputesNumber(Attention):
    def forward(self, states: Tensor, past_key_values: Cache | None = None) -> Any:
        assert past_key_values is not None
        return past_key_values.update(states, states, self.layer_idx - 1)


class NumberInProperty(Attention):
    @property
    def scale(self) -> float:
        return 1.0 / (self.layer_idx + 1)


class Layer(nn.Module):
    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)


def test_a_layer_that_hands_its_number_to_the_cache_alone_has_one() -> None:
    assert NumberedModules(Layer(Attention(3))).number == 3


@pytest.mark.parametrize(
    "kind",
    [
        ScalesByNumber,
        NumberByName,
        AsksForLength,
        LooksIntoLayers,
        ComputesNumber,
        NumberInProperty,
    ],
)
def test_a_layer_that_does_more_with_number_or_cache_has_none(kind: type[Attention]) -> None:
    assert NumberedModules(Layer(kind(3))).number is None


def test_neither_has_one_with_several_numbers_without_any_or_without_source() -> None:
    assert NumberedModules(Layer(Attention(3), Attention(4))).number is None
    assert NumberedModules(Layer(nn.Linear(1, 1))).number is None
    names: dict[str, Any] = {"Attention": Attention}
    exec("class Made(Attention):\n    def forward(self, states): return states", names)
    assert NumberedModules(Layer(names["Made"](3))).number is None


@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), lambda: lora_model("llama")])
def test_the_number_is_back_afterwards(make: Callable[[], nn.Module]) -> None:
    layers = decoder_layers(make())
    for number, layer in enumerate(layers):
        numbered = NumberedModules(layer)
        attention: Any = layer.self_attn
        assert numbered.number == number
        with pytest.raises(KeyError), numbered.as_first():
            assert attention.layer_idx == 0
            raise KeyError
        assert attention.layer_idx == number


@pytest.mark.parametrize(
    "architecture",
    [
        "deepseek_v32",  # keeps an index of its keys in the cache
        "gemma4_text",  # keys and values of lower layers
        "gpt2",  # may take keys of an encoder
        "lfm2",  # convolutions with states
        "llama4_text",  # asks for the length
        "longcat_flash",  # two attentions a layer
        "minimax",  # decays by number
    ],
)
def test_models_that_do_more_are_found(architecture: str) -> None:
    layers = decoder_layers(tiny_model(architecture))
    assert None in [NumberedModules(layer).number for layer in layers]


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "gpt_neox", "llama", "qwen3"])
def test_those_that_do_not_are_found_too(architecture: str) -> None:
    layers = decoder_layers(tiny_model(architecture))
    assert [NumberedModules(layer).number for layer in layers] == list(range(len(layers)))


def test_a_layer_s_part_of_a_cache_is_that_of_the_whole() -> None:
    config = tiny_model("llama").config
    cache, expected = RowCache(config=config), RowCache(config=config)
    for number in (0, 2, 0):
        states = torch.randn(1, 2, 3, 4)
        with cache.of_layer(number, None) as own:
            found = own.update(states, -states, 0)
        for one, two in zip(found, expected.update(states, -states, number), strict=True):
            assert torch.equal(one, two)
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 0, 3, 0]


def test_it_has_nothing_else() -> None:
    """A layer that asks for it was judged wrongly, and must not get a wrong answer."""
    own = OneLayer(RowCache(config=tiny_model("llama").config).layers[0])
    with pytest.raises(AttributeError):
        own.get_seq_length()  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        len(own)  # type: ignore[arg-type]
