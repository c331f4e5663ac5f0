"""Peak memory of a step on a pretended device, and the functions that allocated it."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pretended import PRODUCTS, tensors_in
from torch.utils.weak import WeakIdKeyDictionary

# torch's caching allocator for CUDA rounds allocations up to a multiple of this many bytes.
BLOCK = 512
# An allocation is attributed to the innermost function in files with these path parts.
_TELLING = ("/hf_ebft/", "/transformers/models/", "/benchmarks/naive")


class HeldMemory:
    """Follows every storage of the device from its allocation until it is freed.

    Args:
        phase: returns the current phase of the step.
        block: allocations are rounded up to a multiple of this many bytes.

    Attributes:
        held: bytes allocated now.
        peak: maximum of `held` since `start`, minus the bytes held at `start`.
        at_peak: bytes by the function that allocated them, approximately at the peak.
        by_phase: the peak of every phase, minus the bytes held at `start`.
    """

    def __init__(self, phase: Callable[[], str], block: int = BLOCK) -> None:
        self._phase, self._block = phase, block
        self._known = WeakIdKeyDictionary(ref_type=weakref.ref)
        # Results of compiled functions that are running, and the functions that wrote them. A fused
        # kernel may never write them to memory.
        self._fused = WeakIdKeyDictionary(ref_type=weakref.ref)
        self._in_region = False
        self._by_owner: Counter[str] = Counter()
        self.held = self._most = 0
        self.start()

    def start(self) -> None:
        """Begin a measurement: subtract the bytes held now from later results."""
        self._before = self.held
        self._owners_before = Counter(self._by_owner)
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.by_phase: dict[str, int] = {}
        self._reported = 0

    def ran(self, func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> None:
        """Note the storages of an operator's results."""
        name = func._schema.name.removeprefix("aten::")
        if self._in_region and name in PRODUCTS:
            for tensor in tensors_in(args):
                self._reach_memory(tensor.untyped_storage())
        for tensor in tensors_in((found,)):
            storage = tensor.untyped_storage()
            if not tensor.is_meta or storage in self._known or storage in self._fused:
                continue
            big = storage.nbytes() >= 2**20
            who = owner(self._phase(), func) if big else "small tensors"
            if self._in_region and name not in PRODUCTS:
                self._fused[storage] = who
            else:
                self._note(storage, who)

    def region(self, running: bool) -> None:
        """A compiled function begins, or the outermost one has ended.

        What it writes, other than the results of products, is in memory if a product reads it or if
        it is there at the end.
        """
        self._in_region = running
        if not running:
            for storage in list(self._fused.keys()):
                self._reach_memory(storage)

    def _reach_memory(self, storage: torch.UntypedStorage) -> None:
        who = self._fused.pop(storage, None)
        if who is not None:
            self._note(storage, who)

    def _note(self, storage: torch.UntypedStorage, name: str) -> None:
        """A new storage."""
        size = -(-storage.nbytes() // self._block) * self._block
        self._known[storage] = size
        weakref.finalize(storage, self._release, size, name).atexit = False
        self.held += size
        self._most = max(self._most, self.held)
        self._by_owner[name] += size
        held = self.held - self._before
        phase = self._phase()
        if held > self.by_phase.get(phase, 0):
            self.by_phase[phase] = held
        if held > self.peak:
            self.peak = held
            if held > 1.002 * self._reported:
                self._reported = held
                self.at_peak = dict(self._by_owner - self._owners_before)

    @contextmanager
    def watching(self) -> Iterator[Callable[[], int]]:
        """Gives the most bytes held within the context so far."""
        self._most = self.held
        yield lambda: self._most

    def waited(self) -> None:
        """Nothing is allocated by waiting."""

    def synchronized(self) -> None:
        """Nor by this."""

    def _release(self, size: int, name: str) -> None:
        self.held -= size
        self._by_owner[name] -= size


def owner(phase: str, func: Any) -> str:
    """Who runs an operator: phase, innermost function of ours or of the model, operator.

    In a backward pass that function is the one that called it: there the operator says more.
    """
    name = func._schema.name.removeprefix("aten::")
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if any(part in code.co_filename for part in _TELLING):
            return f"{phase}: {Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}: {name}"
        frame = frame.f_back
    return f"{phase}: {name}"
