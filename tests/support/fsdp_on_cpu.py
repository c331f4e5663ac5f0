"""Brings accelerate's FSDP2 up on the CPU, for tests only.

accelerate turns an FSDP configuration into plain DDP where there is no accelerator. Renaming the
distributed type after the process group is up makes it take the FSDP2 path over gloo instead.
"""

from typing import Any

import accelerate
from accelerate.utils import DistributedType


def enable() -> None:
    """Patch the class, not an instance: `TrainingArguments` makes the state anew."""
    original = accelerate.PartialState.__init__

    def init(self: accelerate.PartialState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    accelerate.PartialState.__init__ = init
