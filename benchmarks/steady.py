"""Many steps over documents of varying lengths: do memory or compilations grow from step to step?

    python benchmarks/steady.py --steps 200
    python benchmarks/steady.py --steps 200 --pad-to-multiple-of 64 --device cuda

It prints the number of different shapes of the steps and the memory of the process over time:
resident memory on a CPU, memory reserved by the caching allocator on a GPU (which shows its
fragmentation). If the second half holds more than the first, steps leak memory. With
`--set torch_compile=true` or `--set packed_attention=flex_attention`, the number of compiled graphs
is printed, too: it must stop growing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from settings import MODELS, PRESETS, machine
from step import OurStep, setting


def held(device: torch.device) -> int:
    """Bytes that the process holds on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return psutil.Process().memory_info().rss


def graphs() -> int:
    """Graphs that torch.compile has made so far in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Step after step; the figures as they are written to JSON."""
    device = torch.device(given.device)
    dtype = None if given.dtype is None else getattr(torch, given.dtype)
    size = MODELS[given.model].in_dtype(dtype)
    settings = dict(map(setting, given.set))
    if given.pad_to_multiple_of is not None:
        settings["pad_to_multiple_of"] = given.pad_to_multiple_of
    with device:
        model = size.build()
    ours = OurStep(
        model,
        PRESETS["paper"],
        use_cpu=device.type == "cpu",
        documents=given.documents,
        settings=settings,
    )
    generator = torch.Generator().manual_seed(0)
    shapes, record = set(), []
    compiled_before = graphs()  # torch counts from the start of the process
    start = time.monotonic()
    for step in range(1, given.steps + 1):
        lengths = torch.randint(
            given.shortest, given.longest + 1, (given.documents,), generator=generator
        )
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.randint(0, size.shape["vocab_size"], mask.shape, generator=generator)
        ours({"input_ids": (ids * mask).to(device), "attention_mask": mask.long().to(device)})
        layout = ours.trainer.layout
        shapes.add((layout.document_width, *layout.rollout_shape))
        record.append(
            {"bytes": held(device), "shapes": len(shapes), "graphs": graphs() - compiled_before}
        )
        if step % max(1, given.steps // 8) == 0:
            found = record[-1]
            print(
                f"step {step}: {found['bytes'] / 2**20:.0f} MiB held, {found['shapes']} shapes, "
                f"{found['graphs']} graphs",
                flush=True,
            )
        if given.seconds is not None and time.monotonic() - start > given.seconds and step > 1:
            print(f"Stopped after {step} of {given.steps} steps: {given.seconds:g} s are over.")
            break
    half = len(record) // 2
    most = [max(entry["bytes"] for entry in part) for part in (record[:half], record[half:])]
    return {
        "growth_of_peak": most[1] / most[0] - 1.0,
        "peak_of_halves": most,
        "shapes": len(shapes),
        "graphs_of_halves": [record[half - 1]["graphs"], record[-1]["graphs"]],
        "settings": {name: value for name, value in vars(given).items() if name != "json"},
        "machine": machine(device),
        "steps": record,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, help="Stop earlier, after so many.")
    parser.add_argument("--model", choices=MODELS, default="3m")
    parser.add_argument("--documents", type=int, default=2, help="Documents of a step.")
    parser.add_argument("--shortest", type=int, default=64, help="Tokens of a document, at least.")
    parser.add_argument("--longest", type=int, default=512, help="And at most.")
    parser.add_argument("--pad-to-multiple-of", type=int, help="Default: the trainer's own.")
    parser.add_argument("--json", type=Path, help="Write the figures here.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads.")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="Default: the model's own."
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="A field of EBFTConfig."
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run, print, write."""
    given = parse(arguments)
    torch.set_num_threads(given.threads)
    figures = run(given)
    print(
        f"{figures['growth_of_peak']:+.1%} of peak memory from the first half of the steps to the "
        f"second; {figures['shapes']} shapes; {figures['graphs_of_halves'][1]} compiled graphs, "
        f"{figures['graphs_of_halves'][0]} of them in the first half."
    )
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
