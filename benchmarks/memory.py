"""Peak memory of a piece of work, beyond what was allocated before it.

On CUDA, the caching allocator records the peak itself. On a CPU, the profiler reports every
allocation and release of PyTorch's CPU allocator, including the work space inside kernels. The peak
of their running sum is the same quantity.

Two other measures are worse. Resident memory depends on what the C library keeps for later and on
what the process did before. Counting the results of operators misses what a kernel allocates for
itself. But only resident memory would show the scratch memory of BLAS libraries, which do not ask
PyTorch for it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Run `work` and return the most bytes that it held at a time.

    What `work` releases although it was allocated before does not count in its favour.
    The profiler slows the work down: don't time it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Or the profiler says on standard output when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return _peak([event for event in events if event.get("name") == "[memory]"])


def _peak(events: list[dict[str, Any]]) -> int:
    ours: set[int] = set()
    held = peak = 0
    for event in sorted(events, key=lambda event: event["args"]["Ev Idx"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            ours.add(address)
        elif address not in ours:
            continue
        else:
            ours.remove(address)
        held += size
        peak = max(peak, held)
    return peak
