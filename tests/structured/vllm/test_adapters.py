"""Which adapters may be sent to a server, and what is written of them."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file

pytest.importorskip("trl")

from hf_ebft.structured.vllm.adapters import (
    INITS_THAT_LEAVE_THE_BASE_ALONE,
    UNSUPPORTED_OPTIONS,
    adapter_weights,
    check_adapter,
)
from tests.support.fake_vllm import small_policy


def adapted(**options):
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return get_peft_model(small_policy(), LoraConfig(**(defaults | options)))


def applied_as_vllm_does(model):
    """The base model plus one scale times B A for each layer in the adapter's file."""
    config = model.peft_config["default"]
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    weights = adapter_weights(model, Accelerator(cpu=True), model)
    base = small_policy()
    with torch.no_grad():
        for name, a in weights.items():
            path = name.removeprefix("base_model.model.")
            if ".lora_A." in path:
                b = weights[name.replace("lora_A", "lora_B")]
                base.get_parameter(path.replace("lora_A.", "")).add_(b @ a, alpha=scale)
            elif path.endswith(".lora_embedding_A"):
                b = weights[name.replace("embedding_A", "embedding_B")]
                weight = base.get_submodule(path.removesuffix(".lora_embedding_A")).weight
                weight.add_((b @ a).T, alpha=scale)
    return base


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"target_modules": "all-linear"},
        {"target_modules": ["embed_tokens"]},
        # Another rank at the same alpha / r is applied rightly.
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
    ],
    ids=str,
)
def test_adapters_that_pass_are_applied_by_one_scale_as_peft_does(options):
    model = adapted(**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    check_adapter(model, max_rank=16)
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        ours = model(ids).logits
        torch.testing.assert_close(applied_as_vllm_does(model)(ids).logits, ours)
        with model.disable_adapter():
            assert (model(ids).logits - ours).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=.*lm_head"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True, "init_lora_weights": True}, "lora_bias=True"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base"),
        ({"r": 32}, "rank of .* is 32, above the server's maximum, vllm_max_lora_rank=16"),
        ({"rank_pattern": {"q_proj": 32}, "alpha_pattern": {"q_proj": 64}}, "q_proj is 32"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj scales its adapter by 4, .* scale it by 2"),
        ({"alpha_pattern": {"v_proj": 1}}, "v_proj scales its adapter by 0.25"),
    ],
)
def test_adapters_that_the_server_would_apply_in_another_way_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_adapter(adapted(**options), max_rank=16)


def test_a_scale_changed_by_hand_is_noticed():
    model = adapted()
    model.base_model.model.model.layers[0].self_attn.q_proj.set_scale("default", 3.0)
    with pytest.raises(ValueError, match="scales its adapter by 6"):
        check_adapter(model, max_rank=16)


def test_other_kinds_of_adapters_are_refused():
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match="IA3"):
        check_adapter(get_peft_model(small_policy(), config), max_rank=16)


def test_several_active_adapters_are_refused():
    model = adapted()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 active adapters"):
        check_adapter(model, max_rank=16)


def test_every_option_of_lora_is_accounted_for():
    """A new option of PEFT may change what an adapter is: decide whether vLLM can apply it."""
    harmless = {
        # what the adapter's file says, and vLLM reads or needs not know
        *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "bias"),
        *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout"),
        *("rank_pattern", "alpha_pattern"),  # checked by what they do
        # how it starts; checked through init_lora_weights
        *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        # bookkeeping
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "megatron_config", "megatron_core", "runtime_config"),
        *("qalora_group_size", "ensure_weight_tying"),
    }
    known = harmless | set(UNSUPPORTED_OPTIONS)
    assert {entry.name for entry in fields(LoraConfig)} <= known
    assert True in INITS_THAT_LEAVE_THE_BASE_ALONE


@pytest.mark.slow  # for the import
@pytest.mark.parametrize("name", ["default", "other"])
def test_the_file_is_that_of_trls_own_adapter_sync(tmp_path, name):
    """An independent writer of the same file; it leaves embeddings out, so not for those."""
    trl = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(small_policy(), config, adapter_name=name)
    accelerator = Accelerator(cpu=True)
    trl.save_lora_adapter(model, accelerator, name, str(tmp_path / "theirs"))
    theirs = load_file(Path(tmp_path) / "theirs" / "adapter_model.safetensors")
    ours = adapter_weights(model, accelerator, model)
    assert set(ours) == set(theirs) and len(ours) > 10
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
