"""Decides where the feature network lives: once, from facts that are equal on all processes.

Nothing here touches a model: functions take facts and return a decision with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

NamedPlacement = Literal["auto", "shared", "same_device", "second_device", "cpu", "sharded"]
NAMED_PLACEMENTS: tuple[NamedPlacement, ...] = get_args(NamedPlacement)
Kind = Literal["shared", "replicated", "sharded"]

# Under FSDP2 the policy is placed after the feature network. It then needs memory for weights,
# gradients and two Adam moments, each split over the processes.
POLICY_STATES = 4


@dataclass(frozen=True)
class Facts:
    """The facts that the decision depends on.

    Attributes:
        device: the policy's device on this process.
        visible_devices: number of accelerators of this type that the process sees.
        processes: number of processes.
        fsdp: whether the policy will be sharded by FSDP2.
        not_shareable: the reason why the policy's base weights cannot serve as feature network;
            None if they can.
        network_bytes: size of the feature network's weights.
        policy_bytes: size of the policy's weights.
        free_bytes: free memory of the device, the smallest over all processes.
    """

    device: torch.device
    visible_devices: int
    processes: int
    fsdp: bool
    not_shareable: str | None
    network_bytes: int
    policy_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Placement:
    """The decision: `kind`, the device, and the reason, for one line of the log."""

    kind: Kind
    device: torch.device
    reason: str

    def extra_bytes(self, facts: Facts) -> int:
        """Memory that the feature network adds on its device, per process."""
        if self.kind == "shared":
            return 0
        return facts.network_bytes // (facts.processes if self.kind == "sharded" else 1)

    def describe(self, facts: Facts) -> str:
        """One line for the log: where the network lives, its memory, and the reason."""
        gigabytes = self.extra_bytes(facts) / 2**30
        return (
            f"Feature network: {self.kind} on {self.device}, {gigabytes:.3f} GiB per process "
            f"({self.reason})."
        )


def choose_placement(request: str, facts: Facts) -> Placement:
    """Decide where the feature network lives.

    Args:
        request: one of `NAMED_PLACEMENTS` or a torch device such as "cuda:1".
        facts: the facts of this run.

    Raises:
        ValueError: the request cannot be met; the message says why and what to write instead.
    """
    if request == "auto":
        return _choose_automatically(facts)
    if request == "shared":
        if facts.not_shareable is not None:
            raise ValueError(
                f"feature_placement='shared' is not possible: {facts.not_shareable}. Use 'auto', "
                "which makes a frozen copy."
            )
        return Placement("shared", facts.device, "asked for")
    if request == "same_device":
        return Placement("replicated", facts.device, "asked for")
    if request == "second_device":
        return Placement("replicated", _second_device(facts), "asked for")
    if request == "sharded":
        if facts.processes == 1:
            raise ValueError(
                "feature_placement='sharded' splits the feature network over processes, but there "
                "is only one process. Launch several, or use 'same_device' or 'cpu'."
            )
        return Placement("sharded", facts.device, "asked for")
    try:
        device = torch.device(request)
    except RuntimeError as error:
        raise ValueError(
            f"feature_placement={request!r} is neither one of {', '.join(NAMED_PLACEMENTS)} nor a "
            "device such as 'cuda:1'."
        ) from error
    return Placement("replicated", device, "asked for")


def _choose_automatically(facts: Facts) -> Placement:
    if facts.not_shareable is None:
        return Placement(
            "shared", facts.device, "the policy's frozen base serves as feature network"
        )
    if facts.processes == 1 and facts.visible_devices > 1:
        return Placement(
            "replicated", _second_device(facts), "one process, and a second device is visible"
        )
    if not facts.fsdp:
        return Placement("replicated", facts.device, f"a copy is needed: {facts.not_shareable}")
    reserved = POLICY_STATES * facts.policy_bytes // facts.processes
    if facts.network_bytes + reserved <= facts.free_bytes:
        return Placement("replicated", facts.device, "fits beside the policy's shard")
    return Placement(
        "sharded",
        facts.device,
        f"{facts.network_bytes / 2**30:.1f} GiB would not fit beside the policy's shard into "
        f"{facts.free_bytes / 2**30:.1f} GiB",
    )


def _second_device(facts: Facts) -> torch.device:
    if facts.visible_devices < 2:
        raise ValueError(
            f"feature_placement='second_device' needs two devices, but this process sees "
            f"{facts.visible_devices} device(s) of type {facts.device.type!r}. Make two visible, "
            "or use 'same_device' or 'cpu'."
        )
    if facts.processes > 1:
        raise ValueError(
            f"feature_placement='second_device' works with one process only: with "
            f"{facts.processes} processes, the second device already holds another process's "
            "policy. Use 'same_device', 'sharded' or 'cpu'."
        )
    first = facts.device.index or 0
    return torch.device(facts.device.type, 1 if first == 0 else 0)


def visible_devices(device: torch.device) -> int:
    """Number of accelerators of this device's type that the process sees; 1 for the CPU."""
    if device.type == "cpu":
        return 1
    return torch.accelerator.device_count()
