"""Stand-ins for functions compiled by `torch.compile`, on a pretended device.

They run uncompiled, but are counted as a compiler would fuse them (`launched.Region`). For the
backward pass they keep the function's inputs, and the inputs and outputs of matrix products and of
fused attention, which are in memory anyway. All other values are recomputed, as torch's partitioner
would do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from launched import LaunchedWork
from pretended import META, PRODUCTS, tensors_in
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary


class _Kept:
    """What is kept of a tensor for the backward pass: itself, or its shape.

    Attributes:
        tensor: None once the function has ended, unless it is kept.
        packed: what gradient checkpointing, around the function, keeps in its place.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.packed: Any = None
        self.form = (tensor.shape, tensor.stride(), tensor.dtype)


class CompiledFunctions:
    """Makes stand-ins for compiled functions.

    Args:
        work: is told where they begin and end.
    """

    def __init__(self, work: LaunchedWork) -> None:
        self._work = work
        self._depth = 0
        # Storages that the function running wrote by other operators than products.
        self._cheap = WeakIdKeyDictionary(ref_type=weakref.ref)

    def ran(self, func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> None:
        """Note what the backward pass could compute again."""
        if self._depth == 0:
            return
        if func._schema.name.removeprefix("aten::") in PRODUCTS:
            self.keep(*tensors_in(args))
            return
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in(args, kwargs)}
        for tensor in tensors_in((found,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._cheap[storage] = True

    def waited(self) -> None:
        """Nothing."""

    def synchronized(self) -> None:
        """Nothing."""

    def keep(self, *tensors: Tensor) -> None:
        """These are written to memory, or read from there, by kernels that are not run twice."""
        for tensor in tensors:
            self._cheap.pop(tensor.untyped_storage(), None)

    def stand_in(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is counted as if it were compiled."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._depth > 0:
                return function(*args, **kwargs)
            name, found = function.__name__, None
            self._work.begin_region(name)
            self._depth += 1
            try:
                args, kwargs = self._marked(_Start, (args, kwargs), name)
                kept: list[_Kept] = []
                outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
                with torch.autograd.graph.saved_tensors_hooks(*_hooks(kept, outer)):
                    found = function(*args, **kwargs)
                self._let_go(kept, outer)
                found = self._marked(_End, found, name)
            finally:
                # Gradient checkpointing ends its second run by an error.
                self._depth -= 1
                self._cheap.clear()
                self._work.end_region(args, kwargs, found)
            return found

        return run

    def _marked(self, mark: Any, tree: Any, name: str) -> Any:
        """The tensors with a gradient, each the result of one function."""
        leaves, structure = tree_flatten(tree)
        places = [
            place
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_grad_enabled()
        ]
        if places:
            marked = mark.apply(self._work, name, *(leaves[place] for place in places))
            for place, tensor in zip(places, marked, strict=True):
                leaves[place] = tensor
        return tree_unflatten(leaves, structure)

    def _let_go(self, kept: list[_Kept], outer: Any) -> None:
        """The function has ended: keep no more than the backward pass gets."""
        for entry in kept:
            tensor, entry.tensor = entry.tensor, None
            assert tensor is not None
            if tensor.is_meta and tensor.untyped_storage() in self._cheap:
                continue
            if outer is None:
                entry.tensor = tensor
            else:
                entry.packed = outer[0](tensor)


def _hooks(kept: list[_Kept], outer: Any) -> tuple[Callable[[Tensor], _Kept], Any]:
    """What is kept of a tensor, and the tensor again.

    Args:
        kept: gets whatever is kept.
        outer: the same of what runs the function (gradient checkpointing), or None.
    """

    def pack(tensor: Tensor) -> _Kept:
        # Detached: a result that is kept must not hold the function that keeps it.
        kept.append(_Kept(tensor.detach()))
        return kept[-1]

    def unpack(entry: _Kept) -> Tensor:
        if entry.tensor is not None:
            return entry.tensor
        if entry.packed is not None:
            found: Tensor = outer[1](entry.packed)
            return found
        shape, stride, dtype = entry.form
        return torch.empty_strided(shape, stride, dtype=dtype, device=META)

    return pack, unpack


class _Start(torch.autograd.Function):
    """What goes into a compiled function. Its gradient is the last that the function computes."""

    @staticmethod
    def forward(ctx: Any, work: LaunchedWork, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.work = work
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.work.end_region(gradients)
        return (None, None, *gradients)


class _End(torch.autograd.Function):
    """What comes out of a compiled function. Its gradient is the first that it gets."""

    @staticmethod
    def forward(ctx: Any, work: LaunchedWork, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.work, ctx.name = work, name
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.work.begin_region(f"{ctx.name}, backward")
        return (None, None, *gradients)
