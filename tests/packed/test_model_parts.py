"""What the parts of a model are called in releases old and new."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.packed.compiled_layers import CompiledForward, CompileOptions
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.model_parts import cache_argument, decoder_layers
from tests.support.architectures import LAYERS, MODEL_TYPES, tiny_model
from tests.support.exactness import Case, ragged_batch, sample


class Newer(nn.Module):
    def forward(self, input_ids: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
        return input_ids + 1


class Older(nn.Module):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Tensor:
        return input_ids + 1


@pytest.mark.parametrize(("kind", "name"), [(Newer, "cache"), (Older, "past_key_values")])
def test_the_cache_goes_by_the_name_that_the_model_has_for_it(
    kind: type[nn.Module], name: str
) -> None:
    model = kind()
    assert cache_argument(model) == name
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    forward = CompiledForward(model, CompileOptions(backend))  # type: ignore[arg-type]
    row = {"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 1, 2, 2)}
    # Layers with a cache that they cannot be handed their part of run as they are written.
    forward(**row, **{name: object()})
    assert not compiled
    forward(**row, **{name: None})
    assert compiled


def test_no_model_is_called_by_a_name_that_its_release_warns_of() -> None:
    """The warning is of every call, in the logs of every run."""
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        layout = Case(ragged_batch(33, 21), stride=6).layout()
        rollouts, _ = sample(model, PackedForward.for_model(model), layout)
        network = FeatureNetwork(
            model, feature_layers=(0.5,), embed_method="mean_pooling", normalization="per_layer"
        )
        network.chunk_size = 1
        network.embed(rollouts)


@pytest.mark.skipif("dory" not in MODEL_TYPES, reason="in transformers from 5.24 on")
def test_layers_that_run_several_times_have_no_depth() -> None:
    """A hook on such a layer would read one of its passes and not say which."""
    with pytest.raises(ValueError, match="runs some of its layers several times"):
        decoder_layers(tiny_model("dory"))
    once = tiny_model("dory", n_recurrent_loops=1)
    assert len(decoder_layers(once)) == LAYERS
