"""Several devices on a machine that has none: every tensor is on the CPU and says where it claims
to be.

    with PretendedDevices() as devices:
        model.to("xpu:0")
        ...
    assert devices.mixed == []

Inside, a tensor's `device` is the one that it was made on or moved to, by the storage that it
shares with its views. An operator whose tensors are on several devices fails, as it would on real
ones: so does one that mixes a pretended device with the CPU, where factory functions without a
`device` put their tensors. Allowed is what torch allows: copies between devices, CPU tensors
without dimensions (numbers), CPU indices into a tensor.

Two modes of torch do it: one sees calls by their Python names, where devices are named, the other
every operator that runs, the backward pass included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# A device type that torch knows, that needs no CUDA code paths, and that nobody here has.
PRETENDED = "xpu"
CPU = torch.device("cpu")

aten = torch.ops.aten
# Whose tensors may be on two devices.
_COPIES = {aten.copy_.default, aten._to_copy.default}
# Whose indices may be on the CPU.
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# What reads the name of a device and makes no tensor.
_NAMING = (torch.device, torch._C._nn._parse_to)


class MixedDevicesError(RuntimeError):
    """An operator got tensors of several devices."""


class PretendedDevices(contextlib.AbstractContextManager["PretendedDevices"]):
    """Switches the pretence on.

    Attributes:
        mixed: every mix so far. Code may catch the error; this list remembers.
    """

    def __init__(self) -> None:
        self.mixed: list[str] = []
        # Storages by address. A weak reference keeps the address from being used again.
        self._known: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self.target: torch.device | None = None  # asked for by the call that is running
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PretendedDevices:
        self._stack.enter_context(_stand_ins(self))
        self._stack.enter_context(_Operators(self))
        self._stack.enter_context(_Calls(self))
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.close()

    def device_of(self, tensor: Tensor) -> torch.device:
        """Where a tensor claims to be."""
        with torch._C.DisableTorchFunctionSubclass():
            known = self._known.get(tensor.untyped_storage()._cdata)
        return CPU if known is None else known[1]

    def put(self, tensor: Tensor, device: torch.device) -> None:
        """Let a tensor, and whatever shares its storage, claim to be somewhere."""
        with torch._C.DisableTorchFunctionSubclass():
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known or self._known[storage._cdata][1] != device:
                self._known[storage._cdata] = StorageWeakRef(storage), device

    def fail(self, what: str) -> None:
        """Raise, and remember it."""
        self.mixed.append(what)
        raise MixedDevicesError(what)


class _Move(torch.autograd.Function):
    """A copy on another device, whose gradient comes back."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, devices: PretendedDevices, target: torch.device
    ) -> Tensor:
        ctx.devices, ctx.source = devices, devices.device_of(tensor)
        moved = tensor.clone()
        devices.put(moved, target)
        return moved

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        back = gradients[0].clone()
        ctx.devices.put(back, ctx.source)
        return back, None, None


class _Calls(TorchFunctionMode):
    """Hears of devices by name: reads them off the call, and answers what a tensor's device is."""

    def __init__(self, devices: PretendedDevices) -> None:
        super().__init__()
        self.devices = devices

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
            with self:  # else this mode is off for what the backward pass computes
                return torch.autograd.backward(*args, **kwargs)
        if func is torch.Tensor.cpu:
            func, args = torch.Tensor.to, (args[0], CPU)
        if func is torch.Tensor.get_device:
            device = self.devices.device_of(args[0])
            return -1 if device.type == "cpu" else device.index
        if func == torch.Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return self.devices.device_of(args[0]).type == "cpu"
        reads = func in (torch.Tensor.numpy, torch.Tensor.__array__)
        if reads and (device := self.devices.device_of(args[0])) != CPU:
            self.devices.fail(f"numpy cannot read a tensor on {device}")
        targets: list[torch.device] = []

        def on_cpu(value: Any) -> Any:
            device = _as_device(value)
            if device is None:
                return value
            targets.append(device)
            return CPU

        args, kwargs = tree_map(on_cpu, (args, dict(kwargs)))
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            targets.append(self.devices.device_of(args[1]))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        generator = kwargs.get("generator")
        if generator is not None:
            where = [*targets, *map(self.devices.device_of, tensors), CPU][0]
            if generator.device != where:
                self.devices.fail(
                    f"{func} draws on {where}, its generator is on {generator.device}"
                )
        before, self.devices.target = self.devices.target, targets[0] if targets else None
        try:
            found = func(*args, **kwargs)
        finally:
            self.devices.target = before
        if targets and isinstance(found, Tensor) and self.devices.device_of(found) != targets[0]:
            return _Move.apply(found, self.devices, targets[0])
        return found


def _as_device(value: Any) -> torch.device | None:
    """The device that an argument names, if it names one."""
    if isinstance(value, torch.device):
        return value
    if isinstance(value, str) and value.partition(":")[0] in ("cpu", PRETENDED):
        return torch.device(value)
    return None


class _Operators(TorchDispatchMode):
    """Checks the tensors of every operator, and says where its results are."""

    def __init__(self, devices: PretendedDevices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        target = self.devices.target
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        if not inputs:  # a factory function
            for result in results:
                self.devices.put(result, target or CPU)
            return found
        if func in _COPIES:
            where = self.devices.device_of(inputs[0])
        else:
            # Alone it decides; beside others, a number of the CPU goes along.
            where = self._common_device(func, inputs)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        for result in results:
            if result.untyped_storage()._cdata not in known:  # else a view, or the input itself
                self.devices.put(result, where)
        return found

    def _common_device(self, func: Any, inputs: list[Tensor]) -> torch.device:
        of_input = [(tensor, self.devices.device_of(tensor)) for tensor in inputs]
        counted = of_input
        if func in _INDEXING:
            counted = of_input[:1] + [
                (tensor, device)
                for tensor, device in of_input[1:]
                if device != CPU or tensor.is_floating_point()
            ]
        several = {str(device) for tensor, device in counted if tensor.dim() > 0 or device != CPU}
        if len(several) > 1:
            self.devices.fail(
                f"{func} got "
                + ", ".join(f"{tuple(tensor.shape)} on {device}" for tensor, device in of_input)
            )
        return torch.device(several.pop()) if several else CPU


class PretendedGenerator(torch.Generator):
    """A generator that claims to be on the device that it was asked for."""

    def __new__(cls, device: Any = CPU) -> PretendedGenerator:
        generator = super().__new__(cls, CPU)
        generator.pretended = torch.device(device)  # type: ignore[attr-defined]
        return generator

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it claims to be."""
        return self.pretended  # type: ignore[attr-defined, no-any-return]

    def manual_seed(self, seed: int) -> PretendedGenerator:
        """Seed it and return it."""
        super().manual_seed(seed)
        return self


@contextlib.contextmanager
def _stand_ins(devices: PretendedDevices) -> Iterator[None]:
    """What is asked of a device and not of a tensor."""
    module = getattr(torch, PRETENDED)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch, "Generator", PretendedGenerator),
            (torch.accelerator, "synchronize", lambda device=None: None),
            (torch.accelerator, "device_count", lambda: 2),
            (torch.accelerator, "get_memory_info", lambda device=None: (2**40, 2**40)),
            (module, "get_rng_state", lambda device=None: torch.get_rng_state()),
            (module, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)),
            # Else torch.autograd.grad is one call, in which the mode for calls is off.
            (torch.autograd, "has_torch_function", lambda tensors: False),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        # On the class, so that it answers inside of other calls, too.
        answer = property(devices.device_of)
        stack.enter_context(mock.patch.object(torch.Tensor, "device", answer))
        yield
