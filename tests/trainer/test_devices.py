"""A whole run with the policy on one device and the feature network on another.

The devices are pretended (`tests/support/pretended_devices.py`), so that no machine is too small
for this test. It was born from rollouts that stayed on the CPU in the first run on a GPU.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor

from hf_ebft import EBFTTrainer
from hf_ebft.feature_network import network
from hf_ebft.objective import losses
from hf_ebft.packed import decoding, drawing, split_attention, step_views, targets
from hf_ebft.rows import documents, layout
from hf_ebft.training import metrics, random_streams
from tests.support.pretended_devices import MixedDevicesError, PretendedDevices
from tests.support.tiny import config, texts, tiny_llama, weights_of

POLICY, PHI = "xpu:0", "xpu:1"
LENGTHS = (21, 30, 13, 5)


@pytest.fixture
def devices() -> Iterator[PretendedDevices]:
    """Two of them; nothing of it reaches the next test."""
    try:
        with PretendedDevices() as pretended:
            yield pretended
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def trained(folder: Path, device: str, **settings: Any) -> EBFTTrainer:
    """A run with the policy on a device."""
    defaults = {"max_steps": 1, "ce_coef": 0.1, "feature_placement": "same_device"}
    args = config(folder, **(defaults | settings))
    args.device  # noqa: B018  (it sets accelerate up)
    args.__dict__["_setup_devices"] = torch.device(device)
    PartialState._shared_state["device"] = torch.device(device)
    trainer = EBFTTrainer(
        tiny_llama(num_hidden_layers=4),
        args,
        train_dataset=texts(*LENGTHS),
        eval_dataset=texts(17, seed=1),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        {"packed_attention": "sdpa", "kl_coef": 0.1, "top_p": 0.9},
        {"packed_attention": "eager", "gradient_checkpointing": True, "ema_decay": 0.9},
        {"training_chunk_size": 12, "rollout_batch_size": 1, "embed_method": "mean_pooling"},
        {"whitening_space": "corpus", "pad_to_multiple_of": 8, "advantage_estimator": "group_norm"},
        {"max_steps": 2, "use_whitening": False, "advantage_estimator": "fitted"},
        {"verify_packing": True, "whitening_space": "sample", "ce_coef": 0.0},
    ],
    ids=["default", "sdpa", "eager", "chunks", "corpus", "fitted", "verified"],
)
def test_two_devices_train_as_one(
    tmp_path: Path, devices: PretendedDevices, settings: dict[str, Any]
) -> None:
    """No operator mixes devices, and every weight ends as in a run on the CPU, to the last bit."""
    trainer = trained(tmp_path, POLICY, feature_placement=PHI, **settings)
    assert devices.mixed == []
    assert trainer.model.device == torch.device(POLICY)
    assert trainer.feature_network.device == torch.device(PHI)
    expected = weights_of(trained(tmp_path, "cpu", **settings).model)
    actual = {name: weight.to("cpu") for name, weight in weights_of(trainer.model).items()}
    start = weights_of(tiny_llama(num_hidden_layers=4))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert not any(torch.equal(actual[name], start[name]) for name in expected)


# ---- Does it find what it is there for? ---------------------------------------------------------


class ForgetfulTorch:
    """The module `torch` as a module of ours would use it that forgets to say `device`."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("arange", "zeros", "ones", "empty", "full", "tensor", "rand", "from_numpy"):
            return found
        # Called by whatever has no device to copy.
        return lambda *args, device=None, **kwargs: found(*args, **kwargs)


@pytest.mark.parametrize(
    "module",
    [layout, documents, split_attention, metrics, decoding, drawing, step_views],
    ids=lambda module: module.__name__,
)
def test_a_forgotten_device_is_found(
    tmp_path: Path, devices: PretendedDevices, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    """Every module that makes tensors in a step, each with `device` left out once."""
    monkeypatch.setattr(module, "torch", ForgetfulTorch())
    # A decoding step that fails is not an end, but is remembered.
    with contextlib.suppress(MixedDevicesError):
        trained(tmp_path, POLICY)
    assert devices.mixed and "on cpu" in devices.mixed[0]


def _embeddings_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    embed = network.FeatureNetwork.embed

    def stays(self: Any, *args: Any) -> network.FeaturePass:
        found = embed(self, *args)
        return dataclasses.replace(found, generated=found.generated.to(self.device))

    monkeypatch.setattr(network.FeatureNetwork, "embed", stays)


def _places_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    make = targets.KeptPlaces.for_layout

    def on_host(*args: Any, **kwargs: Any) -> targets.KeptPlaces:
        found = make(*args, **kwargs)
        return dataclasses.replace(found, index_of=found.index_of.to("cpu"))

    monkeypatch.setattr(targets.KeptPlaces, "for_layout", on_host)


def _generator_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    make = random_streams.make_generator
    monkeypatch.setattr(
        random_streams, "make_generator", lambda device, *entropy: make(torch.device("cpu"), 1)
    )


def _loss_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = losses.per_rollout_token_mean

    def in_numpy(values: Tensor, *args: Any) -> Tensor:
        values.detach().numpy()
        return mean(values, *args)

    monkeypatch.setattr(losses, "per_rollout_token_mean", in_numpy)


@pytest.mark.parametrize(
    "plant",
    [_embeddings_that_stay, _places_in_the_hosts_memory, _generator_on_the_cpu, _loss_in_numpy],
)
def test_a_planted_fault_is_found(
    tmp_path: Path, devices: PretendedDevices, monkeypatch: pytest.MonkeyPatch, plant: Any
) -> None:
    """Tensors, generators and arrays that are not where the others are."""
    plant(monkeypatch)
    with pytest.raises(MixedDevicesError):
        trained(tmp_path, POLICY, feature_placement=PHI)


def test_what_a_pretended_device_allows(devices: PretendedDevices) -> None:
    """As torch: copies, numbers of the CPU, indices of the CPU, gradients across devices."""
    here, there = (torch.arange(4.0, device=device) for device in (POLICY, PHI))
    assert (here + torch.tensor(2.0)).device == torch.device(POLICY)
    assert here[torch.tensor([1, 2])].device == torch.device(POLICY)
    assert here[1:].view(3).device == here.device != there.device
    assert here.to(POLICY) is here and here.to(there).device == there.device
    for mix in (lambda: here + there, lambda: here + torch.arange(4.0), lambda: here.numpy()):
        with pytest.raises(MixedDevicesError):
            mix()
    with pytest.raises(MixedDevicesError):
        here[torch.tensor([1], device=PHI)]
    with contextlib.suppress(MixedDevicesError):
        torch.rand(2, device=POLICY, generator=torch.Generator(PHI))
    assert len(devices.mixed) == 5
    weight = torch.ones(4, device=POLICY, requires_grad=True)
    (weight.to(PHI) * there).sum().backward()
    assert weight.grad is not None and weight.grad.device == here.device
    assert weight.grad.tolist() == [0, 1, 2, 3]
