"""The policy's own base as feature network: reading it leaves the policy exactly as it was."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_ebft import EBFTTrainer
from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.feature_network.shared_base import adapters_off, why_not_shareable
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.model_code import find_head
from hf_ebft.packed.verification import verify_packing
from tests.support.exactness import Case, ragged_batch, sample
from tests.support.model_state import state_of
from tests.support.tiny import config, texts, tiny_llama, weights_of

if find_spec("trl") is not None:  # not in the test: the import itself draws random numbers
    from hf_ebft.structured.sequence_features import SequenceFeatureNetwork, TokenSequence

SETTINGS: dict[str, Any] = {"feature_layers": (0.5, 1.0), "normalization": "per_layer"}


def lora(*targets: str) -> PeftModel:
    return get_peft_model(tiny_llama(vocabulary=64), LoraConfig(r=4, target_modules=list(targets)))


def partly_frozen() -> PeftModel:
    """As LoRA-FA trains: B only."""
    model = lora("q_proj", "v_proj")
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.requires_grad_(False)
    return model


def loaded_for_inference(folder: Path) -> PeftModel:
    lora("q_proj").save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_llama(vocabulary=64), folder, is_trainable=False)


def old_beside_new() -> PeftModel:
    """Two active adapters, of which the first is frozen."""
    model = lora("q_proj")
    model.add_adapter("new", LoraConfig(r=4, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "new"])
    for name, weight in model.named_parameters():
        weight.requires_grad_(".new." in name)
    return model


def partly_switched_off() -> PeftModel:
    """A user's ablation: one layer without its adapter."""
    model = lora("q_proj")
    model.get_base_model().model.layers[0].self_attn.q_proj.enable_adapters(False)
    return model


POLICIES: dict[str, Callable[[Path], PeftModel]] = {
    "partly frozen": lambda _: partly_frozen(),
    "old beside new": lambda _: old_beside_new(),
    "loaded for inference": loaded_for_inference,
}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("kind", POLICIES)
def test_building_a_trainer_keeps_what_is_trainable(tmp_path: Path, kind: str) -> None:
    """PEFT makes every active adapter trainable when `disable_adapter()` ends."""
    model = POLICIES[kind](tmp_path / "adapter")
    before = trainable(model)
    trainer = EBFTTrainer(model, config(tmp_path, verify_packing=True), train_dataset=texts(20, 20))
    assert trainer.feature_network.shared
    assert trainable(model) == before


@pytest.mark.parametrize("kind", ["partly frozen", "old beside new"])
def test_frozen_adapters_are_not_trained(tmp_path: Path, kind: str) -> None:
    model = POLICIES[kind](tmp_path / "adapter")
    wanted, before = trainable(model), weights_of(model)
    args = config(tmp_path, max_steps=2, ce_coef=0.1)
    EBFTTrainer(model, args, train_dataset=texts(20, 20, 20, 20)).train()
    moved = {
        name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])
    }
    # An A whose B starts at zero has no gradient before the first step; the second moves it.
    assert moved == wanted


def test_adapters_off_restores_layers_that_differ() -> None:
    model = partly_switched_off()
    before = state_of(model)
    with pytest.warns(UserWarning, match="some adapter layers"), adapters_off(model):
        assert all(state_of(model)["adapters off"].values())
    assert state_of(model) == before


# ---- Every probe and pass -----------------------------------------------------------------------


def read_packed(model: nn.Module) -> None:
    network = FeatureNetwork(model, embed_method="last_token", shared=True, **SETTINGS)
    case = Case(ragged_batch(20, 12))
    network.embed(sample(model, network.forward, case.layout())[0])


def read_sequences(model: nn.Module) -> None:
    pytest.importorskip("trl")
    network = SequenceFeatureNetwork(
        model, embed_method="last_token", batch_tokens=64, shared=True, **SETTINGS
    )
    network.embed([TokenSequence((1, 2, 3), (4, 5)), TokenSequence((1, 2), (3,))])


def fail_while_reading(model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="in between"), adapters_off(model):
        raise RuntimeError("in between")


PROBES: dict[str, Callable[[nn.Module], object]] = {
    "the probe for a shared base": why_not_shareable,
    "the self-test of packing": lambda model: verify_packing(model, PackedForward.for_model(model)),
    "the probe of the head": find_head,
    "features of packed rows": read_packed,
    "features of sequences": read_sequences,
    "an error while adapters are off": fail_while_reading,
}


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_probes_restore_the_state_of_the_policy(probe: str, attention: str) -> None:
    """Modes, what is trainable, random numbers, configuration, hooks and adapters."""
    model = old_beside_new()
    model.get_base_model().set_attn_implementation(attention)
    PackedForward.for_model(model)  # chooses the attention that training uses, once and for good
    new_name = hasattr(model.get_base_model(), "activation_checkpointing_enable")
    getattr(model, f"{'activation' if new_name else 'gradient'}_checkpointing_enable")()
    model.train()
    model.get_base_model().model.layers[1].eval()  # a user's choice
    before = state_of(model)
    PROBES[probe](model)
    after = state_of(model)
    assert [name for name in before if before[name] != after[name]] == []
