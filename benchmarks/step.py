"""One training step, measured: the library, the naive order of work, and the arithmetic limit.

    python benchmarks/step.py --preset paper --model 10m --json paper.json
    python benchmarks/step.py --preset long --skip-naive           # a quick look

All three are measured in one run, in turns, on random documents and a random model:

- ours: `EBFTTrainer.training_step`, which is `compute_loss` and the backward pass;
- naive: `benchmarks/naive.py`, the order of work of the paper's released code;
- the limit: the multiply-adds that the objective needs (`benchmarks/limit.py`) at the speed of a
  large matrix product on the same threads.

The first step of each is short and for warm-up. In it, log-probabilities and rewards of the two
are compared for the same rollouts. The second step measures memory: the most bytes held beyond
the weights, their gradients and the batch (`benchmarks/memory.py`). The other steps are timed, and
the figures are medians. The optimizer step is in none of them. The machine should be idle.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from limit import MatrixProduct, count_step
from memory import peak_bytes
from naive import NaiveStep, Sampled, read_documents
from settings import (
    MODELS,
    PRESETS,
    Preset,
    copy_of,
    machine,
    naive_rows_at_once,
    random_documents,
    with_adapters,
)
from torch import Tensor, nn
from transformers import PrinterCallback

from hf_ebft import EBFTTrainer, Rollouts
from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.rewards import feature_matching_rewards
from hf_ebft.packed.model_parts import bare_model
from hf_ebft.rows.layout import PackedLayout

PHASES = ("sampling", "features", "training_forward", "backward")
Seconds = dict[str, float]
# Largest difference of log-probabilities that is rounding.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}


class MeasuredTrainer(EBFTTrainer):
    """The trainer, with the last batch's layout noted."""

    layout: PackedLayout

    def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
        """Unchanged; its layout is kept."""
        rollouts = super().sample_rollouts(model, inputs)
        self.layout = rollouts.layout
        return rollouts


class OurStep:
    """The library's step."""

    def __init__(
        self,
        model: nn.Module,
        preset: Preset,
        *,
        use_cpu: bool,
        documents: int,
        settings: Mapping[str, Any],
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.trainer = MeasuredTrainer(
            model,
            preset.config(
                self._folder.name,
                use_cpu=use_cpu,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                per_device_train_batch_size=documents,
                feature_placement="shared" if preset.lora_rank else "same_device",
                # Log-probabilities are compared below.
                verify_packing=False,
                **settings,
            ),
        )
        self.trainer.remove_callback(PrinterCallback)
        # Trainer does all of this when a run starts.
        self.trainer.current_gradient_accumulation_steps = 1
        if settings.get("gradient_checkpointing"):
            bare_model(model).gradient_checkpointing_enable({"use_reentrant": False})
        # Autocast and torch_compile.
        self.prepared: nn.Module = self.trainer.accelerator.prepare(self.trainer.model)
        self.trainer.model_wrapped = self.prepared
        hold_gradients(self.policy)
        # Forward passes with gradient, some of which are made during the backward pass. On the
        # outermost module: hooks inside would be compiled.
        self._forward_seconds = self._forward_start = 0.0
        self.prepared.register_forward_pre_hook(self._before_forward)
        self.prepared.register_forward_hook(self._after_forward)

    def _before_forward(self, *_: Any) -> None:
        self._forward_start = now(self.trainer.args.device)

    def _after_forward(self, model: nn.Module, *_: Any) -> None:
        # In evaluation mode it is sampling, whose pass over the documents carries a gradient, too.
        if model.training and torch.is_grad_enabled():
            self._forward_seconds += now(self.trainer.args.device) - self._forward_start

    @property
    def policy(self) -> nn.Module:
        """The model that is trained, on its device, as it was given."""
        return self.trainer.model

    @property
    def n_feature_layers(self) -> int:
        """Layers up to the highest one that features are taken from."""
        n_layers = bare_model(self.policy).config.num_hidden_layers
        return max(int(fraction * n_layers) for fraction in self.trainer.ebft.feature_layers)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Seconds:
        """One step; seconds by phase and in total."""
        self.policy.zero_grad(set_to_none=False)
        self._forward_seconds = 0.0
        start = now(self.trainer.args.device)
        loss = self.trainer.training_step(self.prepared, dict(inputs))
        total = now(self.trainer.args.device) - start
        # The trainer's stopwatch reaches the log, averaged over the steps since the last one.
        self.trainer.log({"loss": float(loss)})
        logged = self.trainer.state.log_history[-1]
        sampling = logged["ebft/seconds_rollout"]
        features = logged["ebft/seconds_features"]
        return {
            "sampling": sampling,
            "features": features,
            "training_forward": self._forward_seconds,
            "backward": total - sampling - features - self._forward_seconds,
            "total": total,
        }


class TheirStep:
    """The naive step, timed the same way."""

    def __init__(self, naive: NaiveStep, device: torch.device) -> None:
        self.naive = naive
        self._device = device
        hold_gradients(naive.policy)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Seconds:
        """One step; seconds by phase and in total."""
        self.naive.policy.zero_grad(set_to_none=False)
        start = now(self._device)
        self.naive.step(inputs)
        total = now(self._device) - start
        return self.naive.stopwatch.take() | {"total": total}


@dataclass(frozen=True)
class Difference:
    """Largest differences between the two for the same rollouts."""

    log_probs: float
    rewards: float


def compare(ours: OurStep, theirs: TheirStep, inputs: Mapping[str, Tensor]) -> Difference:
    """Score the library's rollouts by the naive step.

    Raises:
        RuntimeError: log-probabilities differ by more than rounding, so that times of two
            different things would be compared.
    """
    with torch.no_grad():
        _, outputs = ours.trainer.compute_loss(ours.prepared, dict(inputs), return_outputs=True)
        naive = theirs.naive
        log_probs = rewards = 0.0
        for row, document in enumerate(read_documents(inputs, naive.settings)):
            n_blocks = document.ends.shape[0]
            sampled = Sampled(document, outputs.rollouts.tokens[row, :, :n_blocks])
            expected, _ = naive.log_probs(sampled)
            actual = outputs.log_probs[row, :, :n_blocks]
            log_probs = max(log_probs, float((actual - expected).abs().max()))
            actual = outputs.rewards.reward[row, :, :n_blocks]
            expected = naive.rewards(sampled).reward[0]
            rewards = max(rewards, float((actual - expected).abs().max()))
    tolerance = TOLERANCES[next(ours.policy.parameters()).dtype]
    if not log_probs <= tolerance:
        raise RuntimeError(
            f"Log-probabilities of the library and of the naive step differ by {log_probs:.1e}, "
            f"more than {tolerance:.0e}: they do not compute the same thing."
        )
    return Difference(log_probs, rewards)


def hold_gradients(model: nn.Module) -> None:
    """Allocate the gradients that the optimizer would keep, so that no step is billed for them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def now(device: torch.device) -> float:
    """Seconds, with the device's work done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def reward_seconds(ours: OurStep) -> float:
    """Seconds that whitening, rewards and advantages of a step take, by the last batch's shapes.

    They are a part of the phase "features".
    """
    settings, layout = ours.trainer.ebft, ours.trainer.layout
    rows, n_samples, n_blocks, _ = layout.rollout_shape
    width = bare_model(ours.policy).config.hidden_size * len(settings.feature_layers)
    device = ours.trainer.args.device
    generated = torch.randn(rows, n_samples, n_blocks, width, device=device)
    ground_truth = torch.randn(rows, n_blocks, width, device=device)
    seconds = []
    for _ in range(6):
        start = now(device)
        rewards = feature_matching_rewards(
            torch.nn.functional.normalize(generated, dim=-1),
            torch.nn.functional.normalize(ground_truth, dim=-1),
            use_whitening=settings.use_whitening,
            whitening_space=settings.whitening_space,
        )
        compute_advantages(rewards, settings.advantage_estimator)
        seconds.append(now(device) - start)
    return statistics.median(seconds[1:])


def medians(runs: Sequence[Seconds]) -> Seconds:
    """The median of each phase, and of the total."""
    return {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}


@dataclass(frozen=True)
class Options:
    """What to measure, beside the preset.

    Attributes:
        documents: B, documents of a step.
        ce_coef: weight of the cross-entropy.
        device: "cpu" or "cuda".
        dtype: of the weights and of the matrix product; None: the model size's own.
        with_naive: measure the naive step too.
        naive_rows: rows that it computes at once; None: by an estimate of its memory.
        naive_attention: its attention implementation; "eager" is the released code's.
        settings: more fields of the `EBFTConfig` of ours.
        shape: overrides of the model's shape.
    """

    documents: int = 1
    ce_coef: float = 0.0
    device: str = "cpu"
    dtype: torch.dtype | None = None
    with_naive: bool = True
    naive_rows: int | None = None
    naive_attention: str = "eager"
    settings: Mapping[str, Any] | None = None
    shape: Mapping[str, Any] | None = None


def measure(preset: Preset, model_size: str, options: Options) -> dict[str, Any]:
    """Measure one preset; the figures as they are written to JSON."""
    device = torch.device(options.device)
    size = MODELS[model_size].in_dtype(options.dtype)
    with device:  # a large model takes long to draw on a CPU
        base = size.build(**(options.shape or {}))
    vocabulary = base.config.vocab_size
    rows_at_once = options.naive_rows or naive_rows_at_once(
        preset, base, device, options.naive_attention
    )
    model = with_adapters(base, preset.lora_rank)
    reference = copy_of(model) if options.with_naive else None

    ours = OurStep(
        model,
        preset,
        use_cpu=device.type == "cpu",
        documents=options.documents,
        settings={"ce_coef": options.ce_coef, **(options.settings or {})},
    )
    steps: dict[str, OurStep | TheirStep] = {"ours": ours}
    repeats = {"ours": preset.repeats}
    theirs = None
    if reference is not None:
        bare_model(reference).set_attn_implementation(options.naive_attention)
        phi = None if preset.lora_rank else copy_of(reference).requires_grad_(False)
        naive = NaiveStep(reference, phi, ours.trainer.ebft, rows_at_once=rows_at_once)
        theirs = TheirStep(naive, device)
        steps["naive"] = theirs
        repeats["naive"] = preset.naive_repeats

    def batch(length: int) -> dict[str, Tensor]:
        return random_documents(options.documents, length, vocabulary, device)

    shortest = preset.context_length + preset.generate_max_len + preset.stride
    warm_up = batch(max(shortest, preset.document // 4))
    for step in steps.values():
        step(warm_up)
    difference = None if theirs is None else compare(ours, theirs, warm_up)

    inputs = batch(preset.document)
    peaks = {}
    for name, step in steps.items():
        gc.collect()
        peaks[name] = peak_bytes(functools.partial(step, inputs), device)

    product = MatrixProduct(device, size.dtype)
    speeds: list[float] = []
    runs: dict[str, list[Seconds]] = {name: [] for name in steps}
    for turn in range(max(repeats.values())):
        for name, step in steps.items():
            if turn < repeats[name]:
                speeds.append(product.speed())
                runs[name].append(step(inputs))
    speeds.append(product.speed())

    rewards = reward_seconds(ours)
    with torch.device("meta"):
        shapes = with_adapters(size.build(**(options.shape or {})), preset.lora_rank)
    multiply_adds = count_step(
        ours.trainer.layout,
        shapes,
        n_feature_layers=ours.n_feature_layers,
        with_cross_entropy=options.ce_coef > 0,
    )
    speed = statistics.median(speeds)
    limit = {phase: multiply_adds[phase] / speed for phase in PHASES}
    seconds = {name: medians(those) for name, those in runs.items()}
    seconds["limit"] = limit | {"total": sum(limit.values())}
    total = {name: phases["total"] for name, phases in seconds.items()}
    return {
        "ratio_vs_naive": total["naive"] / total["ours"] if options.with_naive else None,
        "ratio_vs_limit": total["ours"] / total["limit"],
        "memory_ratio_vs_naive": peaks["naive"] / peaks["ours"] if options.with_naive else None,
        "seconds": seconds,
        "reward_seconds": rewards,
        "reward_share": rewards / total["ours"],
        "peak_bytes": peaks,
        "difference": None if difference is None else asdict(difference),
        "multiply_adds": multiply_adds,
        "matrix_product": {
            "size": product.size,
            "multiply_adds_per_second": speed,
            "all": speeds,
        },
        "runs": runs,
        "settings": {
            "preset": asdict(preset),
            "documents": options.documents,
            "ce_coef": options.ce_coef,
            "naive_rows_at_once": rows_at_once if options.with_naive else None,
            "naive_attention": options.naive_attention if options.with_naive else None,
            "model": model_size,
            "parameters": sum(weight.numel() for weight in base.parameters()),
            "shape": {**size.shape, **(options.shape or {})},
            "dtype": str(size.dtype).removeprefix("torch."),
            "more": dict(options.settings or {}),
        },
        "machine": machine(device),
    }


def report(figures: Mapping[str, Any]) -> str:
    """The figures as text: ratios first, then a table by phase."""
    lines = []
    if figures["ratio_vs_naive"] is not None:
        lines += [
            f"{figures['ratio_vs_naive']:.2f} times as fast as the naive order of work",
            f"{figures['memory_ratio_vs_naive']:.2f} times less peak memory",
        ]
    lines += [f"{figures['ratio_vs_limit']:.2f} times the arithmetic limit", ""]
    seconds, multiply_adds = figures["seconds"], figures["multiply_adds"]
    columns = [name for name in ("ours", "naive", "limit") if name in seconds]
    lines.append(f"| seconds | {' | '.join(columns)} | ours / limit | G multiply-adds |")
    lines.append("|---" * (len(columns) + 3) + "|")
    for phase in (*PHASES, "total"):
        times = " | ".join(f"{seconds[name][phase]:.3f}" for name in columns)
        ratio = seconds["ours"][phase] / seconds["limit"][phase]
        count = sum(multiply_adds.values()) if phase == "total" else multiply_adds[phase]
        lines.append(f"| {phase.replace('_', ' ')} | {times} | {ratio:.2f} | {count / 1e9:.2f} |")
    peaks = [f"{figures['peak_bytes'].get(name, 0) / 2**20:.0f}" for name in columns[:-1]]
    lines.append(f"| peak memory, MiB | {' | '.join(peaks)} | | | |")
    speed = figures["matrix_product"]["multiply_adds_per_second"]
    settings, where = figures["settings"], figures["machine"]
    lines += [
        "",
        f"Matrix product: {speed / 1e9:.1f} G multiply-adds a second.",
        f"Whitening, rewards and advantages: {figures['reward_seconds']:.4f} s, "
        f"{figures['reward_share']:.1%} of a step of ours.",
    ]
    rows = settings["naive_rows_at_once"]
    if rows is not None:
        lines.append(
            f"Naive: {settings['naive_attention']} attention, {rows} of "
            f"{settings['preset']['n_samples']} rows at once; largest difference of "
            f"log-probabilities {figures['difference']['log_probs']:.1e}, of rewards "
            f"{figures['difference']['rewards']:.1e}."
        )
    lines.append(
        f"{settings['model']} ({settings['parameters'] / 1e6:.1f} M parameters, "
        f"{settings['dtype']}), {settings['documents']} document(s) of "
        f"{settings['preset']['document']} tokens; {where['device']}, {where['threads']} threads, "
        f"torch {where['versions']['torch']}, {where['date']}."
    )
    return "\n".join(lines)


def add_step_options(parser: argparse.ArgumentParser, *, model: str) -> None:
    """The options that say which step, and where its figures go.

    Args:
        parser: gets them.
        model: the default of `--model`.
    """
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--model", choices=MODELS, default=model)
    parser.add_argument("--json", type=Path, help="Write the figures here.")
    parser.add_argument("--documents", type=int, default=1, help="Documents of a step.")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="A field of EBFTConfig, for ours: --set gradient_checkpointing=true",
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_step_options(parser, model="10m")
    parser.add_argument("--ce-coef", type=float, default=0.0, help="Weight of the cross-entropy.")
    parser.add_argument("--repeats", type=int, help="Timed steps of ours.")
    parser.add_argument("--naive-repeats", type=int, help="Timed steps of the naive order of work.")
    parser.add_argument("--naive-rows", type=int, help="Rows that it computes at once.")
    parser.add_argument(
        "--naive-attention",
        choices=("eager", "sdpa"),
        default="eager",
        help="Its attention; eager is the released code's.",
    )
    parser.add_argument("--skip-naive", action="store_true", help="Only ours and the limit.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads.")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="Default: the model's own."
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    given = parse(arguments)
    torch.set_num_threads(given.threads)
    asked = {"repeats": given.repeats, "naive_repeats": given.naive_repeats}
    preset = PRESETS[given.preset]
    preset = Preset(**asdict(preset) | {k: v for k, v in asked.items() if v is not None})
    figures = measure(
        preset,
        given.model,
        Options(
            documents=given.documents,
            ce_coef=given.ce_coef,
            device=given.device,
            dtype=None if given.dtype is None else getattr(torch, given.dtype),
            with_naive=not given.skip_naive,
            naive_rows=given.naive_rows,
            naive_attention=given.naive_attention,
            settings=dict(setting(text) for text in given.set),
        ),
    )
    figures["settings"]["preset"]["name"] = given.preset
    print(report(figures))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


def setting(text: str) -> tuple[str, Any]:
    """`name=value`, the value in JSON or else text.

    Raises:
        ValueError: no `=` in it.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text} sets nothing: write --set NAME=VALUE.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


if __name__ == "__main__":
    main()
