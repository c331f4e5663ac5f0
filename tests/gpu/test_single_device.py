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
from tests.support.accelerator import DEVICE, ON_CPU, needs_accelerator
from tests.support.distributed_runs import (
    VOCABULARY,
    assert_same_weights,
    full_weights,
    make_trainer,
    small_llama,
)

pytestmark = [pytest.mark.gpu, needs_accelerator]
# flex_attention compiles for heads of 16 or more.
HEAD_DIM = 16


def batch(device, width=64):
    """Two rows, the second one padded, and rollouts that no policy has sampled."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (2, width), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, width - 14 :] = 0
    documents = Documents.from_inputs(
        {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    )
    blocks = find_blocks(documents, stride=8, context_length=8, generate_max_len=4)
    layout = PackedLayout(documents, blocks, 3, 4)
    tokens = torch.randint(1, VOCABULARY, layout.rollout_shape, generator=generator)
    return Rollouts(tokens.to(device), blocks.exists, layout)


def loss_and_gradients(model, attention, checkpointing=None, training_chunk_size=10_000, width=64):
    rollouts = batch(next(model.parameters()).device, width)
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


@pytest.mark.parametrize(("width", "chunk"), [(24, 20), (64, 20), (300, 400)])
@pytest.mark.skipif(ON_CPU, reason="flex_attention has no backward pass on a CPU")
def test_chunks_with_flex_attention_agree_with_the_dense_mask(width, chunk):
    """Against the documents' keys and values, which are computed again after the chunks."""
    model = small_llama(head_dim=HEAD_DIM).to(DEVICE)
    dense = loss_and_gradients(copy.deepcopy(model), "sdpa", width=width)
    found = loss_and_gradients(model, "flex_attention", training_chunk_size=chunk, width=width)
    assert_agree(found, dense, 2e-3)


# Fewer queries than the 128 of a tile, which flex_attention sends to a kernel of their own; several
# tiles, the last of them not full.
@pytest.mark.parametrize("width", [24, 64, 300])
@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.skipif(ON_CPU, reason="flex_attention has no backward pass on a CPU")
def test_flex_attention_agrees_with_the_dense_mask(checkpointing, width):
    model = small_llama(head_dim=HEAD_DIM).to(DEVICE)
    dense = loss_and_gradients(copy.deepcopy(model), "sdpa", width=width)
    found = loss_and_gradients(model, "flex_attention", checkpointing, width=width)
    assert_agree(found, dense, 2e-3)


@pytest.mark.parametrize("width", [24, 64, 300])
def test_flex_attention_samples_what_the_dense_mask_samples(width):
    """Prefill and decoding steps: the same tokens but where rounding moves a threshold."""
    model = small_llama(head_dim=HEAD_DIM).to(DEVICE)
    with torch.compiler.set_stance("force_eager" if ON_CPU else "default"):
        found = sampled(copy.deepcopy(model), "flex_attention", width=width)
    expected = sampled(model, "sdpa", width=width)
    assert (found == expected).float().mean() > 0.98


def sampled(model, attention="auto", **settings):
    """`sampled_by` a forward pass of its own."""
    return sampled_by(PackedForward.for_model(model, attention), model, **settings)


def sampled_by(forward, model, top_p=1.0, width=64, seed=1):
    """Tokens (blocks that exist, n, G), drawn with fixed numbers."""
    rollouts = sample_rollouts(
        model,
        forward,
        batch(DEVICE, width).layout,
        temperature=0.6,
        top_p=top_p,
        chunk_size=64,
        generator=make_generator(DEVICE, seed),
    )
    return rollouts.tokens.transpose(1, 2)[rollouts.exists]


def test_auto_agrees_with_the_cpu():
    """Whatever `auto` chooses on this device."""
    model = small_llama(head_dim=HEAD_DIM)
    reference = loss_and_gradients(copy.deepcopy(model), "split")
    assert_agree(loss_and_gradients(model.to(DEVICE), "auto"), reference, 2e-3)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampling_is_repeatable_and_finite(top_p):
    """The same numbers give the same tokens, in a second call as in a resumed run."""
    model = small_llama(head_dim=HEAD_DIM).to(DEVICE)
    drawn = [sampled(model, top_p=top_p) for _ in range(2)]
    assert torch.equal(*drawn)
    assert bool(((drawn[0] >= 0) & (drawn[0] < VOCABULARY)).all())


def test_whitening_agrees_with_the_cpu():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, 96, generator=generator), torch.randn(40, 96, generator=generator)
    x[:5, 1] = x[:5, 0]
    here, there = whiten(x, y), whiten(x.to(DEVICE), y.to(DEVICE))
    for left, right in zip(here, there, strict=True):
        torch.testing.assert_close(left, right.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["auto", "split"])
def test_batches_of_one_shape_are_sampled_alike(attention):
    """Whatever is kept from one batch for the next of its shapes, as captured decoding steps are,
    a batch draws the tokens that it would draw as the first one."""
    model = small_llama(head_dim=HEAD_DIM).to(DEVICE)
    known = PackedForward.for_model(model, attention)
    found = [sampled_by(known, model, seed=seed) for seed in range(4)]
    expected = [sampled(model, attention, seed=seed) for seed in range(4)]
    # But where rounding moves a threshold.
    assert all((a == b).float().mean() > 0.98 for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[2], found[3])


def trained(tmp_path, **settings):
    """A run of four steps, with heads for which flex_attention compiles."""
    small_llama(head_dim=HEAD_DIM).save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path, use_cpu=ON_CPU, pretrained=tmp_path / "model", **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"bf16": True, "peft": True}])
def test_training_runs(tmp_path, settings):
    trainer = trained(tmp_path, **settings)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4


@pytest.mark.skipif(ON_CPU, reason="takes minutes to compile")
def test_compiled_training_agrees(tmp_path):
    """torch_compile and none, from the same weights on the same rollouts."""
    expected, found = (trained(tmp_path, torch_compile=compiles) for compiles in (False, True))
    assert_same_weights(full_weights(found.model), full_weights(expected.model), 2e-3)


def test_feature_network_on_the_cpu_gives_the_same_embeddings(tmp_path):
    here = make_trainer(tmp_path, use_cpu=ON_CPU, feature_placement="same_device")
    away = make_trainer(tmp_path, use_cpu=ON_CPU, feature_placement="cpu")
    rollouts = batch(DEVICE)
    left, right = (trainer.feature_network.embed(rollouts) for trainer in (here, away))
    assert right.generated.device.type == DEVICE.type
    torch.testing.assert_close(left.generated, right.generated, rtol=1e-4, atol=1e-5)
