"""Decoder layers compiled one by one, for passes over packed rows.

Layers of one class share what is compiled, so that a model costs one graph and not one per layer,
with a cache, too: see `hf_ebft.packed.layer_caches`. Passes without a mask of their own (plain
rows) and those against a cache that is not ours have many shapes and stay as they are.

accelerate can compile layers, too (`compile_regions`). It puts a copy of the model in the policy's
place, in which the head is compiled as well, and hooks are traced: the feature network and the head
in chunks need both as they were. Here `forward` alone is compiled, with every hook around it (of
FSDP2, of the feature network), whatever wraps the model later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import TrainingArguments

from hf_ebft.packed.flex import compiled
from hf_ebft.packed.layer_caches import CacheByLayer, NumberedModules
from hf_ebft.packed.model_parts import CACHE_ARGUMENTS, decoder_layers

# How decoder layers call the cache.
_CACHES = (*CACHE_ARGUMENTS, "layer_past")
# Modes in which inductor captures graphs of its own, and the same without: what is compiled for a
# decoding step runs inside of a capture.
_CAPTURING_MODES = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}


@dataclass(frozen=True)
class CompileOptions:
    """How TorchDynamo compiles.

    Attributes:
        backend: see `torch.compile`.
        mode: see there; None: the backend's own.
        fullgraph: raise where a layer cannot be one graph, for tests.
    """

    backend: str = "inductor"
    mode: str | None = None
    fullgraph: bool = False

    @classmethod
    def of(cls, args: TrainingArguments) -> CompileOptions | None:
        """What `torch_compile` and its companions ask for; None where they ask for nothing."""
        if not args.torch_compile:
            return None
        return cls(args.torch_compile_backend or "inductor", args.torch_compile_mode)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled anew for each shape."""
        return compiled(function, backend=self.backend, mode=self.mode, fullgraph=self.fullgraph)

    @property
    def for_captures(self) -> CompileOptions:
        """The same, for what a CUDA graph may hold."""
        return replace(self, mode=_CAPTURING_MODES.get(str(self.mode), self.mode))


class CompiledForward:
    """A layer's forward that is compiled where it reads a packed row.

    It belongs to one layer and is copied with it.

    Args:
        layer: whose `forward` this becomes.
        options: of the compiler.
    """

    def __init__(self, layer: nn.Module, options: CompileOptions) -> None:
        self.layer, self.options = layer, options
        self.numbered = NumberedModules(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own forward returns."""
        if not (_Switch.on and _has_own_mask(kwargs)):
            return _run(self.layer, *args, **kwargs)
        name = next((name for name in _CACHES if kwargs.get(name) is not None), None)
        if name is None:
            return _compiled_run(self.options)(self.layer, *args, **kwargs)
        cache, number = kwargs[name], self.numbered.number
        if number is None or not (isinstance(cache, CacheByLayer) and cache.few_shapes):
            return _run(self.layer, *args, **kwargs)
        with cache.of_layer(number, kwargs["attention_mask"]) as own, self.numbered.as_first():
            run = _compiled_run_with_cache(self.options.for_captures)
            return run(self.layer, *args, **{**kwargs, name: own})


class _Switch:
    on = True


@contextmanager
def layers_as_written() -> Iterator[None]:
    """Compiled layers run uncompiled within the context, for shapes that are met once."""
    before, _Switch.on = _Switch.on, False
    try:
        yield
    finally:
        _Switch.on = before


def compile_layers(model: nn.Module, options: CompileOptions) -> None:
    """Compile the decoder layers of a model, in place; before the model is wrapped or sharded.

    Args:
        model: the policy or feature network, bare or wrapped by PEFT.
        options: of the compiler.

    Raises:
        ValueError: no list of decoder layers, see `decoder_layers`, or a layer whose forward
            something has replaced.
    """
    for layer in decoder_layers(model):
        given = layer.__dict__.get("forward")
        if given is not None and not isinstance(given, CompiledForward):
            raise ValueError(
                f"torch_compile=True, but something has replaced the forward of "
                f"{type(layer).__name__} (accelerate's hooks of device_map, for example), which "
                "would be lost. Load the model without device_map, or leave torch_compile off."
            )
        layer.forward = CompiledForward(layer, options)


def _run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # By the class as it is now: FSDP2 changes it, and checkpointing depends on it.
    return type(layer).forward(layer, *args, **kwargs)


def _run_with_cache(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Another function than `_run`: torch limits how often the code of one is compiled.
    return type(layer).forward(layer, *args, **kwargs)


@cache
def _compiled_run(options: CompileOptions) -> Callable[..., Any]:
    """One for the process, so that layers share it."""
    return options.compile(_run)


@cache
def _compiled_run_with_cache(options: CompileOptions) -> Callable[..., Any]:
    """The same for passes with a cache."""
    return options.compile(_run_with_cache)


def _has_own_mask(arguments: dict[str, Any]) -> bool:
    mask = arguments.get("attention_mask")
    return isinstance(mask, BlockMask) or (isinstance(mask, Tensor) and mask.dim() == 4)
