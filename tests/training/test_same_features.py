"""Resuming with another feature network is refused; with the same one it goes on.

Born from a trainer that was built from its own checkpoint: the checkpoint became phi, and rewards
changed in the middle of a run without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from hf_ebft import EBFTTrainer
from hf_ebft.feature_network.fingerprint import Fingerprint, fingerprint_of
from hf_ebft.feature_network.network import FrozenNetwork
from hf_ebft.training.same_features import KEY
from tests.support.tiny import config, texts, tiny_llama

ANOTHER = r"resumes at step 1 with another feature network than it began with"


def make(folder: Path, model: nn.Module, **settings: Any) -> EBFTTrainer:
    network = settings.pop("feature_network", None)
    args = config(folder, max_steps=2, save_strategy="steps", save_steps=1, **settings)
    return EBFTTrainer(model, args, train_dataset=texts(24, 24), feature_network=network)


def adapted(seed: int) -> PeftModel:
    torch.manual_seed(seed)  # of the random half of adapters that start at zero
    adapters = LoraConfig(r=2, target_modules="all-linear")
    return get_peft_model(tiny_llama(), adapters)  # type: ignore[return-value]


def test_a_trainer_built_from_its_own_checkpoint_does_not_resume(tmp_path: Path) -> None:
    make(tmp_path, tiny_llama()).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    trained = LlamaForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=ANOTHER):
        make(tmp_path, trained).train(resume_from_checkpoint=checkpoint)
    # Any of the ways out that the message names.
    make(tmp_path, tiny_llama()).train(resume_from_checkpoint=checkpoint)
    again = make(tmp_path, trained, feature_network=tiny_llama())
    again.train(resume_from_checkpoint=checkpoint)
    make(tmp_path / "new", trained).train()


@pytest.mark.parametrize("placement", ["shared", "same_device"])
def test_adapters_of_a_checkpoint_do_not_resume(placement: str, tmp_path: Path) -> None:
    """Fresh ones do, although their random half is another one at every start."""
    make(tmp_path, adapted(0), feature_placement=placement).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    make(tmp_path, adapted(1), feature_placement=placement).train(resume_from_checkpoint=checkpoint)
    trained = PeftModel.from_pretrained(tiny_llama(), checkpoint, is_trainable=True)
    with pytest.raises(ValueError, match=ANOTHER):
        make(tmp_path, trained).train(resume_from_checkpoint=checkpoint)


def test_another_placement_of_the_same_network_resumes(tmp_path: Path) -> None:
    make(tmp_path, adapted(0), feature_placement="shared").train()
    trainer = make(tmp_path, adapted(1), feature_placement="same_device")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_another_precision_is_named(tmp_path: Path) -> None:
    make(tmp_path, tiny_llama()).train()
    trainer = make(tmp_path, tiny_llama(), feature_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"its weights were float32, now they are bfloat16"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_setting_that_names_another_network_is_quoted(tmp_path: Path) -> None:
    for seed in (1, 2):
        tiny_llama(seed=seed).save_pretrained(tmp_path / f"phi{seed}")
    first, second = (str(tmp_path / f"phi{seed}") for seed in (1, 2))
    make(tmp_path, tiny_llama(), feature_model_name_or_path=first).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    trainer = make(tmp_path, tiny_llama(), feature_model_name_or_path=second)
    with pytest.raises(ValueError, match=r"feature_model_name_or_path='.*phi2' may now name"):
        trainer.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"began with feature_model_name_or_path, set it again"):
        make(tmp_path, tiny_llama()).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_of_an_earlier_release_resumes(tmp_path: Path) -> None:
    make(tmp_path, tiny_llama()).train()
    path = tmp_path / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert set(state["stateful_callbacks"].pop(KEY)["attributes"]) == {"digest", "dtypes"}
    path.write_text(json.dumps(state))
    trainer = make(tmp_path, tiny_llama(seed=1))
    trainer.train(resume_from_checkpoint=str(path.parent))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bit_makes_another_fingerprint(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    network = FrozenNetwork(model, feature_layers=[0.5], normalization="per_layer")
    before = fingerprint_of(network)
    assert fingerprint_of(network) == before
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0].float(), torch.tensor(9.0))
        if dtype != torch.float32:
            weight[0, 0] *= 1.02
    assert fingerprint_of(network) != before


def test_structured_mode_does_not_resume_either(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from hf_ebft.structured import EBFTGRPOTrainer
    from tests.support import tiny_structured as tiny

    def make(model: nn.Module) -> EBFTGRPOTrainer:
        return EBFTGRPOTrainer(
            model,
            tiny.config(tmp_path, save_strategy="steps", save_steps=1),
            train_dataset=tiny.rows(),
            processing_class=tiny.tokenizer(),
        )

    make(tiny.policy()).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=ANOTHER):
        trained = LlamaForCausalLM.from_pretrained(checkpoint)
        make(trained).train(resume_from_checkpoint=checkpoint)
    make(tiny.policy()).train(resume_from_checkpoint=checkpoint)


def test_a_weight_that_lies_inside_a_larger_one_counts_the_same() -> None:
    """Its bits may begin and end within a word of eight bytes."""

    def of(values: torch.Tensor) -> Fingerprint:
        model = tiny_llama()
        model.model.norm.weight = nn.Parameter(values)
        network = FrozenNetwork(model, feature_layers=[0.5], normalization="per_layer")
        return fingerprint_of(network)

    whole = torch.randn(19).bfloat16()
    assert of(whole[3:18]) == of(whole[3:18].clone())
    assert of(whole[3:18]) != of(whole[2:17])
