"""Copying arrays from the host to a device without waiting."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device; the host does not wait for the copy to finish.

    Args:
        numbers: in the host's memory.
        device: the destination. On a CPU the tensor shares the array's memory.
    """
    tensor = torch.from_numpy(numbers)
    # A copy from unpinned memory would wait until the device has finished its queued work.
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)
