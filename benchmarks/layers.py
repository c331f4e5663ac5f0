"""How close a model's own layers come to the arithmetic limit, without any code of this library.

    python benchmarks/layers.py --model 10m --json layers.json

It runs the layers of transformers, forward and backward, with an attention function that costs
almost nothing. It compares their time with the multiply-adds of their linear layers at the speed of
a large matrix product in the same run. With these layers, no order of work brings a step closer to
the limit than this. The machine should be idle.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from limit import MatrixProduct, Work, measure_costs
from settings import MODELS, machine
from step import now
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NO_ATTENTION = "benchmark_no_attention"


def no_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Every query adds its own key and value, so that all three have gradients.

    Args:
        query: (B, query heads, T, E).
        key, value: (B, key heads, T, E).

    Returns:
        (B, T, query heads, E), and no weights.
    """
    own = (key + value)[:, :, None]
    return (query.unflatten(1, (key.shape[1], -1)) + own).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(NO_ATTENTION, no_attention)


def pass_through(model: PreTrainedModel, tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds of a forward and of a backward pass through all layers, without the head."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    # A mask of one's own, so that no time goes into making one.
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    start = now(device)
    hidden = model.base_model(
        input_ids=ids,
        position_ids=torch.arange(tokens, device=device)[None],
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    middle = now(device)
    hidden.backward(torch.ones_like(hidden))
    return {"forward": middle - start, "backward": now(device) - middle}


def measure(model_size: str, tokens: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """The figures as they are written to JSON."""
    size = MODELS[model_size]
    with device:
        model = size.build()
    work = Work(tokens=tokens, pairs=0, head_rows=0)
    multiply_adds = dict(
        zip(
            ("forward", "backward"),
            (cost.multiply_adds(work) for cost in measure_costs(model)),
            strict=True,
        )
    )
    model.set_attn_implementation(NO_ATTENTION)
    product = MatrixProduct(device, size.dtype)
    pass_through(model, tokens, device)
    runs, speeds = [], []
    for _ in range(repeats):
        speeds.append(product.speed())
        runs.append(pass_through(model, tokens, device))
    seconds = {name: statistics.median(run[name] for run in runs) for name in multiply_adds}
    speed = statistics.median(speeds)
    limit = {name: count / speed for name, count in multiply_adds.items()}
    return {
        "ratio_vs_limit": sum(seconds.values()) / sum(limit.values()),
        "seconds": seconds,
        "limit": limit,
        "multiply_adds": multiply_adds,
        "multiply_adds_per_second": speed,
        "settings": {"model": model_size, "tokens": tokens, "repeats": repeats},
        "machine": machine(device),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="10m")
    parser.add_argument("--tokens", type=int, default=1024, help="Tokens of the pass.")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads.")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--json", type=Path, help="Write the figures here.")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    given = parse(arguments)
    torch.set_num_threads(given.threads)
    figures = measure(given.model, given.tokens, given.repeats, torch.device(given.device))
    print(f"{figures['ratio_vs_limit']:.2f} times the limit of their linear layers")
    for name, seconds in figures["seconds"].items():
        print(f"{name}: {seconds:.4f} s, limit {figures['limit'][name]:.4f} s")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
