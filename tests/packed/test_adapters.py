"""Every PEFT method is exact on packed rows or refused; a new one fails here until it is sorted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, PeftType, TrainableTokensConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig

from hf_ebft import EBFTTrainer
from hf_ebft.feature_network.shared_base import why_not_shareable
from hf_ebft.packed.forward import PackedForward, is_random_in_training
from hf_ebft.packed.supported import REFUSED_ADAPTERS, REFUSED_LORA
from hf_ebft.packed.verification import verify_packing
from tests.support.architectures import tiny_model
from tests.support.exactness import TOLERANCE, Case, measure, ragged_batch
from tests.support.tiny import config, texts, tiny_llama, weights_of

PROMPTS = {
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
}
# Methods that need a package which is not installed, or several adapters to choose from.
NOT_BUILT = {"ADAMSS", "XLORA"}
# What a method needs to be built for a model of this size.
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": None},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"oft_block_size": 4, "r": 0},
    "ROAD": {"group_size": 8},
    "SHADOW": {"target_modules": None},
    "TRAINABLE_TOKENS": {"token_indices": [6, 9, 20], "target_modules": None},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 20},
}
REFUSED = PROMPTS | set(REFUSED_ADAPTERS)
METHODS = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def adapted(method: str) -> PeftModel:
    """A model with an adapter of this method that does something."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    defaults = {"target_modules": ["q_proj", "v_proj"], "r": 4, "num_virtual_tokens": 4}
    settings = {"task_type": "CAUSAL_LM"} | defaults | SETTINGS.get(method, {})
    known = config_class.__dataclass_fields__
    model = get_peft_model(
        tiny_model("llama"), config_class(**{k: v for k, v in settings.items() if k in known})
    )
    return moved(model)


def moved(model: PeftModel) -> PeftModel:
    """With all trainable weights away from where they start, which often is no effect at all."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m not in REFUSED | NOT_BUILT])
def test_methods_that_are_not_refused_are_exact(method: str) -> None:
    model = adapted(method)
    found = measure(model, Case(ragged_batch(33, 21), stride=6))
    if method == "PVERA":  # draws its weights anew in training mode
        assert found.training > 0.1
        found.training = found.deferred = 0.0
    assert found.largest < TOLERANCE, found
    verify_packing(model, PackedForward.for_model(model))


@pytest.mark.parametrize("method", sorted(REFUSED - NOT_BUILT))
def test_methods_that_cannot_be_exact_are_refused(method: str) -> None:
    reason = REFUSED_ADAPTERS.get(method, "puts virtual tokens before every row")
    with pytest.raises(ValueError, match=f"PEFT method {method} {reason}.*such as LoRA"):
        PackedForward.for_model(adapted(method))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alora_invocation_tokens", [7]),
        ("monteclora_config", MontecloraConfig()),
        ("velora_config", VeloraConfig(num_groups=4)),
    ],
)
def test_kinds_of_lora_that_cannot_be_exact_are_refused(field: str, value: Any) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **{field: value})
    model = get_peft_model(tiny_model("llama"), lora)
    with pytest.raises(ValueError, match=rf"LoRA with {field}=.*{REFUSED_LORA[field]}.*Leave"):
        PackedForward.for_model(model)


@pytest.mark.parametrize(
    "settings", [{"kasa_config": KasaConfig()}, {"use_dora": True}, {"layer_replication": [(0, 2)]}]
)
def test_kinds_of_lora_that_are_exact(settings: dict[str, Any]) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)
    model = moved(get_peft_model(tiny_model("llama"), lora))
    assert measure(model, Case(ragged_batch(21), stride=6)).largest < TOLERANCE


def test_the_adapter_that_is_refused_need_not_be_the_first() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[7]))
    PackedForward.for_model(model)  # it is not active
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="alora_invocation_tokens"):
        PackedForward.for_model(model)


def test_self_test_reads_the_tokens_that_an_adapter_reacts_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """aLoRA does nothing before its invocation tokens, which random text hardly ever holds."""
    monkeypatch.setattr("hf_ebft.packed.supported.REFUSED_LORA", {})
    # Ids below 16 are not drawn.
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[7, 9]
    )
    model = moved(get_peft_model(tiny_model("llama"), lora))
    with pytest.raises(ValueError, match="other log-probabilities on a packed row"):
        verify_packing(model, PackedForward.for_model(model))


def test_adaption_prompt_trains_against_a_copy(tmp_path: Path) -> None:
    """Its model has no parameter prefix to tell adapters from the base by."""
    model = adapted("ADAPTION_PROMPT").train()
    assert "attention modules" in str(why_not_shareable(model))
    before = weights_of(model)
    args = config(tmp_path, max_steps=1)
    trainer = EBFTTrainer(model, args, train_dataset=texts(20, 20, vocabulary=64))
    trainer.train()
    assert not trainer.feature_network.shared
    changed = {name for name, weight in model.named_parameters() if (weight != before[name]).any()}
    assert changed == {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_trained_token_embeddings_are_noticed() -> None:
    """A probe of random tokens passes by the few whose embeddings an adapter holds."""
    model = get_peft_model(
        tiny_llama(vocabulary=5000), TrainableTokensConfig(token_indices=[58, 60])
    )
    assert why_not_shareable(model) is None
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "trainable_tokens" in name and weight.requires_grad:
                weight.add_(1.0)
    assert "do not start at zero" in str(why_not_shareable(model))


@pytest.mark.parametrize("settings", [{}, {"rank_dropout": 0.5}, {"module_dropout": 0.5}])
def test_adapters_that_draw_in_training_are_noticed(settings: dict[str, Any]) -> None:
    """LoHa drops ranks or layers with functions, so that there is no module to see."""
    loha = LoHaConfig(target_modules=["q_proj"], **settings)
    assert is_random_in_training(get_peft_model(tiny_llama(), loha)) == bool(settings)


def test_adapters_that_draw_their_weights_in_training_are_noticed() -> None:
    assert is_random_in_training(adapted("PVERA"))
    assert not is_random_in_training(adapted("VERA"))
