"""One accelerator: the same numbers as on the CPU, and flex_attention in both directions."""

import copy

import pytest
import torch

from hf_ebft.objective.losses import policy_gradient_loss
from hf_ebft.objective.whitening import whiten
from hf_ebft.packed.deferred import TrainingPass
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.sampling import Rollouts, make_generator, sample_rollouts
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from tests.support.distributed_runs import VOCABULARY, make_trainer, small_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]
DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")


def batch(device):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (2, 64), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 50:] = 0
    documents = Documents.from_inputs(
        {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    )
    blocks = find_blocks(documents, stride=8, context_length=8, generate_max_len=4)
    layout = PackedLayout(documents, blocks, 3, 4)
    tokens = torch.randint(1, VOCABULARY, layout.rollout_shape, generator=generator)
    return Rollouts(tokens.to(device), blocks.exists, layout)


def loss_and_gradients(model, attention, checkpointing=None, training_chunk_size=10_000):
    rollouts = batch(next(model.parameters()).device)
    forward = PackedForward.for_model(model, attention)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
    training = TrainingPass(
        forward,
        temperature=0.7,
        with_document=False,
        chunk_size=64,
        training_chunk_size=training_chunk_size,
    )
    log_probs = training.log_probs(model, rollouts).rollout
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(log_probs.shape[:3], generator=generator).to(log_probs.device)
    policy_gradient_loss(log_probs, advantages, rollouts.layout).backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    exists = rollouts.exists[:, None, :, None]
    return torch.where(exists, log_probs.detach(), 0.0).cpu(), gradients


def assert_agree(left, right, tolerance):
    torch.testing.assert_close(left[0], right[0], rtol=tolerance, atol=tolerance)
    for name, gradient in right[1].items():
        torch.testing.assert_close(left[1][name], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "split"])
def test_packed_attention_agrees_with_the_cpu(attention):
    model = small_llama()
    reference = loss_and_gradients(copy.deepcopy(model), attention)
    assert_agree(loss_and_gradients(model.to(DEVICE), attention), reference, 1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "split"])
def test_chunks_of_rollouts_agree_with_the_whole_row(attention):
    """Forward passes during the backward pass, which autograd runs in a thread of the device."""
    model = small_llama().to(DEVICE)
    whole = loss_and_gradients(copy.deepcopy(model), attention)
    assert_agree(loss_and_gradients(model, attention, training_chunk_size=20), whole, 1e-5)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_compiled_flex_attention_agrees_with_the_dense_mask(checkpointing):
    model = small_llama().to(DEVICE)
    dense = loss_and_gradients(copy.deepcopy(model), "sdpa")
    assert_agree(loss_and_gradients(model, "flex_attention", checkpointing), dense, 2e-3)


def test_sampling_is_repeatable_and_finite():
    model = small_llama().to(DEVICE)
    forward = PackedForward.for_model(model)
    layout = batch(DEVICE).layout
    drawn = [
        sample_rollouts(
            model,
            forward,
            layout,
            temperature=0.6,
            top_p=0.9,
            chunk_size=64,
            generator=make_generator(DEVICE, 1, 2),
        ).tokens
        for _ in range(2)
    ]
    assert torch.equal(*drawn)


def test_whitening_agrees_with_the_cpu():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, 96, generator=generator), torch.randn(40, 96, generator=generator)
    x[:5, 1] = x[:5, 0]
    here, there = whiten(x, y), whiten(x.to(DEVICE), y.to(DEVICE))
    for left, right in zip(here, there, strict=True):
        torch.testing.assert_close(left, right.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"bf16": True, "peft": True}])
def test_training_runs(tmp_path, settings):
    trainer = make_trainer(tmp_path, use_cpu=False, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4


def test_feature_network_on_the_cpu_gives_the_same_embeddings(tmp_path):
    here = make_trainer(tmp_path, use_cpu=False, feature_placement="same_device")
    away = make_trainer(tmp_path, use_cpu=False, feature_placement="cpu")
    rollouts = batch(DEVICE)
    left, right = (trainer.feature_network.embed(rollouts) for trainer in (here, away))
    assert right.generated.device.type == DEVICE.type
    torch.testing.assert_close(left.generated, right.generated, rtol=1e-4, atol=1e-5)
