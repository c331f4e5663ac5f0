"""A pretended GPU: a step's own code runs on tensors that have shapes but no values.

    with PretendedGPU(observers=[...]) as gpu:
        trainer.training_step(...)

Within the context, tensors put on "cuda" are tensors of torch's device "meta" that claim to be on
"cuda". They take no memory, and operators on them compute only shapes. Tensors on the CPU are real.

Some values that the host reads from the device decide shapes (the lengths of documents, the
positions of blocks). So integers that are computed from data of the host are also computed on the
CPU. All other values that the host reads are zeros. Every read is recorded, because on a GPU the
host would wait for the device.

Autocast is not modelled, because torch has none for the device "meta". Weights in bfloat16 are.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol
from unittest import mock

import torch
import torch._dynamo  # before anything has a stand-in: it looks functions up by what they are
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

GPU = torch.device("cuda", 0)
META = torch.device("meta")
CPU = torch.device("cpu")
# Integer tensors with more entries than this are not computed on the CPU.
KNOWN_AT_MOST = 2**22

aten = torch.ops.aten
# Operators by which the host reads from the device, and so waits for it.
_READS = {aten._local_scalar_dense.default, aten.equal.default}
# Operators that check values; here all checks pass.
_CHECKS: dict[Any, bool] = {
    torch.isfinite: True,
    torch.Tensor.isfinite: True,
    torch.isnan: False,
    torch.Tensor.isnan: False,
}
# Functions that access memory directly.
_DATA = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)
# Matrix products.
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "baddbmm_", "addmm_"}
# Functions that take the name of a device but make no tensor.
_NAMING = (torch.device, torch._C._nn._parse_to)


class Observer(Protocol):
    """Hears of every operator that runs on the pretended device."""

    def ran(self, func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> None:
        """An operator has run."""

    def waited(self) -> None:
        """The host has read something off the device."""

    def synchronized(self) -> None:
        """The host has waited for the device without reading."""


class KnownValues:
    """Values of integers on the device that follow from what the host has sent there.

    By storage, so that views and changes in place need no care: what is known of a storage is a
    tensor on the CPU of its size, and a view of it is computed as a view of that.
    """

    def __init__(self) -> None:
        self._by_storage = WeakIdKeyDictionary(ref_type=weakref.ref)

    def of(self, tensor: Tensor) -> Tensor | None:
        """The value of a tensor, sharing memory with that of its storage; None: not known."""
        flat: Tensor | None = self._by_storage.get(tensor.untyped_storage())
        if flat is None or flat.dtype != tensor.dtype:
            return None
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def learn(self, tensor: Tensor, value: Tensor) -> None:
        """What a new storage holds, seen through a tensor that lies in it."""
        storage = tensor.untyped_storage()
        n_entries = storage.nbytes() // tensor.element_size()
        if value.dtype != tensor.dtype or n_entries > KNOWN_AT_MOST:
            return
        flat = torch.zeros(n_entries, dtype=tensor.dtype)
        flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(value)
        self._by_storage[storage] = flat

    def forget(self, tensor: Tensor) -> None:
        """Something unknown was written."""
        self._by_storage.pop(tensor.untyped_storage(), None)


class PretendedGPU(contextlib.AbstractContextManager["PretendedGPU"]):
    """Switches the pretence on.

    Args:
        observers: hear of every operator.
        stand_ins: further objects, names and values to put in their places.

    Attributes:
        known: values of integers on the device.
        functions: what to call in the place of functions of torch, where their first argument is
            on the device.
        stand_ins: see above; before the context is entered, more can be added.
    """

    def __init__(
        self,
        observers: Sequence[Observer] = (),
        stand_ins: Sequence[tuple[Any, str, Any]] = (),
    ) -> None:
        self.observers, self.known = list(observers), KnownValues()
        self.stand_ins = list(stand_ins)
        self.functions: dict[Any, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PretendedGPU:
        for owner, name, value in (*_stand_ins(self), *self.stand_ins):
            self._stack.enter_context(mock.patch.object(owner, name, value))
        self._stack.enter_context(_Operators(self))
        self._stack.enter_context(_Calls(self.functions))
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.close()


class _Calls(TorchFunctionMode):
    """Puts "meta" in the place of "cuda" wherever a call names a device.

    Args:
        functions: that stand in for others of torch where their first argument is on the device.
    """

    def __init__(self, functions: dict[Any, Any]) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NAMING:
            return func(*args, **kwargs)
        if func is torch.Tensor.backward:
            kwargs["grad_tensors"] = kwargs.pop("gradient", None)
            func = torch.autograd.backward
        if func in (torch.autograd.backward, torch.autograd.grad):
            with self:  # else this mode is off for what the backward pass computes
                return func(*args, **kwargs)
        if func is torch.Tensor.cpu:
            func, args = torch.Tensor.to, (args[0], CPU)
        if func in _DATA and args[0].is_meta:  # else they would read memory that is not there
            if func is not torch.Tensor.tolist:
                raise TypeError(f"{func.__name__} of a tensor that is on {GPU}")
            with self:
                args = (args[0].to(CPU),)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func in _CHECKS and args[0].is_meta:
            return torch.full(args[0].shape, _CHECKS[func], device=META)
        if func in self._functions and args[0].is_meta:
            with self:
                return self._functions[func](*args, **kwargs)
        # Devices are named at the top of a call, never in lists.
        args = tuple(map(_really, args))
        kwargs = {name: _really(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _really(value: Any) -> Any:
    """Where a device really is."""
    if isinstance(value, torch.device):
        return META if value.type == GPU.type else value
    if isinstance(value, str) and value.partition(":")[0] == GPU.type:
        return META
    # One of the CPU, whatever it claims: on the device nothing is drawn.
    return None if isinstance(value, PretendedGenerator) and value.device == GPU else value


class _Operators(TorchDispatchMode):
    """Answers what the host reads, follows known values, and tells the observers."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in(args, kwargs)
        if not any(tensor.is_meta for tensor in inputs):
            if _really(kwargs.get("device")) != META:
                return func(*args, **kwargs)
            kwargs = {**kwargs, "device": META}
        if func in _READS:
            return self._read(func, args)
        to = kwargs.get("device")
        if func is aten._to_copy.default and to is not None and torch.device(to).type == "cpu":
            return self._fetch(args[0], kwargs)
        if func is aten.copy_.default and not args[0].is_meta:
            self._tell_of_wait()
            value = self.gpu.known.of(args[1])
            return args[0].copy_(value) if value is not None else args[0].zero_()
        if func is aten.index.Tensor:
            args = (args[0], [place for index in args[1] for place in self._as_places(index)])
            inputs = tensors_in(args)
        elif torch.Tag.dynamic_output_shape in func.tags:
            return self._by_values(func, args, kwargs)
        # Torch's own functions for shapes must see where tensors really are.
        with _Claim.withdrawn():
            found = func(*args, **kwargs)
            self._follow(func, args, kwargs, inputs, found)
        for observer in self.gpu.observers:
            observer.ran(func, args, kwargs, found)
        return found

    def _tell_of_wait(self) -> None:
        for observer in self.gpu.observers:
            observer.waited()

    def _read(self, func: Any, args: tuple[Any, ...]) -> Any:
        """A number, or whether two tensors are equal: of unknown values they are."""
        self._tell_of_wait()
        values = [self.gpu.known.of(tensor) for tensor in args]
        if all(value is not None for value in values):
            return func(*values)
        if func is aten.equal.default:
            return True
        return torch.zeros((), dtype=args[0].dtype).item()

    def _fetch(self, tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """A copy on the host."""
        self._tell_of_wait()
        value = self.gpu.known.of(tensor)
        if value is None:
            value = torch.zeros(tensor.shape, dtype=tensor.dtype)
        return value.to(kwargs.get("dtype") or tensor.dtype, copy=True)

    def _by_values(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator whose values decide its shape, and make the host wait.

        Raises:
            NotImplementedError: they are not known.
        """
        self._tell_of_wait()
        known = self.gpu.known

        def value_of(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_meta:
                return leaf
            value = known.of(leaf)
            if value is None:
                raise NotImplementedError(f"{func} of values that are not known has no shape")
            return value

        def on_device(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            placed = torch.empty_like(leaf, device=META)
            known.learn(placed, leaf)
            return placed

        found = tree_map(on_device, func(*tree_map(value_of, args), **tree_map(value_of, kwargs)))
        for observer in self.gpu.observers:
            observer.ran(func, args, kwargs, found)
        return found

    def _as_places(self, index: Any) -> Sequence[Any]:
        """A boolean index as the places where it is true, one index for each of its dimensions."""
        if not isinstance(index, Tensor) or index.dtype != torch.bool or not index.is_meta:
            return (index,)
        places: Tensor = self._by_values(aten.nonzero.default, (index,), {})
        # A mode is off in its own operators, so that this is followed by hand.
        found = []
        for dimension in range(index.dim()):
            place = torch.empty(places.shape[0], dtype=places.dtype, device=META)
            value = self.gpu.known.of(places)
            if value is not None:
                self.gpu.known.learn(place, value[:, dimension])
            found.append(place)
        return found

    def _follow(
        self, func: Any, args: Any, kwargs: dict[str, Any], inputs: list[Tensor], found: Any
    ) -> None:
        """Compute the operator on what is known of its tensors, or forget what it writes."""
        known = self.gpu.known
        writes = func._schema.is_mutable
        results = tensors_in((found,))
        if not writes and not any(map(_may_be_known, results)):
            return
        values = {id(tensor): known.of(tensor) if tensor.is_meta else tensor for tensor in inputs}
        follows = torch.Tag.nondeterministic_seeded not in func.tags and not any(
            value is None for value in values.values()
        )
        if not follows:
            if writes:
                for tensor in _written(func, args, kwargs):
                    known.forget(tensor)
            return
        real = tree_map(lambda leaf: values.get(id(leaf), leaf), (args, dict(kwargs)))
        real[1].update({"device": CPU} if "device" in kwargs else {})
        value = func(*real[0], **real[1])
        # What an operator writes in place shares memory with what is known of it.
        old = {tensor.untyped_storage()._cdata for tensor in inputs}
        for result, new in zip(results, tensors_in((value,)), strict=True):
            if result.untyped_storage()._cdata not in old and _may_be_known(result):
                known.learn(result, new)


def _may_be_known(tensor: Tensor) -> bool:
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return whole and tensor.numel() <= KNOWN_AT_MOST


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operator writes."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        yield from tensors_in((given,))


def tensors_in(args: Iterable[Any], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The tensors among the arguments or results of an operator, and in lists of them."""
    found = []
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [leaf for leaf in value if isinstance(leaf, Tensor)]
    return found


class PretendedGenerator(torch.Generator):
    """A generator that claims to be on the device that it was asked for."""

    pretended: torch.device

    def __new__(cls, device: Any = CPU) -> PretendedGenerator:
        generator = super().__new__(cls, CPU)  # type: ignore[call-arg]
        generator.pretended = torch.device(device)
        return generator

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it claims to be."""
        return GPU if self.pretended.type == GPU.type else self.pretended

    def manual_seed(self, seed: int) -> PretendedGenerator:
        """Seed it and return it."""
        super().manual_seed(seed)
        return self


_TRUE_DEVICE: Any = torch.Tensor.device


class _Claim:
    """Whether tensors say that they are on the pretended device."""

    on = True

    @classmethod
    @contextlib.contextmanager
    def withdrawn(cls) -> Iterator[None]:
        """They do not, within the context."""
        before, cls.on = cls.on, False
        try:
            yield
        finally:
            cls.on = before


def _device_of(tensor: Tensor) -> torch.device:
    device: torch.device = _TRUE_DEVICE.__get__(tensor)
    return GPU if _Claim.on and device.type == META.type else device


def _stand_ins(gpu: PretendedGPU) -> list[tuple[Any, str, Any]]:
    """What is asked of a device and not of a tensor."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def synchronize(device: Any = None) -> None:
        for observer in gpu.observers:
            observer.synchronized()

    def no_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    return [
        (torch, "Generator", PretendedGenerator),
        (torch.accelerator, "synchronize", synchronize),
        (torch.accelerator, "device_count", lambda: 1),
        (torch.accelerator, "get_memory_info", lambda device=None: (80 * 2**30, 80 * 2**30)),
        (torch.cuda, "synchronize", synchronize),
        (torch.cuda, "device", no_context),
        (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", nothing),
        # Else torch.autograd.grad is one call, in which the mode for calls is off.
        (torch.autograd, "has_torch_function", lambda tensors: False),
        # On the class, so that it answers inside of other calls, too.
        (torch.Tensor, "device", property(_device_of)),
        (torch.Tensor, "is_cuda", property(lambda tensor: _device_of(tensor).type == GPU.type)),
    ]
