"""Options of adapters: what PEFT and bitsandbytes are told, what is refused, runs with them."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_ebft.commands import demo
from hf_ebft.commands.runs.adapters import check_adapters, lora_config, quantization
from hf_ebft.commands.runs.demo_files import DEMO_MODEL
from hf_ebft.commands.runs.model import load_model
from hf_ebft.commands.runs.options import LoraArguments, ModelArguments
from hf_ebft.commands.runs.parsing import parse_arguments
from tests.support.tiny import config, tiny_llama


def lora(**options: Any) -> LoraArguments:
    return LoraArguments(use_peft=True, **options)


def test_names_are_those_of_trl() -> None:
    trl = pytest.importorskip("trl")
    theirs = {field.name for field in dataclasses.fields(trl.ModelConfig)}
    of_adapters = {
        name
        for name in theirs
        if name.startswith(("lora_", "use_", "load_in", "bnb_")) and name != "lora_task_type"
    }
    ours = {field.name for field in dataclasses.fields(LoraArguments)}
    assert of_adapters and of_adapters <= ours
    assert ours - of_adapters == {"lora_merge"}
    for name in of_adapters - {"lora_dropout", "lora_target_modules"}:  # said in the docstring
        assert getattr(LoraArguments(), name) == getattr(trl.ModelConfig(), name), name


def test_a_file_and_the_command_line_give_the_same_options(tmp_path: Path) -> None:
    options = {
        "use_peft": True,
        "lora_r": 64,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_target_parameters": ["mlp.experts.down_proj"],
        "lora_modules_to_save": ["lm_head"],
        "use_rslora": True,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "use_bnb_nested_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(options))
    words = "--use_peft --lora_r 64 --lora_target_modules q_proj v_proj --use_rslora --load_in_4bit"
    words += " --lora_target_parameters mlp.experts.down_proj --lora_modules_to_save lm_head"
    words += " --bnb_4bit_quant_type fp4 --use_bnb_nested_quant --bnb_4bit_quant_storage bfloat16"
    from_file = parse_arguments([f"--config={file}"])[2]
    assert from_file == parse_arguments(words.split())[2]
    assert {name: getattr(from_file, name) for name in options} == options


def test_every_option_reaches_peft() -> None:
    model = tiny_llama()
    options = lora(
        lora_r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        lora_target_modules=[r".*layers\.0\..*_proj"],
        lora_modules_to_save=["lm_head"],
        use_rslora=True,
        use_dora=True,
    )
    found = lora_config(options, model)
    assert isinstance(found, LoraConfig)
    assert (found.r, found.lora_alpha, found.lora_dropout) == (4, 6, 0.1)
    assert (found.target_modules, found.modules_to_save) == (r".*layers\.0\..*_proj", ["lm_head"])
    assert found.use_rslora and found.use_dora and found.task_type == "CAUSAL_LM"
    adapted: Any = get_peft_model(model, found)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(6 / math.sqrt(4))
    assert not hasattr(adapted.base_model.model.model.layers[1].self_attn.q_proj, "lora_A")


def experts() -> MixtralForCausalLM:
    settings = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(settings)


def test_parameters_of_experts_get_adapters() -> None:
    model = experts()
    only = lora(lora_target_modules=["none"], lora_target_parameters=["mlp.experts.down_proj"])
    adapted = get_peft_model(model, lora_config(only, model))  # type: ignore[arg-type]
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(".mlp.experts." in name and "lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit=True: quantized weights cannot .* Add use_peft"),
        ({"load_in_8bit": True}, "load_in_8bit=True: .* or drop load_in_8bit to train"),
        ({"use_dora": True}, "use_dora=True would have no effect without adapters"),
        ({"lora_modules_to_save": ["a"]}, r"\['a'\] would have no effect without adapters"),
        ({"use_peft": True, "load_in_4bit": True, "load_in_8bit": True}, "keep one of the two"),
        ({"use_peft": True, "load_in_4bit": True, "lora_merge": True}, "round the adapters"),
        ({"use_peft": True, "use_bnb_nested_quant": True}, "no effect without load_in_4bit"),
        (
            {"use_peft": True, "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"},
            "bnb_4bit_quant_type='fp4' would have no effect without load_in_4bit",
        ),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_adapters(LoraArguments(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora_modules_to_save": ["lm_haed"]},
            "'lm_haed' .* did you mean .*lm_head",
        ),
        ({"lora_target_parameters": ["qqq"]}, "parameters: 'qqq' matches nothing .* it has "),
        ({"lora_target_modules": ["none"]}, "leaves nothing to adapt"),
    ],
)
def test_names_that_match_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_config(lora(**options), tiny_llama())


# ---- Few bits -----------------------------------------------------------------------------------


def test_an_error_without_bitsandbytes_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hf_ebft\[quantization\]'"):
        quantization(lora(load_in_4bit=True), config(tmp_path), torch.float32)


def test_products_are_computed_in_the_precision_of_the_training(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options = lora(load_in_4bit=True, use_bnb_nested_quant=True, bnb_4bit_quant_storage="bfloat16")
    found = quantization(options, config(tmp_path), torch.float16)
    assert found.bnb_4bit_compute_dtype == torch.float16
    assert found.bnb_4bit_use_double_quant and found.bnb_4bit_quant_storage == torch.bfloat16
    assert found.bnb_4bit_quant_type == "nf4"
    found = quantization(options, config(tmp_path, bf16=True), torch.float32)
    assert found.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_quantized_model_is_prepared(tmp_path: Path) -> None:
    """Frozen, quantized but for embeddings, norms and head, and these in float32."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    names = ModelArguments(model_name_or_path=str(DEMO_MODEL), dtype="bfloat16")
    model = load_model(names, 1536, lora(load_in_4bit=True), config(tmp_path))
    assert not any(p.requires_grad for p in model.parameters())
    types = {type(m) for n, m in model.named_modules() if n.endswith("_proj")}
    assert types == {bitsandbytes.nn.Linear4bit}
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == torch.float32


def run(output: Path, *options: str) -> None:
    settings = ["--max_steps=1", "--report_rows=0", "--max_train_rows=8", "--report_to=none"]
    settings += ["--per_device_train_batch_size=2", "--sequence_len=48", "--stride=16"]
    settings += ["--verify_packing=false", "--learning_rate=1e-3", "--warmup_steps=0"]
    demo.main([f"--output_dir={output}", "--use_peft", "--lora_r=2", *settings, *options])


@pytest.mark.parametrize("bits", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_a_run_on_quantized_weights(
    bits: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("bitsandbytes")
    run(tmp_path, f"--load_in_{bits}")
    assert "Feature network: shared on cpu" in caplog.text
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in saved.items())
    AutoPeftModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_a_run_with_dora_and_a_fully_trained_module(tmp_path: Path) -> None:
    run(tmp_path, "--use_dora", "--lora_modules_to_save", "norm")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("lora_magnitude_vector" in name for name in saved)
    old = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).model.norm.weight
    assert not torch.equal(saved["base_model.model.model.norm.weight"], old)
