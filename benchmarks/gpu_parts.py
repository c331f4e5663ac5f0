"""The measurements of `gpu_check.py`. Each part runs in a process of its own:

    PYTHONPATH=. python3 benchmarks/gpu_parts.py steps steps.json [--dry-run]

A function `part_NAME(record)` stores its results in a `Record`, which writes each of them to a file
at once. If a measurement inside a part fails, the error is recorded and the part continues.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import steady
import torch
from limit import MatrixProduct, count_step
from memory import peak_bytes
from naive import NaiveStep
from settings import (
    MODELS,
    PRESETS,
    ModelSize,
    Preset,
    copy_of,
    machine,
    naive_rows_at_once,
    random_documents,
)
from step import OurStep, Seconds, TheirStep, compare, medians, now
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from hf_ebft import EBFTConfig, EBFTTrainer
from hf_ebft.data import tokenize_and_cut
from hf_ebft.data.stdlib_text import load
from hf_ebft.packed.flex import FLEX, compiled
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.packed.model_parts import bare_model

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = "torch triton transformers accelerate peft numpy pytest pytest-xdist datasets trl"


@dataclass
class Record:
    """The figures of a part; on disk as soon as they are known.

    Attributes:
        path: of the JSON file.
        dry_run: tiny sizes, on the CPU.
        figures: so far.
    """

    path: Path
    dry_run: bool
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def size(self) -> ModelSize:
        """The model of the steps."""
        return MODELS["tiny"].in_dtype(torch.bfloat16) if self.dry_run else MODELS["1b"]

    @property
    def preset(self) -> Preset:
        """The lengths of the steps."""
        return PRESETS["tiny" if self.dry_run else "paper"]

    def note(self, name: str, value: Any, *under: str) -> None:
        """Keep a figure, `under` some heading, and write all of them."""
        place = self.figures
        for heading in under:
            place = place.setdefault(heading, {})
        place[name] = value
        print(*under, name, json.dumps(value, default=str)[:500], flush=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.figures, default=str))
        part.replace(self.path)

    @contextlib.contextmanager
    def trying(self, name: str, *under: str) -> Iterator[None]:
        """What fails inside is noted under this name."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.note(name, {"error": f"{type(error).__name__}: {error}"[:600]}, *under)

    def model(self) -> nn.Module:
        """The model of the steps, on its device."""
        with self.device:
            return self.size.build()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    if given.dry_run:
        torch.set_num_threads(1)
    PARTS[given.part](Record(given.path, given.dry_run))


# ---- The machine --------------------------------------------------------------------------------


def part_environment(record: Record) -> None:
    """Versions, and the ceilings: matrix product, copy, and how fast operators are launched."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    record.note("versions", versions)
    record.note("machine", machine(record.device))
    if record.device.type == "cuda":
        with record.trying("nvidia_smi"):
            asked = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
            command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            record.note("nvidia_smi", done.stdout.strip())
    product = matrix_product(record, torch.bfloat16)
    record.note("matrix_product_tflops", 2 * product.speed() / 1e12)
    source = torch.randn(product.size**2, device=record.device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), record.device)
    record.note("copy_terabytes_per_second", 2 * source.nbytes / seconds / 1e12)
    small = torch.zeros(64, device=record.device)

    def a_thousand() -> None:
        for _ in range(1000):
            small.add_(1.0)

    record.note("microseconds_per_launch", 1000 * median_seconds(a_thousand, record.device))


def matrix_product(record: Record, dtype: torch.dtype) -> MatrixProduct:
    """What the machine can do; of a small one in a dry run."""
    product = MatrixProduct(record.device, dtype, size=128 if record.dry_run else None)
    for _ in range(5):
        product.speed()
    return product


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Seconds that some work takes, the first two times not counted."""
    seconds = []
    for _ in range(repeats + 2):
        start = now(device)
        work()
        seconds.append(now(device) - start)
    return statistics.median(seconds[2:])


# ---- Steps --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way of making a step.

    Attributes:
        name: in the table.
        documents: B.
        settings: of the `EBFTConfig`.
    """

    name: str
    documents: int
    settings: Mapping[str, Any] = field(default_factory=dict)


SDPA, SPLIT = {"packed_attention": "sdpa"}, {"packed_attention": "split"}
CHECKPOINTING = {"gradient_checkpointing": True}
# `auto` is flex_attention on CUDA, and split attention on a CPU.
ONE_DOCUMENT = Variant("auto, 1 document", 1)
STEPS = (
    Variant("auto, 4 documents", 4),
    Variant("auto, 4 documents, checkpointing", 4, CHECKPOINTING),
    ONE_DOCUMENT,
    Variant("auto, 8 documents, checkpointing", 8, CHECKPOINTING),
    Variant("auto, 8 documents", 8),
    Variant("auto, 4 documents, with ce", 4, {"ce_coef": 0.03}),
)
ATTENTION_STEPS = (
    Variant("sdpa, 1 document", 1, SDPA),
    Variant("sdpa, 4 documents", 4, SDPA),
    Variant("sdpa, 8 documents, checkpointing", 8, SDPA | CHECKPOINTING),
    Variant("split, 1 document", 1, SPLIT),
    Variant("split, 4 documents", 4, SPLIT),
)
COMPILED: dict[str, Any] = {"torch_compile": True}
COMPILED_STEPS = (
    Variant("compiled, 4 documents", 4, COMPILED),
    Variant("compiled, 4 documents, checkpointing", 4, COMPILED | CHECKPOINTING),
    Variant("compiled, 1 document", 1, COMPILED),
    Variant("compiled, 8 documents, checkpointing", 8, COMPILED | CHECKPOINTING),
)


def part_steps(record: Record) -> None:
    """Steps as they are by default, the graphs that they made, the kernels that one launches."""
    measure_variants(record, STEPS)
    note_launches(record, ONE_DOCUMENT)


def part_attention(record: Record) -> None:
    """Steps with the kinds of attention that need no compilation."""
    measure_variants(record, ATTENTION_STEPS)
    note_launches(record, ATTENTION_STEPS[0])


def part_compiled(record: Record) -> None:
    """Steps with `torch_compile`, and how many graphs they made."""
    variants: tuple[Variant, ...] = COMPILED_STEPS
    if record.dry_run:
        backend = {"torch_compile_backend": "eager"}
        variants = (replace(variants[0], settings=COMPILED | backend),)
    measure_variants(record, variants)
    note_launches(record, variants[min(2, len(variants) - 1)])


def measure_variants(record: Record, variants: Sequence[Variant]) -> None:
    """Every variant with a model of its own, and the graphs that torch.compile has made by then."""
    speed = matrix_product(record, record.size.dtype).speed()
    record.note("matrix_product_tflops", 2 * speed / 1e12)
    for variant in variants:
        with record.trying(variant.name, "variants"):
            record.note(variant.name, measure(record, variant, speed), "variants")
        free(record.device)
        record.note("graphs", dict(counters["stats"]))


def our_step(record: Record, variant: Variant) -> OurStep:
    """A trainer for this variant, whose optimizer is not run."""
    return OurStep(
        record.model(),
        record.preset,
        use_cpu=record.device.type == "cpu",
        documents=variant.documents,
        settings=variant.settings,
    )


def batch(record: Record, variant: Variant) -> dict[str, Tensor]:
    """Random documents."""
    vocabulary = record.size.shape["vocab_size"]
    return random_documents(variant.documents, record.preset.document, vocabulary, record.device)


def measure(record: Record, variant: Variant, speed: float) -> dict[str, Any]:
    """Seconds by phase (medians), arithmetic and memory of one variant.

    Args:
        record: of the part.
        variant: of the step.
        speed: of a matrix product, multiply-adds per second.
    """
    ours, inputs = our_step(record, variant), batch(record, variant)
    start = now(record.device)
    ours(inputs)
    first = now(record.device) - start
    ours(inputs)  # whatever is compiled or captured in a second step
    peak = peak_bytes(lambda: ours(inputs), record.device)
    runs = [ours(inputs) for _ in range(2 if record.dry_run else 5)]
    return figures_of(record, variant, runs, multiply_adds(record, ours), speed) | {
        "gib_beyond_weights": peak / 2**30,
        "first_step_seconds": first,
        "decoding": decoding_of(ours),
    }


def decoding_of(ours: OurStep) -> str:
    """How decoding steps ran: the number of CUDA graphs, or why there are none."""
    decoding = ours.trainer._forward.decoding
    if decoding.grows is not None:
        return f"a cache that grows, because {decoding.grows}"
    if not decoding.works:
        return "no steps"
    graphs = decoding.graphs
    return f"{len(graphs._captured)} graphs" + ("" if graphs.works else ", a capture failed")


def figures_of(
    record: Record, variant: Variant, runs: Sequence[Seconds], needed: int, speed: float
) -> dict[str, Any]:
    """Medians by phase, and what they mean for a step that needs so many multiply-adds."""
    median = medians(runs)
    total = median["total"]
    return {
        "seconds": {
            "sampling": median["sampling"],
            "features": median["features"],
            "training": median["training_forward"] + median["backward"],
            "step": total,
            "document": total / variant.documents,
        },
        "all_seconds": [run["total"] for run in runs],
        "tflops": 2 * needed / total / 1e12,
        "share_of_matrix_product": needed / total / speed,
        "document_tokens_per_second": variant.documents * record.preset.document / total,
        "needed_tflop": 2 * needed / 1e12,
    }


def multiply_adds(record: Record, ours: OurStep) -> int:
    """What the last step needed, by a model without memory and with plain attention.

    Its weights are on the meta device, where flex_attention does not run.
    """
    with torch.device("meta"):
        shapes = record.size.build()
    counted = count_step(
        ours.trainer.layout,
        shapes,
        n_feature_layers=ours.n_feature_layers,
        with_cross_entropy=ours.trainer.ebft.ce_coef > 0,
    )
    return sum(counted.values())


def note_launches(record: Record, variant: Variant) -> None:
    """Record the kernels that a step of this variant launches."""
    with record.trying(variant.name, "launches"):
        record.note(variant.name, launches(record, variant), "launches")


def launches(record: Record, variant: Variant) -> dict[str, Any]:
    """Kernels of a step (operators, on a CPU): how many, how long they ran, the longest ones."""
    ours, inputs = our_step(record, variant), batch(record, variant)
    for _ in range(2):
        ours(inputs)
    on_cpu = record.device.type == "cpu"
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as found:
        ours(inputs)
    rows = []
    for event in found.key_averages():
        spent = event.self_cpu_time_total if on_cpu else event.self_device_time_total
        if spent > 0:
            rows.append((spent / 1000, event.count, event.key[:100]))
    rows.sort(reverse=True)
    return {
        "kernels": sum(count for _, count, _ in rows),
        "busy_ms": sum(spent for spent, _, _ in rows),
        "longest": rows[:20],
    }


def free(device: torch.device) -> None:
    """Free the memory of the last model."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- Kernels ------------------------------------------------------------------------------------

# What flex_attention is asked for beside what torch chooses. Compiled for an H100, its own choice
# for heads of 64 keeps 664 bytes a thread outside of registers in the forward pass, the other two
# keep none.
KERNEL_OPTIONS: Mapping[str, Mapping[str, int]] = {
    "as chosen": {},
    "8 warps": {"fwd_num_warps": 8},
    "8 warps, 64 keys": {"fwd_num_warps": 8, "fwd_BLOCK_N": 64},
}


def part_flex(record: Record) -> None:
    """Milliseconds of flex_attention's forward and backward kernels on a row of the steps."""
    ours, inputs = our_step(record, ONE_DOCUMENT), batch(record, ONE_DOCUMENT)
    layout, config = ours.trainer.read_layout(inputs), bare_model(ours.policy).config
    part, heads = layout.predicting_part, config.num_attention_heads
    recipe = replace(ours.trainer._forward.recipe, implementation=FLEX)
    (kind,) = recipe.layer_types
    mask, width = recipe.block_mask(kind, part), config.hidden_size // heads
    query, key, value = (
        torch.randn(1, count, part.n_keys, width, device=record.device, dtype=record.size.dtype)
        for count in (heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    record.note("tokens, heads, width", [part.n_keys, heads, width])
    on_cpu = record.device.type == "cpu"
    backend = "aot_eager" if on_cpu else "inductor"
    for name, options in KERNEL_OPTIONS.items():
        with record.trying(name):
            attend = compiled(flex_attention, backend=backend)
            tensors = [tensor.clone().requires_grad_(not on_cpu) for tensor in (query, key, value)]

            forward = partial(
                attend, *tensors, block_mask=mask, enable_gqa=True, kernel_options=dict(options)
            )
            figures = {"forward_ms": 1000 * median_seconds(forward, record.device)}
            if not on_cpu:  # where it has no backward pass
                both = partial(forward_and_backward, forward)
                figures["forward_and_backward_ms"] = 1000 * median_seconds(both, record.device)
            record.note(name, figures)


def forward_and_backward(forward: Callable[[], Tensor]) -> None:
    """With a gradient of ones."""
    forward().sum().backward()


# ---- Numerics -----------------------------------------------------------------------------------


def part_numerics(record: Record) -> None:
    """Log-probabilities of training against those of sampling, and features of equal rollouts.

    Rounding may part them; a bias may not. In every group sample 1 is made to repeat sample 0.
    """
    for variant in (ONE_DOCUMENT, ATTENTION_STEPS[0]):
        with record.trying(variant.name):
            record.note(variant.name, numerics_of(record, variant))
        free(record.device)


@torch.no_grad()
def numerics_of(record: Record, variant: Variant) -> dict[str, Any]:
    """The figures of one kind of attention."""
    ours = our_step(record, variant)
    trainer, settings = ours.trainer, ours.trainer.ebft
    rollouts, sampled = trainer._sample_with_record(ours.prepared, batch(record, variant))
    assert sampled is not None
    scored = packed_log_probs(
        ours.prepared,
        trainer._forward,
        rollouts,
        temperature=settings.temperature,
        with_document=False,
        chunk_size=settings.log_prob_chunk_size,
    )
    gap = scored.rollout - sampled.log_probs
    tokens = rollouts.tokens.clone()
    tokens[:, 1] = tokens[:, 0]
    scores = trainer.score_rollouts(rollouts.with_tokens(tokens))
    # Of n - 1 others one is equal: whitened, the product of the two is a half.
    diversity = scores.rewards.diversity[:, :2]
    return {
        "attention": bare_model(ours.policy).config._attn_implementation,
        "log_probs": {
            "mean_difference": float(gap.mean()),
            "mean_absolute_difference": float(gap.abs().mean()),
            "largest_difference": float(gap.abs().max()),
        },
        "diversity_of_equal_pairs": {
            "expected": 1 / (settings.n_samples_per_prompt - 1),
            "mean": float(diversity.mean()),
            "least": float(diversity.min()),
            "most": float(diversity.max()),
        },
    }


# ---- Naive --------------------------------------------------------------------------------------


def part_naive(record: Record) -> None:
    """The released code's order of work with fused attention, in turns with ours.

    Its eager attention does not fit a GPU of 80 GB at this size.
    """
    variant = ONE_DOCUMENT
    speed = matrix_product(record, record.size.dtype).speed()
    ours = our_step(record, variant)
    reference: Any = record.model()  # of the same seed, so with the same weights
    rows = naive_rows_at_once(record.preset, reference, record.device, "sdpa")
    phi = copy_of(reference).requires_grad_(False)
    theirs = TheirStep(
        NaiveStep(reference, phi, ours.trainer.ebft, rows_at_once=rows), record.device
    )
    vocabulary = record.size.shape["vocab_size"]
    with record.trying("difference"):
        length = max(40, record.preset.document // 4)
        short = random_documents(1, length, vocabulary, record.device)
        record.note("difference_of_log_probs", compare(ours, theirs, short).log_probs)
    inputs = batch(record, variant)
    runs: dict[str, list[Seconds]] = {"ours": [], "naive": []}
    steps: dict[str, OurStep | TheirStep] = {"ours": ours, "naive": theirs}
    peaks = {}
    for name, step in steps.items():
        step(inputs)
        peaks[name] = peak_bytes(lambda step=step: step(inputs), record.device)  # type: ignore[misc]
    for _ in range(1 if record.dry_run else 3):
        for name, step in steps.items():
            runs[name].append(step(inputs))
    needed = multiply_adds(record, ours)
    times = {}
    for name, label in (("naive", "naive, sdpa, 1 document"), ("ours", variant.name)):
        found = figures_of(record, variant, runs[name], needed, speed)
        times[name] = found["seconds"]["step"]
        record.note(label, found | {"gib_beyond_weights": peaks[name] / 2**30}, "variants")
    record.note("ratio_vs_naive", times["naive"] / times["ours"])
    record.note("memory_ratio_vs_naive", peaks["naive"] / peaks["ours"])


# ---- Runs ---------------------------------------------------------------------------------------


def part_run(record: Record) -> None:
    """Train the small model of this repository on new text, from its own rollouts.

    In autocast with float32 weights, measured on held-out text before and after.
    """
    folder = ROOT / "examples" / "tiny_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = {
        split: tokenize_and_cut(
            [document.text for document in load("encodings", split).documents],
            tokenizer,
            sequence_len=128,
            min_length=24,
        )
        for split in ("train", "tune")
    }
    steps = 2 if record.dry_run else 60
    with tempfile.TemporaryDirectory() as output:
        trainer = EBFTTrainer(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            EBFTConfig(
                output_dir=output,
                use_cpu=record.device.type == "cpu",
                bf16=True,
                max_steps=steps,
                per_device_train_batch_size=4 if record.dry_run else 64,
                per_device_eval_batch_size=8 if record.dry_run else 64,
                learning_rate=3e-4,
                warmup_steps=4,
                use_whitening=False,
                temperature=1.0,
                logging_steps=max(1, steps // 10),
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=rows["train"],
            eval_dataset=rows["tune"].spread(8 if record.dry_run else 128, 0),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        record.note("before", trainer.evaluate())
        start = time.perf_counter()
        trainer.train()
        record.note("seconds_per_step", (time.perf_counter() - start) / steps)
        record.note("after", trainer.evaluate())
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        record.note("log", log)


def part_steady(record: Record) -> None:
    """Do memory, shapes or compilations grow over steps of varying lengths?"""
    record.note("default", steady_figures(record, [], seconds=40))


def part_recompiles(record: Record) -> None:
    """The same with `torch_compile`: everything must be compiled in the first steps."""
    settings = ["torch_compile=true"]
    if record.dry_run:
        settings.append("torch_compile_backend=eager")
    record.note("torch_compile", steady_figures(record, settings, seconds=60))
    record.note("counters", dict(counters["stats"]))


def steady_figures(record: Record, settings: Sequence[str], seconds: float) -> dict[str, Any]:
    """The summary of `steady.py`, over as many steps as fit."""
    arguments = ["--steps", "2" if record.dry_run else "200", "--device", record.device.type]
    arguments += ["--seconds", str(seconds)]
    if record.dry_run:
        arguments += ["--model", "tiny", "--shortest", "40", "--longest", "64", "--threads", "1"]
    else:
        arguments += ["--model", "10m", "--dtype", "bfloat16", "--threads", "8"]
    for setting in settings:
        arguments += ["--set", setting]
    start = time.perf_counter()
    found = steady.run(steady.parse(arguments))
    names = ("growth_of_peak", "peak_of_halves", "shapes", "graphs_of_halves")
    more = {"steps": len(found["steps"]), "seconds": time.perf_counter() - start}
    return {name: found[name] for name in names} | more


PARTS: dict[str, Callable[[Record], None]] = {
    "environment": part_environment,
    "steps": part_steps,
    "attention": part_attention,
    "compiled": part_compiled,
    "flex": part_flex,
    "numerics": part_numerics,
    "naive": part_naive,
    "run": part_run,
    "steady": part_steady,
    "recompiles": part_recompiles,
}

if __name__ == "__main__":
    main()
