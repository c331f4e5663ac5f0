"""Noise of training mode that no setting tells of, or one draw of which serves a whole pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ebft import EBFTTrainer
from hf_ebft.packed.deferred import can_defer
from hf_ebft.packed.forward import PackedForward, has_noise_per_pass
from tests.support.architectures import tiny_model
from tests.support.model_state import state_of
from tests.support.tiny import batch_of, config, gradients, texts, tiny_llama


def with_functional_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Dropout of the first layer's output, whose rate stands in the code."""

    def drop(module: nn.Module, _: object, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, 0.5, module.training)

    model.model.layers[0].register_forward_hook(drop)
    return model


def test_noise_without_a_setting_is_found_and_nothing_is_changed() -> None:
    for model, noisy in ((tiny_llama(), False), (with_functional_dropout(tiny_llama()), True)):
        before = state_of(model)
        assert has_noise_per_pass(model) == noisy
        assert state_of(model) == before
        assert can_defer(model, PackedForward.for_model(model, trains=True)) != noisy
        model.eval()
        assert can_defer(model, PackedForward.for_model(model, trains=True))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_layerdrop_skips_layers_of_a_whole_pass(rate: float) -> None:
    """In parts, a layer could run for the rollouts that has no keys of the document."""
    model = tiny_model("opt").train()
    model.config.layerdrop = model.model.decoder.layerdrop = rate
    assert can_defer(model, PackedForward.for_model(model, trains=True)) == (rate == 0)


def test_functional_dropout_has_an_effect_whatever_the_chunks(tmp_path: Path) -> None:
    """Rollouts in chunks were trained without it: their documents' pass ran while sampling."""
    batch = batch_of(texts(24, 24))
    norms = []
    for chunk in (None, 4):
        args = config(tmp_path, training_chunk_size=chunk, ce_coef=1.0)
        quiet = EBFTTrainer(tiny_llama(), args)
        trainer = EBFTTrainer(with_functional_dropout(tiny_llama()), args)
        found = []
        for each in (quiet, trainer):
            torch.manual_seed(0)
            found.append(gradients(each, batch)[1])
        assert any(not torch.allclose(found[0][name], found[1][name]) for name in found[0])
        norms.append(torch.stack([g.norm() for g in found[1].values()]))
    torch.testing.assert_close(norms[0], norms[1])
