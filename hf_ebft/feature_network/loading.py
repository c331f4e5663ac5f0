"""Builds the feature network: loads or copies it, sets its precision and its device."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import AutoModelForCausalLM

from hf_ebft.config import EBFTSettings, FeatureMatchingArguments
from hf_ebft.feature_network.network import FeatureNetwork, FrozenNetwork
from hf_ebft.feature_network.placement import Facts, Placement, choose_placement, visible_devices
from hf_ebft.feature_network.shared_base import why_not_shareable
from hf_ebft.packed.compiled_layers import CompileOptions
from hf_ebft.packed.fsdp import copy_from_main_process, free_memory, full_bytes, is_sharded, shard
from hf_ebft.packed.model_parts import bare_model, vocabulary_size
from hf_ebft.packed.supported import attention_of
from hf_ebft.packed.verification import verify_packing

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=FrozenNetwork)

RAM_EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def build_feature_network(
    policy: nn.Module,
    given: nn.Module | None,
    settings: EBFTSettings,
    accelerator: Accelerator,
    *,
    compiler: CompileOptions | None = None,
) -> FeatureNetwork:
    """Build the feature network that the settings ask for, for packed rows, placed and frozen.

    Args:
        policy, given, settings, accelerator: see `build_placed_network`.
        compiler: compiles the layers of the network, if given.

    Raises:
        ValueError: as `build_placed_network`, or the network is not exact on packed rows.
    """

    def make(model: nn.Module, *, shared: bool, device: torch.device) -> FeatureNetwork:
        return FeatureNetwork(
            model,
            feature_layers=settings.feature_layers,
            embed_method=settings.embed_method,
            normalization=settings.feature_normalization,
            # A shared network is the policy's model, so it has the policy's attention.
            packed_attention=attention_of(model) if shared else settings.packed_attention,
            chunk_size=settings.training_chunk_size,
            shared=shared,
            device_type=device.type,
            compiler=compiler,
        )

    network = build_placed_network(policy, given, settings, accelerator, make)
    # A copy of the policy needs no check of its own: the policy is checked.
    is_other_model = given is not None or settings.feature_model_name_or_path is not None
    if is_other_model and settings.verify_packing and not is_sharded(network.model):
        verify_packing(network.model, network.forward)
    return network


def build_placed_network(
    policy: nn.Module,
    given: nn.Module | None,
    settings: FeatureMatchingArguments,
    accelerator: Accelerator,
    make: Callable[..., Network],
) -> Network:
    """Build the feature network that the settings ask for, placed and frozen.

    All processes must call this together, once, before the policy is wrapped. They get the same
    placement.

    Args:
        policy: the unwrapped policy that training starts from.
        given: the user's own network. None: the model at `feature_model_name_or_path`, or a copy
            of the policy if that is unset.
        settings: the trainer's settings.
        accelerator: the trainer's accelerator.
        make: `make(model, shared=..., device=...)` returns a frozen network from a model that will
            run on that device.

    Raises:
        ValueError: two networks are given, the vocabulary differs from the policy's, or the
            placement is not possible.
    """
    own = _load_own(given, policy, settings)
    facts = _gather_facts(policy, own, settings, accelerator)
    placement = choose_placement(settings.feature_placement, facts)
    if accelerator.is_main_process:
        logger.info(placement.describe(facts))
    if placement.kind == "shared":
        return make(policy, shared=True, device=accelerator.device)
    network = make(
        own if own is not None else _copy_of(policy, settings, accelerator),
        shared=False,
        device=placement.device,
    )
    _place(network, placement, settings)
    return network


def ram_efficient_fsdp(accelerator: Accelerator) -> bool:
    """Whether only the main process holds the policy's weights until FSDP2 distributes them."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return bool(plugin is not None and plugin.cpu_ram_efficient_loading)


def _load_own(
    given: nn.Module | None, policy: nn.Module, settings: FeatureMatchingArguments
) -> nn.Module | None:
    """The network that the user gave or named, or None if there is none."""
    path = settings.feature_model_name_or_path
    if given is not None and path is not None:
        raise ValueError(
            f"Both feature_network and feature_model_name_or_path={path!r} are given, but there is "
            "one feature network only; keep one of the two."
        )
    if given is not None:
        _refuse_shared_parameters(given, policy)
    elif path is not None:
        given = _load(path, settings, bare_model(policy).dtype)
    if given is not None:
        _require_same_vocabulary(given, policy)
        if settings.feature_dtype is not None and settings.feature_quantization is None:
            given = given.to(getattr(torch, settings.feature_dtype))
    return given


def _load(path: str, settings: FeatureMatchingArguments, policy_dtype: torch.dtype) -> nn.Module:
    dtype = getattr(torch, settings.feature_dtype) if settings.feature_dtype else policy_dtype
    arguments: dict[str, Any] = {"dtype": dtype}
    if settings.feature_quantization is not None:
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=settings.feature_quantization == "8bit",
            load_in_4bit=settings.feature_quantization == "4bit",
            bnb_4bit_compute_dtype=dtype,
        )
    with _loading_on_every_process(), naming_option("feature_model_name_or_path", path):
        return AutoModelForCausalLM.from_pretrained(path, **arguments)


@contextmanager
def naming_option(option: str, path: str) -> Iterator[None]:
    """Put the option that names a model before the error if the model cannot be loaded.

    The message of transformers names neither the option nor, without a network, the model.

    Args:
        option: name of the option.
        path: its value, a local folder or a name on the hub.
    """
    try:
        yield
    except OSError as error:
        local = os.path.exists(path)
        tried = "" if local else "is not a local folder, and "
        source = "" if local else " from the hub"
        raise OSError(
            f"{option}={path!r} {tried}could not be loaded{source}: {' '.join(str(error).split())}"
        ) from error


@contextmanager
def _loading_on_every_process() -> Iterator[None]:
    """Let every process load the weights, where FSDP would load them on the main process only.

    FSDP2 later distributes the policy's weights from the main process, but not those of the feature
    network.
    """
    before = os.environ.get(RAM_EFFICIENT_LOADING)
    os.environ[RAM_EFFICIENT_LOADING] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[RAM_EFFICIENT_LOADING]
        else:
            os.environ[RAM_EFFICIENT_LOADING] = before


def _copy_of(
    policy: nn.Module, settings: FeatureMatchingArguments, accelerator: Accelerator
) -> nn.Module:
    if ram_efficient_fsdp(accelerator) and accelerator.num_processes > 1:
        duplicate = copy_from_main_process(policy)
    else:
        duplicate = copy.deepcopy(policy)
    if settings.feature_dtype is not None:
        duplicate = duplicate.to(getattr(torch, settings.feature_dtype))
    return duplicate


def _place(
    network: FrozenNetwork, placement: Placement, settings: FeatureMatchingArguments
) -> None:
    if settings.feature_quantization is None:  # bitsandbytes places its weights while loading
        network.model.to(placement.device)
    if placement.kind == "sharded":
        shard(network.model)


def _gather_facts(
    policy: nn.Module,
    own: nn.Module | None,
    settings: FeatureMatchingArguments,
    accelerator: Accelerator,
) -> Facts:
    """Gather facts that are equal on all processes.

    The main process decides whether the policy's base can be shared. Free memory is the smallest of
    all processes.
    """
    if own is not None:
        not_shareable: str | None = "another model was given as feature network"
    elif settings.feature_dtype is not None:
        not_shareable = f"feature_dtype={settings.feature_dtype} asks for another precision"
    elif accelerator.is_main_process:
        not_shareable = why_not_shareable(policy)
    else:
        not_shareable = None
    not_shareable = broadcast_object_list([not_shareable])[0]

    device = accelerator.device
    network_bytes = full_bytes(own if own is not None else policy)
    if own is None and settings.feature_dtype is not None:
        element = getattr(torch, settings.feature_dtype).itemsize
        network_bytes = sum(p.numel() for p in policy.parameters()) * element
    free = torch.tensor([free_memory(device)], dtype=torch.int64, device=device)
    return Facts(
        device=device,
        visible_devices=visible_devices(device),
        processes=accelerator.num_processes,
        fsdp=bool(getattr(accelerator.state, "fsdp_plugin", None)),
        not_shareable=not_shareable,
        network_bytes=network_bytes,
        policy_bytes=full_bytes(policy),
        free_bytes=int(accelerator.gather(free).min()),
    )


def _require_same_vocabulary(network: nn.Module, policy: nn.Module) -> None:
    own, others = vocabulary_size(network), vocabulary_size(policy)
    if own != others:
        raise ValueError(
            f"The feature network embeds {own} token ids, but the policy {others}. Both must have "
            "the same tokenizer, since the feature network reads the policy's rollouts. "
            "Choose a feature network of the same family; or, if only the padding of the "
            "embeddings differs, make their sizes equal with resize_token_embeddings."
        )


def _refuse_shared_parameters(network: nn.Module, policy: nn.Module) -> None:
    own = {id(parameter) for parameter in policy.parameters()}
    if any(id(parameter) in own for parameter in network.parameters()):
        raise ValueError(
            "feature_network shares parameters with the policy, so freezing it would freeze the "
            "policy. Leave it out to get a frozen copy, or pass copy.deepcopy(model)."
        )
