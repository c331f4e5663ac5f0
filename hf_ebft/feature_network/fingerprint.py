"""A fingerprint of the feature network phi, to detect another network when a run is resumed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_ebft.feature_network.network import FrozenNetwork


@dataclass(frozen=True)
class Fingerprint:
    """Equal for networks with the same weights, on any device and process.

    Attributes:
        digest: hash of the names, shapes and exact sums of the bits of all weights.
        dtypes: data types of the weights. In another precision, the same network has another
            digest.
    """

    digest: str
    dtypes: str


def fingerprint_of(network: FrozenNetwork) -> Fingerprint:
    """The fingerprint of a network as it is now; all processes get the main process's.

    A collective call that reads all weights once.
    """
    weights = _weights_in_use(network)
    sums = {name: _bit_sum(weight) for name, weight in weights.items()}
    # One transfer from the device for all of them.
    values = torch.stack([*sums.values()]).tolist() if sums else []
    described = [
        [name, list(weights[name].shape), value]
        for name, value in sorted(zip(sums, values, strict=True))
    ]
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    dtypes = ", ".join(sorted({str(weight.dtype)[6:] for weight in weights.values()}))
    found: list[Any] = broadcast_object_list([Fingerprint(digest, dtypes)])
    fingerprint: Fingerprint = found[0]
    return fingerprint


def _weights_in_use(network: FrozenNetwork) -> dict[str, Tensor]:
    """Weights by the names that they have without adapters.

    For a PEFT model these are the weights of the base, and of adapters that change the output.
    Adapters that start at zero are left out: they have random weights, which differ between two
    starts of a script, but no effect.
    """
    model = network.model
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    if not isinstance(prefix, str):
        return weights
    groups: dict[str, dict[str, Tensor]] = {}
    base: dict[str, Tensor] = {}
    for name, weight in weights.items():
        layer, mark, _ = name.partition(f".{prefix}")
        if mark:
            groups.setdefault(layer, {})[name] = weight
        else:
            base[name.removeprefix("base_model.model.").replace(".base_layer", "")] = weight
    if network.shared:
        return base
    for adapter in groups.values():
        if all(bool(weight.any()) for weight in adapter.values()):
            base |= adapter
    return base


def _bit_sum(weight: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as integers: exact in any order and on any device."""
    whole = weight.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    if whole.is_meta:  # the main process has the real weights
        return torch.zeros((), dtype=torch.int64)
    if hasattr(whole, "__tensor_flatten__"):  # a tensor made of several, such as a quantized one
        names, _ = whole.__tensor_flatten__()
        return torch.stack([_bit_sum(getattr(whole, name)) for name in names]).sum()
    bits = whole.contiguous().view(-1).view(torch.uint8)
    if bits.storage_offset() % 8:
        bits = bits.clone()
    # Summing words of eight bytes is many times faster than summing elements. Integer overflow
    # wraps around, in the same way on every device.
    words = bits[: len(bits) // 8 * 8].view(torch.int64)
    return words.sum() + bits[8 * len(words) :].sum(dtype=torch.int64)
