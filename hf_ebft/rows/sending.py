"""Numbers of the host for a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """The numbers on a device, without waiting until it has them.

    Args:
        numbers: in the host's memory.
        device: where they go. On the host the tensor shares their memory.
    """
    tensor = torch.from_numpy(numbers)
    # From other memory than pinned one, the copy would wait for all that the device has to do.
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)
