"""Placement decisions: facts in, decision out."""

import dataclasses

import pytest
import torch

from hf_ebft.feature_network.placement import Facts, choose_placement

GIB = 2**30
FACTS = Facts(
    device=torch.device("cuda", 0),
    visible_devices=1,
    processes=1,
    fsdp=False,
    not_shareable="the policy has no adapters, so all its weights change",
    network_bytes=2 * GIB,
    policy_bytes=2 * GIB,
    free_bytes=80 * GIB,
)


def facts(**changes):
    return dataclasses.replace(FACTS, **changes)


@pytest.mark.parametrize(
    ("situation", "kind", "device"),
    [
        (facts(), "replicated", "cuda:0"),
        (facts(not_shareable=None), "shared", "cuda:0"),
        (facts(not_shareable=None, visible_devices=2), "shared", "cuda:0"),
        (facts(visible_devices=2), "replicated", "cuda:1"),
        (facts(visible_devices=2, device=torch.device("cuda", 1)), "replicated", "cuda:0"),
        # Several processes: the second device belongs to another process.
        (facts(visible_devices=2, processes=2), "replicated", "cuda:0"),
        (facts(processes=8, fsdp=True), "replicated", "cuda:0"),
        # 2 GiB of network beside 4 * 2 / 8 GiB of policy.
        (facts(processes=8, fsdp=True, free_bytes=3 * GIB), "replicated", "cuda:0"),
        (facts(processes=8, fsdp=True, free_bytes=3 * GIB - 1), "sharded", "cuda:0"),
        (facts(processes=8, fsdp=True, not_shareable=None), "shared", "cuda:0"),
        (facts(device=torch.device("cpu")), "replicated", "cpu"),
    ],
)
def test_auto(situation, kind, device):
    placement = choose_placement("auto", situation)
    assert (placement.kind, placement.device) == (kind, torch.device(device))


@pytest.mark.parametrize(
    ("request_", "situation", "kind", "device"),
    [
        ("same_device", facts(visible_devices=2), "replicated", "cuda:0"),
        ("second_device", facts(visible_devices=2), "replicated", "cuda:1"),
        ("cpu", facts(), "replicated", "cpu"),
        ("cuda:3", facts(), "replicated", "cuda:3"),
        ("meta", facts(), "replicated", "meta"),
        ("sharded", facts(processes=2), "sharded", "cuda:0"),
        ("shared", facts(not_shareable=None), "shared", "cuda:0"),
    ],
)
def test_explicit_requests_are_met(request_, situation, kind, device):
    placement = choose_placement(request_, situation)
    assert (placement.kind, placement.device) == (kind, torch.device(device))


@pytest.mark.parametrize(
    ("request_", "situation", "message"),
    [
        ("shared", facts(), "the policy has no adapters"),
        ("second_device", facts(), "sees 1 device"),
        ("second_device", facts(visible_devices=2, processes=2), "works with one process only"),
        ("sharded", facts(), "only one process"),
        ("gpu2", facts(), "neither one of auto, shared"),
    ],
)
def test_impossible_requests_are_refused(request_, situation, message):
    with pytest.raises(ValueError, match=message):
        choose_placement(request_, situation)


def test_the_memory_is_described_in_one_line():
    situation = facts(processes=4, network_bytes=8 * GIB)
    line = choose_placement("sharded", situation).describe(situation)
    assert "2.000 GiB per process" in line and "\n" not in line
    shared = facts(not_shareable=None)
    assert "0.000 GiB" in choose_placement("auto", shared).describe(shared)
