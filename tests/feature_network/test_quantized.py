"""bitsandbytes: QLoRA policies, quantized feature networks. Skipped where it is not installed."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_ebft import EBFTConfig, EBFTTrainer
from tests.support.distributed_runs import documents, small_llama

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model whose widths fit the blocks of 64 that bitsandbytes quantizes together."""
    folder = tmp_path_factory.mktemp("model")
    small_llama(hidden_size=64, intermediate_size=128, num_key_value_heads=4).save_pretrained(
        folder
    )
    return folder


def config(folder, **settings):
    values = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "stride": 4,
        "context_length": 4,
        "generate_max_len": 3,
    }
    return EBFTConfig(**(values | settings))


def quantized(saved):
    return AutoModelForCausalLM.from_pretrained(
        saved,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
        ),
        device_map={"": "cpu"},
    )


def qlora(saved, folder):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return EBFTTrainer(
        quantized(saved), config(folder), train_dataset=documents(), peft_config=lora
    )


def adapter_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_qlora_shares_its_base_trains_resumes_and_loads(saved, tmp_path):
    trainer = qlora(saved, tmp_path)
    assert trainer.feature_network.shared
    before = adapter_weights(trainer.model)
    trainer.train()
    after = adapter_weights(trainer.model)
    assert any(not torch.equal(before[name], after[name]) for name in after)

    again = qlora(saved, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in adapter_weights(again.model).items():
        assert torch.equal(weight, after[name]), name

    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors"}
    assert names == {"adapter_model.safetensors"}
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    weights = adapter_weights(loaded)
    assert weights
    for name, weight in weights.items():
        assert torch.equal(weight, after[name]), name


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_feature_network_stays_close(saved, tmp_path, bits):
    def trainer(**settings):
        return EBFTTrainer(
            AutoModelForCausalLM.from_pretrained(saved),
            config(tmp_path, feature_model_name_or_path=str(saved), **settings),
            train_dataset=documents(),
        )

    exact, small = trainer(), trainer(feature_quantization=bits)
    rollouts = exact.sample_rollouts(
        exact.model, {"input_ids": torch.tensor([documents()[0]["input_ids"]])}
    )
    reference = exact.feature_network.embed(rollouts).generated
    cosine = (reference * small.feature_network.embed(rollouts).generated).sum(dim=-1)
    assert 0.9 < float(cosine.min()) < 1 - 1e-6  # unit vectors
    small.train()
