"""What inductor makes of a function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.utils import run_and_get_code


def sizes_written(function: Callable[..., Any], *inputs: Any) -> tuple[Any, list[int]]:
    """What a function returns once it is compiled for a CPU, and the sizes of all tensors that the
    compiled one makes.
    """
    torch._dynamo.reset()
    run = torch.compile(function, dynamic=False, fullgraph=True)
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        found, (code,) = run_and_get_code(run, *inputs)
    shapes = re.findall(r"= empty_strided_cpu\(\(([^)]*)\)", code)
    return found, [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes]
