"""Decoder layers compiled one by one, for passes over packed rows.

Layers of one class share what is compiled, so that a model costs one graph and not one per layer.
Passes that go on from a cache (sampling) and those without a mask of their own (plain rows) have
many shapes and stay as they are.

accelerate can compile layers, too (`compile_regions`). It puts a copy of the model in the policy's
place, in which the head is compiled as well, and hooks are traced: the feature network and the head
in chunks need both as they were. Here `forward` alone is compiled, with every hook around it (of
FSDP2, of the feature network), whatever wraps the model later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import TrainingArguments

from hf_ebft.packed.flex import compiled
from hf_ebft.packed.model_parts import CACHE_ARGUMENTS, decoder_layers


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


class CompiledForward:
    """A layer's forward that is compiled where it reads a packed row.

    It belongs to one layer and is copied with it.

    Args:
        layer: whose `forward` this becomes.
        options: of the compiler.
    """

    def __init__(self, layer: nn.Module, options: CompileOptions) -> None:
        self.layer, self.options = layer, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own forward returns."""
        run = _compiled_run(self.options) if _Switch.on and _reads_packed_row(kwargs) else _run
        return run(self.layer, *args, **kwargs)


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


@cache
def _compiled_run(options: CompileOptions) -> Callable[..., Any]:
    """One for the process, so that layers share it."""
    return options.compile(_run)


def _reads_packed_row(arguments: dict[str, Any]) -> bool:
    if any(arguments.get(name) is not None for name in (*CACHE_ARGUMENTS, "layer_past")):
        return False
    mask = arguments.get("attention_mask")
    return isinstance(mask, BlockMask) or (isinstance(mask, Tensor) and mask.dim() == 4)
