"""Support for FSDP2: gathering parameters for sampling, sharding the feature network, and copying
weights from the main process.

Dimension letters: G tokens of a rollout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from hf_ebft.packed.model_parts import bare_model, decoder_layers


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards this model."""
    return isinstance(model, FSDPModule)


@contextmanager
def parameters_gathered(model: nn.Module, reshard_after: bool) -> Iterator[None]:
    """Keep each layer's parameters gathered from its first forward pass to the end of the context.

    Otherwise each of the G passes of sampling would gather the whole model again. Here only the
    first pass gathers it. This needs memory for the unsharded weights.

    Args:
        model: the wrapped policy; if FSDP2 does not shard it, nothing happens.
        reshard_after: value to which the layers' `reshard_after_forward` is reset.
    """
    units = _resharding_units(model) if is_sharded(model) else []
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(reshard_after, recurse=False)


class SamplingGather:
    """Decides, at the first sampling, whether FSDP2 keeps the policy gathered while it samples.

    Args:
        choice: the setting `gather_params_for_sampling`.
        accelerator: the run's accelerator.
    """

    def __init__(self, choice: str, accelerator: Accelerator) -> None:
        self._choice = choice
        self._accelerator = accelerator
        self._gathers: bool | None = None

    def __call__(self, model: nn.Module) -> AbstractContextManager[None]:
        """The context in which to sample. All processes must call this together."""
        if not is_sharded(model):
            return nullcontext()
        if self._gathers is None:
            self._gathers = self._choice == "true" or (
                self._choice == "auto" and gathering_fits(model, self._accelerator)
            )
        plugin = self._accelerator.state.fsdp_plugin
        if not self._gathers or not plugin.reshard_after_forward:
            return nullcontext()
        return parameters_gathered(model, reshard_after=True)


def _resharding_units(model: nn.Module) -> list[FSDPModule]:
    """The sharded modules that are resharded after forward: layers, and an untied embedding.

    accelerate keeps the root and the tail (final norm, head and a tied embedding) gathered.
    """
    base = bare_model(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    modules = [module for layer in decoder_layers(model) for module in layer.modules()]
    if embedding is not None and (head is None or embedding.weight is not head.weight):
        modules.append(embedding)
    return [module for module in modules if isinstance(module, FSDPModule)]


def shard(model: nn.Module) -> None:
    """Shard a frozen model over all processes, layer by layer, in place."""
    for layer in decoder_layers(model):
        fully_shard(layer)
    fully_shard(model)


def full_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights, unsharded."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def free_memory(device: torch.device) -> int:
    """Free bytes of a device's memory (for a CPU: of the machine's memory)."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.accelerator.get_memory_info(device)[0])


def gathering_fits(model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether the unsharded weights take at most half of the free memory of every process.

    All processes must call this together, and all get the same answer.
    """
    device = accelerator.device
    free = torch.tensor([free_memory(device)], dtype=torch.int64, device=device)
    return full_bytes(model) <= int(accelerator.gather(free).min()) // 2


def copy_from_main_process(model: nn.Module) -> nn.Module:
    """Make a full copy of the main process's model on every process.

    With accelerate's `cpu_ram_efficient_loading`, only the main process has real weights. They are
    sent to the other processes instead of being loaded from the hub again, so that the copy equals
    the policy even if it was warm-started. All processes must call this together.
    """
    duplicate = copy.deepcopy(model)
    device = PartialState().device
    if any(parameter.is_meta for parameter in duplicate.parameters()):
        duplicate = duplicate.to_empty(device="cpu")
        bare_model(duplicate).tie_weights()
    with torch.no_grad():
        for tensor in (*duplicate.parameters(), *duplicate.buffers()):
            tensor.copy_(broadcast(tensor.detach().to(device, copy=True)))
    return duplicate
