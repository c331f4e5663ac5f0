"""Predicts the cost of a step on a GPU, on a machine without one.

    python benchmarks/predicted.py --model 1b --documents 4
    python benchmarks/predicted.py --documents 8 --set gradient_checkpointing=true --json 8.json

It runs the step's own code, which `benchmarks/step.py` times, on tensors that have shapes but no
values (`benchmarks/pretended.py`). It counts the bytes that exist at the same time
(`benchmarks/held.py`). It also counts kernels, bytes moved and multiply-adds, and predicts a time
from them (`benchmarks/launched.py`). Decoding steps are counted as replayed CUDA graphs.

docs/performance.md compares predictions with the measurements of an H100.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from typing import Any
from unittest import mock

import torch
from accelerate.state import PartialState
from fused_stand_ins import StandIns
from held import HeldMemory, owner
from launched import H100, Cost, LaunchedWork, Machine
from limit import count_step
from pretended import GPU, PretendedGPU
from settings import MODELS, PRESETS, Preset, machine, random_documents, with_adapters
from step import OurStep, add_step_options, setting

from hf_ebft.packed.model_parts import bare_model
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training.stopwatch import Stopwatch

PHASES = ("rollout", "features", "training")


class OnPretendedGPU(Preset):
    """A preset whose trainer computes on the pretended device."""

    def config(self, output_dir: str, **settings: Any) -> Any:
        """The trainer's configuration."""
        args = super().config(output_dir, **{**settings, "use_cpu": True})
        args.device  # noqa: B018  (it sets accelerate up)
        args.__dict__["_setup_devices"] = GPU
        PartialState._shared_state["device"] = GPU
        return args


@dataclass(frozen=True)
class Replayed:
    """What stands in for a captured CUDA graph.

    Attributes:
        work: is told of its kernels.
        costs: of these, with who launched them.
    """

    work: LaunchedWork
    costs: list[tuple[str, Cost]]

    def replay(self) -> None:
        """Count it once more."""
        self.work.replay(self.costs)

    def pool(self) -> None:
        """Its memory is counted when it is captured."""


class Prediction:
    """A step of ours on a pretended device, observed.

    Args:
        preset, model_size: what to run, see `benchmarks/settings.py`.
        documents: B.
        settings: fields of `EBFTConfig`.
        gpu: what the device can do.
        shape: overrides of the model's shape.
    """

    def __init__(
        self,
        preset: Preset,
        model_size: str,
        *,
        documents: int,
        settings: Mapping[str, Any] | None = None,
        gpu: Machine = H100,
        dtype: torch.dtype | None = None,
        shape: Mapping[str, Any] | None = None,
        block: int = 512,
    ) -> None:
        self.preset, self.documents, self.settings = preset, documents, dict(settings or {})
        self.size = MODELS[model_size].in_dtype(dtype)
        self.shape = dict(shape or {})
        self._phases = ["training"]
        self.memory = HeldMemory(lambda: self._phases[-1], block)
        self.work = LaunchedWork(lambda: self._phases[-1], owner, gpu)
        self.work.on_region = self.memory.region
        self.graph_bytes = 0
        self.gpu = PretendedGPU([self.memory, self.work])
        stand_ins = StandIns(self.gpu, self.work)
        self.gpu.functions[torch.nn.functional.scaled_dot_product_attention] = stand_ins.sdpa
        self.gpu.stand_ins += [
            (torch, "compile", stand_ins.compile),
            (Stopwatch, "phase", self._in_phase(Stopwatch.phase)),
            # Without it flex_attention would not be chosen; here it does not run.
            (importlib.util, "find_spec", _find_spec_with_triton(importlib.util.find_spec)),
        ]

    def _in_phase(self, original: Callable[..., Any]) -> Callable[..., Any]:
        phases = self._phases

        @contextlib.contextmanager
        def phase(watch: Stopwatch, name: str) -> Iterator[None]:
            phases.append(name)
            try:
                with original(watch, name):
                    yield
            finally:
                phases.pop()

        return phase

    def run(self) -> dict[str, Any]:
        """Predict; the figures as they are written to JSON."""
        state = dict(PartialState._shared_state)
        try:
            with self.gpu, _hook_on_modules(self.work.called):
                ours = self._run()
                layout = ours.trainer.layout.on_host
            return self._figures(ours, layout)
        finally:
            PartialState._shared_state.clear()
            PartialState._shared_state.update(state)

    def _run(self) -> OurStep:
        with torch.device(GPU), mock.patch.object(torch.nn.init, "normal_", lambda t, *a, **k: t):
            model = with_adapters(self.size.build(**self.shape), self.preset.lora_rank)
        preset = OnPretendedGPU(**asdict(self.preset))
        ours = OurStep(
            model, preset, use_cpu=False, documents=self.documents, settings=self.settings
        )
        graphs = ours.trainer._forward.decoding.graphs
        graphs.capture = self._capture
        vocabulary = bare_model(model).config.vocab_size
        inputs = random_documents(self.documents, preset.document, vocabulary, GPU)
        # The first step of a shape; then decoding steps are captured; then all is as ever after.
        ours.trainer.training_step(ours.prepared, dict(inputs))
        self._phases.append("rollout")
        ours.trainer.sample_rollouts(ours.prepared, dict(inputs))
        self._phases.pop()
        ours.policy.zero_grad(set_to_none=False)
        self.memory.start()
        self.work.start()
        ours.trainer.training_step(ours.prepared, dict(inputs))
        self.work.synchronized()
        if not graphs.works:
            raise RuntimeError("Decoding steps could not be captured; the log says why.")
        return ours

    def _capture(self, step: Callable[[], None], pool: Any = None) -> Replayed:
        step()
        before = self.memory.held
        with self.memory.watching() as most, self.work.recorded() as costs:
            step()
        # A graph keeps the memory that its kernels write to.
        self.graph_bytes = max(self.graph_bytes, most() - before)
        return Replayed(self.work, costs)

    def _figures(self, ours: OurStep, layout: PackedLayout) -> dict[str, Any]:
        memory, work = self.memory, self.work
        shapes = self._shapes()
        needed = count_step(
            layout,
            shapes,
            n_feature_layers=ours.n_feature_layers,
            with_cross_entropy=ours.trainer.ebft.ce_coef > 0,
        )
        busy = {phase: cost.device for phase, cost in work.by_phase.items()}
        seconds = dict(work.seconds)
        total = sum(seconds.values())
        return {
            "seconds": seconds | {"total": total},
            "busy_seconds": busy | {"total": sum(busy.values())},
            "kernels": {p: c.kernels for p, c in work.by_phase.items()}
            | {"total": sum(c.kernels for c in work.by_phase.values())},
            "bytes": {p: c.bytes for p, c in work.by_phase.items()},
            "multiply_adds": {p: c.multiply_adds for p, c in work.by_phase.items()},
            "needed_multiply_adds": needed,
            "share_of_matrix_speed": sum(needed.values()) / total / work.machine.products,
            "views": dict(work.views),
            "module_calls": dict(work.calls),
            "host_waits": dict(work.waits),
            "peak_bytes": memory.peak,
            "peak_bytes_by_phase": memory.by_phase,
            "graph_bytes": self.graph_bytes,
            "holders_at_peak": _largest(memory.at_peak),
            "operators": _costliest(work),
            "settings": {
                "preset": asdict(self.preset),
                "documents": self.documents,
                "dtype": str(self.size.dtype).removeprefix("torch."),
                "shape": {**self.size.shape, **self.shape},
                "attention": ours.trainer._forward.recipe.implementation,
                "more": self.settings,
            },
            "gpu": asdict(work.machine),
            "machine": machine(torch.device("cpu")),
        }

    def _shapes(self) -> torch.nn.Module:
        with torch.device("meta"):
            return with_adapters(self.size.build(**self.shape), self.preset.lora_rank)


def _largest(by_owner: Mapping[str, int], most: int = 25) -> list[dict[str, Any]]:
    ordered = sorted(by_owner.items(), key=lambda entry: -entry[1])[:most]
    return [{"bytes": size, "by": name} for name, size in ordered]


def _costliest(work: LaunchedWork, most: int = 40) -> list[dict[str, Any]]:
    launch = work.machine.launch
    ordered = sorted(
        work.by_owner.items(), key=lambda entry: -max(entry[1].device, entry[1].count * launch)
    )
    return [{"by": name} | asdict(cost) for name, cost in ordered[:most]]


@contextlib.contextmanager
def _hook_on_modules(hook: Callable[..., Any]) -> Iterator[None]:
    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _find_spec_with_triton(original: Callable[..., Any]) -> Callable[..., Any]:
    def find_spec(name: str, package: str | None = None) -> Any:
        return ModuleSpec(name, None) if name == "triton" else original(name, package)

    return find_spec


def report(figures: Mapping[str, Any]) -> str:
    """The figures as text."""
    gib = 2**30
    lines = ["| predicted | " + " | ".join((*PHASES, "total")) + " |", "|---" * 5 + "|"]
    for title, name, unit, digits in (
        ("ms", "seconds", 1e-3, 1),
        ("ms the device is busy", "busy_seconds", 1e-3, 1),
        ("kernels", "kernels", 1, 0),
        ("GB moved", "bytes", 1e9, 1),
        ("T multiply-adds", "multiply_adds", 1e12, 2),
        ("views", "views", 1, 0),
        ("calls of modules", "module_calls", 1, 0),
        ("waits of the host", "host_waits", 1, 0),
        ("GiB at most", "peak_bytes_by_phase", gib, 2),
    ):
        row = dict(figures[name])
        row.setdefault("total", max(row.values()) if "peak" in name else sum(row.values()))
        cells = (f"{row.get(phase, 0) / unit:.{digits}f}" for phase in (*PHASES, "total"))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    settings, launch = figures["settings"], figures["gpu"]["launch"]
    lines += [
        "",
        f"{settings['documents']} document(s), {settings['attention']}, {settings['more']}: "
        f"{figures['share_of_matrix_speed']:.0%} of the speed of a large matrix product, by the "
        "arithmetic that the objective needs. Graphs of decoding steps hold "
        f"{figures['graph_bytes'] / gib:.2f} GiB beside that, from step to step.",
        "",
        "At the peak:",
    ]
    for held in figures["holders_at_peak"]:
        lines.append(f"  {held['bytes'] / gib:7.3f} GiB  {held['by']}")
    lines += ["", "Operators, by the longer of launching and running:"]
    for cost in figures["operators"]:
        lines.append(
            f"  {cost['count'] * launch * 1e3:8.2f} ms launching {cost['device'] * 1e3:8.2f} ms "
            f"running {cost['kernels']:6d} kernels  {cost['by']}"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_step_options(parser, model="1b")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Predict, print, write."""
    given = parse(arguments)
    figures = Prediction(
        PRESETS[given.preset],
        given.model,
        documents=given.documents,
        settings=dict(map(setting, given.set)),
    ).run()
    print(report(figures))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
