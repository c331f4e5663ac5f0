"""The cost of a step's operators on a GPU: kernels, bytes, multiply-adds, and a predicted time.

The model of time is simple:

- The host launches one operator after another. Each launch takes a fixed time; views take less.
- The device's time for an operator is the maximum of three: the minimum time of any kernel, the
  operator's bytes at the speed of the memory, and its multiply-adds at the speed of a large matrix
  product, or of attention.
- An operator starts on the device when it has been launched and the previous one has finished.
- If the host reads a value from the device, it waits until the device has finished all operators.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pretended import PRODUCTS, tensors_in
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten


@dataclass(frozen=True)
class Machine:
    """The speed of a GPU. The defaults are for an H100; those marked "measured" were measured.

    Attributes:
        launch: host seconds per operator with a kernel (measured: 10.7 microseconds).
        view: host seconds per operator without a kernel.
        module: host seconds per call of a module, in addition to its operators.
        replay: device seconds between two kernels of a CUDA graph.
        kernel: minimum device seconds of a kernel.
        bandwidth: bytes per second that kernels read and write.
        products: multiply-adds per second of large matrix products (measured: 775 TFLOP/s).
        float32: the same in float32, with TF32 switched off.
        attention, attention_backward: multiply-adds per second of fused attention.
    """

    launch: float = 10.7e-6
    view: float = 5.5e-6
    module: float = 40e-6
    replay: float = 1.5e-6
    kernel: float = 2.5e-6
    bandwidth: float = 2.2e12
    products: float = 775e12 / 2
    float32: float = 51e12 / 2
    attention: float = 400e12 / 2
    attention_backward: float = 300e12 / 2
    # Through a dense mask (cuDNN's kernels in the measured run).
    masked: float = 200e12 / 2


H100 = Machine()

# Operators that launch nothing, in addition to those that return views.
_FREE = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten._unsafe_view.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten._reshape_alias.default,
}
# Kernels of operators that launch several.
KERNELS = {
    "index_put": 6,
    "index_put_": 6,
    "_index_put_impl_": 6,
    "embedding_dense_backward": 7,
    "sort": 8,
    "nonzero": 4,
    "_unique2": 12,
    "select_backward": 2,
    "slice_backward": 2,
    "cumsum": 1,
    "searchsorted": 1,
    "linalg_eigh": 8,
    "_linalg_eigh": 8,
    "isin": 3,
}
# Operators that read only those entries of their first tensor that they return.
_PICKING = {"index", "gather", "embedding", "index_select", "take_along_dim", "select_scatter"}
# Operators that read nothing.
_FILLING = {"fill_", "zero_", "zeros", "ones", "full", "arange", "new_zeros", "scalar_tensor"}
_REDUCTIONS = {"sum", "amax", "max", "cumsum", "logsumexp", "_softmax", "_log_softmax"}
# Rows with this many entries are too long for a fused kernel to hold while it sums them.
LONG_ROW = 2**14
# Operators that write few of the entries of their first tensor. (In the backward pass autograd
# writes a copy of it while a mode is on, and not otherwise.)
_SCATTERING = {"scatter_add", "scatter_add_", "index_add", "index_add_", "index_copy_"}


@dataclass
class Cost:
    """The cost of some operators.

    Attributes:
        count: number of operators that launch a kernel.
        kernels, bytes, multiply_adds: their kernels, bytes moved and multiply-adds.
        device: sum of the operators' device seconds.
    """

    count: int = 0
    kernels: int = 0
    bytes: int = 0
    multiply_adds: int = 0
    device: float = 0.0

    def add(self, other: Cost) -> None:
        """One more operator."""
        self.count += other.count
        self.kernels += other.kernels
        self.bytes += other.bytes
        self.multiply_adds += other.multiply_adds
        self.device += other.device


@dataclass
class Timeline:
    """Host and device, side by side; seconds since the start."""

    host: float = 0.0
    device: float = 0.0

    def launch(self, host: float, device: float) -> None:
        """The host launches something that keeps the device busy for so long."""
        self.host += host
        self.device = max(self.device, self.host) + device

    def wait(self) -> None:
        """The host waits until the device is done."""
        self.host = self.device = max(self.host, self.device)


@dataclass
class Region:
    """The kernels that a compiled function launches.

    Each matrix product is a kernel of its own. All other operators are fused into the kernels
    between products, one more than there are products. These read the function's inputs and the
    products' results, and write the products' inputs and the function's outputs. Values used only
    inside a fused kernel are not written to memory. Exception: if rows of a whole vocabulary are
    summed, they are read once more, in 16 bits.

    Attributes:
        name: name of the function.
        cost: cost of the products and of fused attention.
        products: number of products.
        bytes: bytes moved by the fused kernels.
    """

    name: str
    cost: Cost = field(default_factory=Cost)
    products: int = 0
    bytes: int = 0
    _own: WeakIdKeyDictionary = field(
        default_factory=lambda: WeakIdKeyDictionary(ref_type=weakref.ref)
    )

    def takes(self, func: Any, args: Any, found: Any) -> bool:
        """Whether an operator belongs to the function; what adds to gradients does not."""
        written = tensors_in(args[:1]) if func._schema.is_mutable else []
        if any(tensor.untyped_storage() not in self._own for tensor in written):
            return False
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in(args)}
        for tensor in tensors_in((found,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._own[storage] = True
        if func._schema.name.removeprefix("aten::") in _REDUCTIONS:
            summed: Tensor = args[0]
            if summed.dim() > 1 and summed.numel() // summed.shape[0] >= LONG_ROW:
                self.bytes += 2 * summed.numel()
        return True

    def multiply(self, cost: Cost, args: Any, found: Any) -> None:
        """A product of the function."""
        self.cost.add(cost)
        self.products += 1
        inside = [t for t in tensors_in(args) if t.untyped_storage() in self._own]
        self.bytes += sum(map(_bytes, (*inside, *tensors_in((found,)))))


class LaunchedWork:
    """Sums the cost of operators, by phase and by the function that launches them.

    Args:
        phase: returns the current phase of the step.
        owner: returns the function that launches an operator, see `held.owner`.
        machine: the GPU.

    Attributes:
        by_phase: costs by phase.
        by_owner: costs by function.
        seconds: seconds by phase, on the timeline.
        busy: seconds in which the device is busy, by phase.
        waits: number of times that the host reads from the device, by phase.
        on_region: called when a compiled function begins or ends.
    """

    def __init__(
        self,
        phase: Callable[[], str],
        owner: Callable[[str, Any], str],
        machine: Machine = H100,
    ) -> None:
        self._phase, self._owner, self.machine = phase, owner, machine
        self._record: list[tuple[str, Cost]] | None = None
        self._regions: list[Region] = []
        self.on_region: Callable[[bool], None] = lambda running: None
        self.start()

    def start(self) -> None:
        """Forget what was counted."""
        self.by_phase: dict[str, Cost] = defaultdict(Cost)
        self.by_owner: dict[str, Cost] = defaultdict(Cost)
        self.seconds: dict[str, float] = defaultdict(float)
        self.waits: dict[str, int] = defaultdict(int)
        self.views: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)
        self.timeline = Timeline()

    def ran(self, func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> None:
        """An operator has run."""
        name = func._schema.name.removeprefix("aten::")
        if self._regions and self._regions[-1].takes(func, args, found):
            if name in PRODUCTS:
                self._regions[-1].multiply(self.cost_of(name, args, kwargs, found), args, found)
            return
        if func in _FREE or _returns_a_view(func):
            self.views[self._phase()] += 1
            self._advance(Cost(), host=self.machine.view, func=func)
            return
        cost = self.cost_of(name, args, kwargs, found)
        self._advance(cost, host=None, func=func)

    def called(self, *_: Any) -> None:
        """A module has been called: code in Python runs on the host."""
        if not self._regions:
            self.calls[self._phase()] += 1
            self._advance(Cost(), host=self.machine.module, func=None)

    def launched(self, name: str, cost: Cost) -> None:
        """Something that stands in for a kernel has run."""
        if self._regions:
            self._regions[-1].cost.add(cost)
            return
        self._advance(cost, host=None, func=None, name=name)

    def begin_region(self, name: str) -> None:
        """What runs from here to `end_region` is compiled: see `Region`."""
        self._regions.append(Region(name))
        self.on_region(True)

    def end_region(self, *outside: Any) -> None:
        """The compiled function begun last ends.

        Args:
            outside: what went into it and what came out.
        """
        region, machine = self._regions.pop(), self.machine
        tensors = [leaf for leaf in tree_leaves(outside) if isinstance(leaf, Tensor)]
        n_bytes = region.bytes + sum(map(_bytes, _distinct(tensors)))
        kernels = region.products + 1
        device = max(kernels * machine.kernel, n_bytes / machine.bandwidth)
        region.cost.add(Cost(kernels, kernels, n_bytes, 0, device))
        self._advance(region.cost, host=None, func=None, name=f"compiled {region.name}")
        self.on_region(bool(self._regions))

    def synchronized(self) -> None:
        """The host waits for the sake of a measurement."""
        self.timeline.wait()

    def waited(self) -> None:
        """The host reads something."""
        self.timeline.wait()
        self.waits[self._phase()] += 1

    def _advance(self, cost: Cost, host: float | None, func: Any, name: str | None = None) -> None:
        phase = self._phase()
        before = max(self.timeline.host, self.timeline.device)
        if host is not None:
            self.timeline.host += host
        else:
            self.timeline.launch(self.machine.launch * max(cost.count, 1), cost.device)
        self.seconds[phase] += max(self.timeline.host, self.timeline.device) - before
        if cost.count:
            who = f"{phase}: {name}" if name else self._owner(phase, func)
            self._count(phase, who, cost)
            if self._record is not None:
                self._record.append((who, cost))

    def _count(self, phase: str, who: str, cost: Cost) -> None:
        self.by_phase[phase].add(cost)
        self.by_owner[who].add(cost)

    @contextmanager
    def recorded(self) -> Iterator[list[tuple[str, Cost]]]:
        """Gives a list that gets whatever is launched within the context."""
        record: list[tuple[str, Cost]] = []
        self._record = record
        try:
            yield record
        finally:
            self._record = None

    def replay(self, record: list[tuple[str, Cost]]) -> None:
        """What was recorded, as a CUDA graph: one launch of the host, and kernels that follow one
        another on the device alone.
        """
        phase, machine = self._phase(), self.machine
        before = max(self.timeline.host, self.timeline.device)
        for who, cost in record:
            in_graph = replace(cost, count=0, device=cost.device + cost.kernels * machine.replay)
            self._count(phase, f"in graphs: {who}", in_graph)
            self.timeline.device = max(self.timeline.device, self.timeline.host) + in_graph.device
        self.timeline.host += machine.launch
        self.seconds[phase] += max(self.timeline.host, self.timeline.device) - before

    def cost_of(self, name: str, args: Any, kwargs: dict[str, Any], found: Any) -> Cost:
        """Of one operator, each of whose kernels reads and writes all that it has to do with."""
        kernels = KERNELS.get(name, 1)
        results = _distinct(tensors_in((found,)))
        inputs = _distinct(tensors_in(args, kwargs))
        if name in _FILLING:
            n_bytes = sum(map(_bytes, results))
        elif name == "copy_":
            n_bytes = _bytes(args[0]) + _bytes(args[1])
        elif name in ("_softmax", "_log_softmax"):
            # Rows of a large vocabulary are read three times: for maximum, sum and result.
            n_bytes = 3 * _bytes(args[0]) + _bytes(results[0])
        elif name in _PICKING:
            n_bytes = 2 * sum(map(_bytes, results)) + sum(map(_bytes, inputs[1:]))
        elif name in _SCATTERING:
            n_bytes = 3 * sum(map(_bytes, inputs[1:]))
        else:
            n_bytes = sum(map(_bytes, inputs)) + sum(map(_bytes, results))
        multiply_adds = 0
        speed = self.machine.products
        if name in PRODUCTS:
            left = args[0] if name in ("mm", "bmm") else args[1]
            result = results[0]
            multiply_adds = result.numel() * left.shape[-1]
            if left.dtype == torch.float32:
                speed = self.machine.float32
        device = max(
            kernels * self.machine.kernel, n_bytes / self.machine.bandwidth, multiply_adds / speed
        )
        return Cost(1, kernels, n_bytes, multiply_adds, device)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _bytes(tensor: Tensor) -> int:
    """Bytes behind a tensor: repeated entries (of a stride of 0) count once."""
    entries = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= size if stride != 0 else min(size, 1)
    return entries * tensor.element_size()


def _returns_a_view(func: Any) -> bool:
    if func._schema.is_mutable:
        return False
    return any(result.alias_info is not None for result in func._schema.returns)
