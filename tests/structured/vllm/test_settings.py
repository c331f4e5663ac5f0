"""Settings of the server, and the adapters that may be sent to it."""

import math
from dataclasses import fields

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

pytest.importorskip("trl")

from trl import GRPOConfig

from hf_ebft.structured import EBFTGRPOConfig
from hf_ebft.structured.vllm.handshake import TOLERANCES, choose_tolerance
from hf_ebft.structured.vllm.prefetch import LookAhead
from hf_ebft.structured.vllm.settings import TRL_FIELDS, VLLMServerArguments, VLLMServerSettings
from hf_ebft.structured.vllm.sync import (
    INITS_THAT_LEAVE_THE_BASE_ALONE,
    UNSUPPORTED_OPTIONS,
    check_adapter,
)
from tests.support.fake_vllm import small_policy

# ---- Settings ------------------------------------------------------------------------------------


def test_fields_that_trl_has_too_have_its_defaults():
    trl = {entry.name: entry for entry in fields(GRPOConfig)}
    ours = {entry.name: entry for entry in fields(VLLMServerArguments)}
    assert set(trl) & set(ours) == set(TRL_FIELDS)
    for name in TRL_FIELDS:
        assert ours[name].default == trl[name].default


def test_the_address_is_the_url_or_host_and_port():
    assert VLLMServerSettings().vllm_url == "http://0.0.0.0:8000"
    assert VLLMServerSettings(vllm_server_host="h", vllm_server_port=5).vllm_url == "http://h:5"
    assert VLLMServerSettings(vllm_server_base_url="http://h:5/").vllm_url == "http://h:5"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_lora_sync": True, "vllm_full_sync": True}, "both on"),
        ({"async_prefetch": True}, "async_prefetch=True belongs to"),
        ({"vllm_sync_interval": 4}, "vllm_sync_interval=4 belongs to"),
        ({"vllm_lora_sync": "yes"}, "vllm_lora_sync='yes'"),
        ({"vllm_lora_sync": True, "vllm_sync_interval": 0}, "vllm_sync_interval=0"),
        ({"vllm_lora_sync": True, "vllm_sync_interval": 1.5}, "vllm_sync_interval=1.5"),
        ({"vllm_lora_sync": True, "vllm_request_retries": -1}, "vllm_request_retries=-1"),
        ({"vllm_lora_sync": True, "vllm_request_timeout": 0}, "vllm_request_timeout=0"),
        ({"vllm_lora_sync": True, "vllm_handshake_tolerance": math.nan}, "tolerance=nan"),
        ({"vllm_lora_sync": True, "vllm_dtype": "fp8"}, "vllm_dtype='fp8'"),
        ({"vllm_lora_sync": True, "vllm_max_lora_rank": 24}, "vllm_max_lora_rank=24"),
        ({"vllm_lora_sync": True, "vllm_server_base_url": "localhost:8000"}, "no address"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VLLMServerSettings(**settings)


def test_the_structured_configuration_has_them_and_checks_them(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
    options |= {"num_generations": 4, "per_device_train_batch_size": 4}
    config = EBFTGRPOConfig(**options, vllm_lora_sync=True, vllm_sync_interval=2)
    assert config.samples_on_server and config.vllm_sync_interval == 2
    with pytest.raises(ValueError, match="async_prefetch=True belongs to"):
        EBFTGRPOConfig(**options, async_prefetch=True)
    with pytest.raises(ValueError, match="use_vllm=True is TRL's own vLLM"):
        EBFTGRPOConfig(**options, vllm_lora_sync=True, use_vllm=True)


# ---- Adapters ------------------------------------------------------------------------------------


def adapted(**options):
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return get_peft_model(small_policy(), LoraConfig(**(defaults | options)))


def test_plain_adapters_pass():
    for options in (
        {},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"target_modules": "all-linear"},
        {"target_modules": ["embed_tokens"]},
        # Another rank at the same alpha / r is applied rightly.
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
    ):
        check_adapter(adapted(**options), max_rank=16)


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
        ({"r": 32}, "rank of .* is 32, above the server's highest, vllm_max_lora_rank=16"),
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


# ---- Small parts ---------------------------------------------------------------------------------


def test_tolerance_follows_the_coarsest_precision():
    model = small_policy()
    assert choose_tolerance(model, False, False, "auto", None) == TOLERANCES[torch.float32]
    assert choose_tolerance(model, True, False, "auto", None) == TOLERANCES[torch.bfloat16]
    assert choose_tolerance(model, False, True, "auto", None) == TOLERANCES[torch.float16]
    assert choose_tolerance(model, False, False, "bfloat16", None) == TOLERANCES[torch.bfloat16]
    half = small_policy().to(torch.float16)
    assert choose_tolerance(half, False, False, "float32", None) == TOLERANCES[torch.float16]
    assert choose_tolerance(half, False, False, "float32", 0.7) == 0.7


def test_looking_ahead_changes_nothing():
    ahead = LookAhead(iter(range(4)))
    assert ahead.peek(2) == 2
    assert next(ahead) == 0
    assert ahead.peek(0) == 1 and ahead.peek(2) == 3 and ahead.peek(3) is None
    assert list(ahead) == [1, 2, 3]
