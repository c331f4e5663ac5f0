"""Compiles decoder layers one by one, for passes over packed rows.

Layers of one class share their compiled code, so that a model needs one graph and not one per
layer. This also holds for passes with a cache, see `hf_ebft.packed.layer_caches`. Two kinds of
passes have many shapes and are not compiled: passes without an explicit mask (plain rows without
padding) and passes with a cache of another class.

accelerate can also compile layers (`compile_regions`). It replaces the policy by a copy in which
the head is compiled, too, and hooks are traced. The feature network and the chunked head need the
hooks and the head uncompiled. This module compiles a layer's `forward` alone. All hooks (of FSDP2,
of the feature network) stay outside it, whatever wraps the model later.
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

# Names of the argument by which decoder layers take the cache.
_CACHES = (*CACHE_ARGUMENTS, "layer_past")
# Modes in which inductor captures CUDA graphs -> the same mode without. The compiled code of a
# decoding step runs inside our own capture, where another capture is impossible.
_CAPTURING_MODES = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}


@dataclass(frozen=True)
class CompileOptions:
    """Options of `torch.compile`.

    Attributes:
        backend: see `torch.compile`.
        mode: see `torch.compile`; None: the backend's default.
        fullgraph: raise if a layer cannot be compiled as one graph (for tests).
    """

    backend: str = "inductor"
    mode: str | None = None
    fullgraph: bool = False

    @classmethod
    def of(cls, args: TrainingArguments) -> CompileOptions | None:
        """The options of `torch_compile`, `torch_compile_backend` and `torch_compile_mode`.

        None if `torch_compile` is False.
        """
        if not args.torch_compile:
            return None
        return cls(args.torch_compile_backend or "inductor", args.torch_compile_mode)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function; it is recompiled for each new shape."""
        return compiled(function, backend=self.backend, mode=self.mode, fullgraph=self.fullgraph)

    @property
    def for_captures(self) -> CompileOptions:
        """The same options for code that runs inside a CUDA graph capture."""
        return replace(self, mode=_CAPTURING_MODES.get(str(self.mode), self.mode))


class CompiledForward:
    """A layer's forward that runs compiled code for packed rows, and otherwise the layer's own.

    It belongs to one layer. A deep copy of the layer copies it, too.

    Args:
        layer: the layer whose `forward` it replaces.
        options: options of the compiler.
    """

    def __init__(self, layer: nn.Module, options: CompileOptions) -> None:
        self.layer, self.options = layer, options
        self.numbered = NumberedModules(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the same as the layer's own forward."""
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
    """Run compiled layers uncompiled within the context, for shapes that occur only once."""
    before, _Switch.on = _Switch.on, False
    try:
        yield
    finally:
        _Switch.on = before


def compile_layers(model: nn.Module, options: CompileOptions) -> None:
    """Compile the decoder layers of a model in place.

    Call it before the model is distributed.

    Args:
        model: the policy or feature network, bare or wrapped by PEFT.
        options: options of the compiler.

    Raises:
        ValueError: the model has no list of decoder layers (see `decoder_layers`), or the forward
            of a layer has already been replaced.
    """
    for layer in decoder_layers(model):
        given = layer.__dict__.get("forward")
        if given is not None and not isinstance(given, CompiledForward):
            raise ValueError(
                f"torch_compile=True replaces the forward of {type(layer).__name__}, but something "
                "else has replaced it already (accelerate's hooks of device_map, for example) and "
                "would be lost. Load the model without device_map, or leave torch_compile off."
            )
        layer.forward = CompiledForward(layer, options)


def uncompile_layers(model: nn.Module) -> None:
    """Undo `compile_layers`, in place, if it was called for this model."""
    for layer in model.modules():
        if isinstance(layer.__dict__.get("forward"), CompiledForward):
            del layer.forward


def _run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Look up the class at each call: FSDP2 changes it, and checkpointing depends on it.
    return type(layer).forward(layer, *args, **kwargs)


def _run_with_cache(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # A separate function from `_run`: torch limits how often one function's code is recompiled.
    return type(layer).forward(layer, *args, **kwargs)


@cache
def _compiled_run(options: CompileOptions) -> Callable[..., Any]:
    """The compiled function, one per process and options, so that layers share it."""
    return options.compile(_run)


@cache
def _compiled_run_with_cache(options: CompileOptions) -> Callable[..., Any]:
    """The compiled function for passes with a cache."""
    return options.compile(_run_with_cache)


def _has_own_mask(arguments: dict[str, Any]) -> bool:
    mask = arguments.get("attention_mask")
    return isinstance(mask, BlockMask) or (isinstance(mask, Tensor) and mask.dim() == 4)
