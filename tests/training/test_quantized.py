"""4-bit policies keep the gradient that their dequantized weights have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_ebft.training.preparation import with_adapters
from hf_ebft.training.quantized import keep_gradients
from tests.support.distributed_runs import small_llama

bitsandbytes = pytest.importorskip("bitsandbytes")


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def in_four_bits(folder: Path) -> Any:
    small_llama(hidden_size=64, intermediate_size=128, num_key_value_heads=4).save_pretrained(
        folder
    )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
        ),
        device_map={"": "cpu"},
    )


def dequantized(model: nn.Module, folder: Path) -> Any:
    """The same model in float32: a quantized weight is replaced by the values it stands for."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = dict(plain.named_parameters())
    replaced = 0
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            exact = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert not torch.equal(weights[f"{name}.weight"], exact)  # rounded
            weights[f"{name}.weight"].data.copy_(exact)
            replaced += 1
    assert replaced > 5
    return plain


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of all adapters, which are set to the same values for every model."""
    random = torch.Generator().manual_seed(0)
    adapters = {name: p for name, p in sorted(model.named_parameters()) if "lora_" in name}
    for parameter in adapters.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    ids = torch.randint(0, 40, (2, 12), generator=random)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in adapters.items() if p.grad is not None}


def test_gradients_after_sampling_are_those_of_the_dequantized_model(tmp_path: Path) -> None:
    model = in_four_bits(tmp_path)
    plain = get_peft_model(dequantized(model, tmp_path), lora())
    policy = with_adapters(model, lora())
    assert policy is not None
    with torch.no_grad():  # as sampling and features do
        policy.eval()(input_ids=torch.arange(12)[None])
    expected, found = gradients(plain), gradients(policy)
    assert len(expected) > 10 and expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_repacked_model_is_refused(tmp_path: Path) -> None:
    model = in_four_bits(tmp_path)
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    layers[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"repacked the weights of .*Load the model again"):
        keep_gradients(model)
