"""Building the feature network: sharing, copies, precision, other devices."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from hf_ebft.config import EBFTSettings
from hf_ebft.feature_network.loading import build_feature_network
from hf_ebft.feature_network.shared_base import why_not_shareable
from tests.support.distributed_runs import documents, make_trainer, small_llama


def lora(**settings):
    values = {"r": 4, "target_modules": "all-linear"} | settings
    return get_peft_model(small_llama(), LoraConfig(**values))


def test_zero_adapters_share_the_base():
    assert why_not_shareable(lora()) is None
    assert why_not_shareable(lora(use_dora=True)) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"init_lora_weights": False}, "do not start at zero"),
        ({"init_lora_weights": "pissa"}, "do not start at zero"),
        ({"init_lora_weights": "olora"}, "do not start at zero"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"], "bias": "all"}, None),  # Llama has no biases to train
    ],
)
def test_adapters_that_change_the_base_are_found(settings, reason):
    found = why_not_shareable(lora(**settings))
    assert (found is None) if reason is None else (reason in found)


def test_trainable_and_merged_bases_are_found():
    trainable = lora()
    trainable.get_base_model().model.norm.weight.requires_grad_(True)
    assert "model.norm.weight is trainable" in why_not_shareable(trainable)
    merged = lora()
    merged.merge_adapter()
    assert "merged" in why_not_shareable(merged)
    assert "no adapters" in why_not_shareable(small_llama())


def test_shared_placement_is_refused_if_the_base_is_not_the_policy(tmp_path):
    with pytest.raises(ValueError, match="feature_placement='shared' is not possible"):
        make_trainer(tmp_path, feature_placement="shared")


def test_shared_network_adds_no_weights_and_trains_like_a_copy(tmp_path):
    trainers = {
        placement: make_trainer(tmp_path, peft=True, feature_placement=placement, max_steps=3)
        for placement in ("auto", "same_device")
    }
    shared, copied = trainers["auto"], trainers["same_device"]
    assert shared.feature_network.shared and not copied.feature_network.shared
    assert shared.feature_network.model is shared.model
    for trainer in trainers.values():
        trainer.train()
    trained = dict(copied.model.named_parameters())
    moved = 0.0
    for name, parameter in shared.model.named_parameters():
        torch.testing.assert_close(parameter, trained[name], rtol=1e-5, atol=1e-6)
        if "lora_B" in name:
            moved += float(parameter.detach().abs().sum())
    assert moved > 0  # the adapters were not left switched off


def test_shared_network_keeps_reading_the_untrained_base(tmp_path):
    trainer = make_trainer(tmp_path, peft=True)
    batch = {"input_ids": torch.tensor([documents()[0]["input_ids"]])}
    rollouts = trainer.sample_rollouts(trainer.model, batch)
    before = trainer.feature_network.embed(rollouts).generated
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trainer.model.train()
    after = trainer.feature_network.embed(rollouts).generated
    assert torch.equal(before, after)
    assert trainer.model.training  # the policy's mode and gradients are as they were
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if "lora" in n)


def test_lower_precision_network_stays_close(tmp_path):
    batch = {"input_ids": torch.tensor([documents()[0]["input_ids"]])}
    exact = make_trainer(tmp_path)
    rollouts = exact.sample_rollouts(exact.model, batch)
    low = make_trainer(tmp_path, feature_dtype="bfloat16").feature_network
    assert {p.dtype for p in low.model.parameters()} == {torch.bfloat16}
    reference = exact.feature_network.embed(rollouts).generated
    difference = (low.embed(rollouts).generated - reference).norm(dim=-1)
    assert 0 < float(difference.max()) < 0.05  # of unit vectors


def test_network_is_loaded_from_a_name_in_the_policys_precision(tmp_path):
    other = small_llama(seed=7)
    other.save_pretrained(tmp_path / "other")
    trainer = make_trainer(tmp_path, feature_model_name_or_path=str(tmp_path / "other"))
    loaded = trainer.feature_network.model
    for expected, parameter in zip(other.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(expected, parameter) and not parameter.requires_grad


def test_another_device_gets_ids_and_returns_embeddings(monkeypatch):
    """Two devices cannot be had on a CPU; the transfers can be seen."""
    policy = small_llama()
    network = build_feature_network(policy, None, EBFTSettings(), Accelerator(cpu=True))
    seen = []
    original = torch.Tensor.to

    def spy(self, *args, **kwargs):
        if args and args[0] == network.device:
            seen.append(tuple(self.shape))
        return original(self, *args, **kwargs)

    from hf_ebft.packed.sampling import Rollouts
    from hf_ebft.rows.anchors import find_blocks
    from hf_ebft.rows.documents import Documents
    from hf_ebft.rows.layout import PackedLayout

    batch = Documents.from_inputs({"input_ids": torch.randint(1, 61, (2, 24))})
    blocks = find_blocks(batch, stride=8, context_length=8, generate_max_len=8)
    layout = PackedLayout(batch, blocks, 2, 8)
    rollouts = Rollouts(torch.randint(1, 61, layout.rollout_shape), blocks.exists, layout)
    expected = network.embed(rollouts)
    monkeypatch.setattr(torch.Tensor, "to", spy)
    moved = []
    monkeypatch.setattr(PackedLayout, "to", lambda self, device: moved.append(device) or self)
    observed = network.embed(rollouts)
    assert torch.equal(expected.generated, observed.generated)
    assert moved == [network.device] and tuple(rollouts.tokens.shape) in seen
    assert tuple(observed.generated.shape) in seen and tuple(observed.ground_truth.shape) in seen


def test_policy_given_as_its_own_feature_network_is_refused():
    policy = small_llama()
    with pytest.raises(ValueError, match="shares parameters"):
        build_feature_network(policy, policy, EBFTSettings(), Accelerator(cpu=True))


def test_given_network_is_used_and_frozen():
    policy, given = small_llama(), copy.deepcopy(small_llama(seed=5))
    network = build_feature_network(policy, given, EBFTSettings(), Accelerator(cpu=True))
    assert network.model is given
    assert not any(p.requires_grad for p in given.parameters()) and not given.training
    assert all(p.requires_grad for p in policy.parameters())


def test_quantization_needs_a_name():
    with pytest.raises(ValueError, match="feature_model_name_or_path"):
        EBFTSettings(feature_quantization="4bit")


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="feature_dtype='int7'"):
        EBFTSettings(feature_dtype="int7")


def test_a_network_that_cannot_be_loaded_is_named_with_its_option(tmp_path):
    missing = str(tmp_path / "missing")
    message = f"^feature_model_name_or_path='{missing}' is not a local folder, and could not be"
    with pytest.raises(OSError, match=message):
        make_trainer(tmp_path, feature_model_name_or_path=missing)
