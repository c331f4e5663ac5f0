"""Settings of the server."""

import math
from dataclasses import fields

import pytest

pytest.importorskip("trl")

from trl import GRPOConfig

from hf_ebft.structured import EBFTGRPOConfig
from hf_ebft.structured.vllm.settings import TRL_FIELDS, VLLMServerArguments, VLLMServerSettings


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
