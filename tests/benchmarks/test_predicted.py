"""What is predicted of a GPU's step is what a real step on the CPU does, where that can be told."""

import functools
import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hf_ebft.packed.deferred import TrainingPass

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import fused_stand_ins  # noqa: E402  (scripts beside their own modules)
import held  # noqa: E402
import launched  # noqa: E402
import memory  # noqa: E402
import predicted  # noqa: E402
import pretended  # noqa: E402
import settings  # noqa: E402
import step  # noqa: E402

CPU = torch.device("cpu")
PRESET = settings.Preset(document=96, stride=4, context_length=8, generate_max_len=3, n_samples=3)
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# What the device decides otherwise: a GPU's rows are filled up, its chunks are larger.
AS_ON_A_CPU = {"pad_to_multiple_of": 1, "training_chunk_size": 10**6}


def real_step(options: dict[str, Any]) -> Any:
    """A second step of the library on the CPU, ready to be made."""
    model = settings.MODELS["tiny"].build(**SHAPE)
    ours = step.OurStep(model, PRESET, use_cpu=True, documents=2, settings=options)
    inputs = settings.random_documents(2, PRESET.document, SHAPE["vocab_size"], CPU)
    ours.trainer.training_step(ours.prepared, dict(inputs))
    ours.policy.zero_grad(set_to_none=False)
    gc.collect()
    return ours, inputs


def predict(options: dict[str, Any]) -> dict[str, Any]:
    """The same step, predicted; allocations are not rounded up, as on the CPU."""
    return predicted.Prediction(
        PRESET, "tiny", documents=2, settings=options, shape=SHAPE, block=1
    ).run()


@pytest.mark.parametrize(
    "options",
    [
        {"packed_attention": "split"},
        pytest.param({"packed_attention": "sdpa"}, marks=pytest.mark.slow),
        {"packed_attention": "sdpa", "training_chunk_size": 150},
        {"packed_attention": "sdpa", "gradient_checkpointing": True},
        pytest.param(
            {"packed_attention": "eager", "log_prob_chunk_size": 64}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_predicted_memory_is_that_of_a_real_step(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real kernels take some work space, which is the difference.

    (In chunks of split attention that small it is 2.2 %, so chunks are compared with sdpa.)
    """
    # On a GPU the documents' pass with gradient comes after the chunks, so here as well.
    again = functools.partial(TrainingPass, makes_documents_again=True)
    monkeypatch.setattr("hf_ebft.training.steps.TrainingPass", again)
    options = AS_ON_A_CPU | options
    ours, inputs = real_step(options)
    work = functools.partial(ours.trainer.training_step, ours.prepared, dict(inputs))
    real = memory.peak_bytes(work, CPU)
    found = predict(options)
    assert found["peak_bytes"] == pytest.approx(real, rel=0.02)
    # Who holds it is known for the large part.
    assert sum(entry["bytes"] for entry in found["holders_at_peak"]) > 0.9 * found["peak_bytes"]


def test_predicted_arithmetic_is_that_of_a_real_step() -> None:
    """By torch's own counter, for what follows sampling, which is computed otherwise on a GPU."""
    options = {**AS_ON_A_CPU, "packed_attention": "eager"}
    ours, inputs = real_step(options)
    with FlopCounterMode(display=False) as whole:
        ours.trainer.training_step(ours.prepared, dict(inputs))
    with FlopCounterMode(display=False) as sampling:
        ours.trainer.sample_rollouts(ours.prepared, dict(inputs))
    found = predict(options)["multiply_adds"]
    expected = whole.get_total_flops() - sampling.get_total_flops()
    assert 2 * (found["features"] + found["training"]) == expected


class Waits:
    """Counts what the host reads."""

    def __init__(self) -> None:
        self.waits = 0

    def ran(self, *_: Any) -> None:
        """Not counted."""

    def synchronized(self) -> None:
        """Not counted."""

    def waited(self) -> None:
        """Counted."""
        self.waits += 1


def test_integers_that_the_host_sent_are_known() -> None:
    """Through views, changes in place and shapes that depend on them, until something unknown is
    written.
    """
    waits = Waits()
    with pretended.PretendedGPU([waits]):
        sent = torch.tensor([[3, 4, 5], [0, 1, 2]]).to("cuda")
        assert sent.device == pretended.GPU and sent.is_cuda and waits.waits == 0
        doubled = sent * 2 + torch.arange(3, device=sent.device)
        doubled[1][:2] += 10
        assert doubled.cpu().tolist() == [[6, 9, 12], [10, 13, 6]]
        assert int(doubled[0, 1]) == 9 and waits.waits == 2
        assert sent[sent > 3].tolist() == [4, 5]
        with pytest.raises(TypeError, match="numpy"):
            sent.numpy()
        unknown = torch.randint(9, (2, 3), device="cuda")
        doubled[1] = unknown[1]
        # Nothing is left of a storage in which something is unknown, and zeros are read.
        assert doubled.cpu().tolist() == [[0] * 3] * 2
        assert bool(torch.isfinite(torch.randn(2, device="cuda")).all())


def test_backward_passes_run_on_the_device() -> None:
    """Functions of ours name devices in their backward passes."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
            return tensor * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.full((1,), 2.0, device=gradient.device)

    with pretended.PretendedGPU():
        weight = torch.nn.Parameter(torch.empty(4, 3, device="cuda"))
        Twice.apply(weight @ torch.randn(3, 2, device="cuda")).sum().backward()
        assert weight.grad is not None and weight.grad.device == pretended.GPU
        (gradient,) = torch.autograd.grad(Twice.apply(weight).sum(), weight)
        assert gradient.shape == (4, 3)


def test_held_memory_by_hand() -> None:
    """Views are free, what is released is gone, and what was held before does not count."""
    memory_held = held.HeldMemory(lambda: "training", block=512)
    with pretended.PretendedGPU([memory_held]):
        before = torch.empty(1000, device="cuda")
        memory_held.start()
        large = before[:500].double()  # 4000 bytes
        view = large[10:]
        small = torch.empty(1, device="cuda")  # 512
        assert memory_held.held - 4096 == 4096 + 512 == memory_held.peak
        del large, view
        again = torch.empty(600, device="cuda")  # 2400 bytes
        assert memory_held.peak == 4096 + 512 and memory_held.held == 4096 + 512 + 2560
        del small, again


def test_the_host_and_the_device_take_turns() -> None:
    """Launches hide behind a busy device, and the device waits where launches are slow."""
    gpu = launched.Machine(launch=10.0, view=1.0, replay=0.5, kernel=2.0, bandwidth=1.0)
    work = launched.LaunchedWork(lambda: "training", lambda phase, func: phase, gpu)
    work.launched("long", launched.Cost(1, 1, device=25.0))  # the device is done after 35
    work.launched("short", launched.Cost(1, 1, device=1.0))  # launched after 20, done after 36
    assert (work.timeline.host, work.timeline.device) == (20.0, 36.0)
    work.waited()
    work.launched("short", launched.Cost(1, 1, device=1.0))
    assert (work.timeline.host, work.timeline.device) == (46.0, 47.0)
    work.replay(
        [("one", launched.Cost(1, 1, device=2.0)), ("two", launched.Cost(1, 2, device=4.0))]
    )
    # The gap before every kernel belongs to the device: 47 + 2.5 + 5.
    assert (work.timeline.host, work.timeline.device) == (56.0, 54.5)
    assert work.seconds["training"] == 56.0 and work.by_phase["training"].kernels == 6


def test_flex_attention_costs_the_tiles_of_its_block_mask() -> None:
    """A causal mask of 512 tokens has 10 of 16 tiles, for every head."""
    work = launched.LaunchedWork(lambda: "training", held.owner)
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, 512, 512, device="cpu")
    with pretended.PretendedGPU([work]) as gpu:
        stand_ins = fused_stand_ins.StandIns(gpu, work)
        query = torch.empty(1, 4, 512, 32, device="cuda", requires_grad=True)
        key = torch.empty(1, 2, 512, 32, device="cuda")
        output = stand_ins.flex_attention(query, key, key, block_mask=mask.to("cuda"))
        forward = work.by_phase["training"].multiply_adds
        assert output.shape == query.shape and forward == 2 * 4 * 10 * 128 * 128 * 32
        work.start()
        output.sum().backward()
        assert work.by_phase["training"].multiply_adds == 5 * forward // 2


def block(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """A gated block of a transformer: normalisation, two products, one more."""
    gate, up, down = weights
    h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return x + (torch.nn.functional.silu(h @ gate) * (h @ up)) @ down


BLOCK_SHAPES = ((256, 64), (64, 192), (64, 192), (192, 64))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_a_compiled_function_keeps(checkpointed: bool) -> None:
    """As torch's own partitioner does, up to a number for each row."""
    torch._dynamo.reset()
    real = [torch.randn(shape, requires_grad=True) for shape in BLOCK_SHAPES]
    compiled = torch.compile(block, backend="aot_eager_decomp_partition")
    given = {tensor.data_ptr() for tensor in real}
    saved = [t for t in compiled(*real).grad_fn.saved_tensors if t.data_ptr() not in given]
    expected = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    assert len(saved) == 5  # the normalised rows and their norms, gate, up, and their product

    kept = held.HeldMemory(lambda: "training", block=1)
    work = launched.LaunchedWork(lambda: "training", held.owner)
    work.on_region = kept.region
    with pretended.PretendedGPU([kept, work]) as gpu:
        stand_in = fused_stand_ins.StandIns(gpu, work).compile(block)
        rows, *weights = (
            torch.empty(shape, device="cuda").requires_grad_() for shape in BLOCK_SHAPES
        )
        before = kept.held
        if checkpointed:
            output = checkpoint(stand_in, rows, *weights, use_reentrant=False)
            expected = 256 * 4
        else:
            output = stand_in(rows, *weights)
        assert kept.held - before - output.nbytes == expected - 256 * 4
        if not checkpointed:  # nothing else was in memory but the last product, and then the sum
            assert kept.peak - before == expected - 256 * 4 + output.nbytes
        forward = work.by_owner["training: compiled block"]
        # Three products, and four kernels around them.
        assert forward.kernels == 7 and forward.multiply_adds == 3 * 256 * 64 * 192
        output.sum().backward()
        assert weights[2].grad is not None and weights[2].grad.shape == BLOCK_SHAPES[3]
        backward = work.by_owner["training: compiled block, backward"]
        assert backward.multiply_adds == 6 * 256 * 64 * 192
        # Gradient checkpointing runs the whole function again.
        assert forward.multiply_adds == (6 if checkpointed else 3) * 256 * 64 * 192


def test_predicted_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, with what `auto` means on CUDA for heads that flex_attention takes."""
    target = tmp_path / "figures.json"
    predicted.main(["--preset", "tiny", "--model", "tiny", "--json", str(target)])
    figures = json.loads(target.read_text())
    assert figures["settings"]["attention"] == "sdpa"  # heads of 8
    assert "| kernels | " in capsys.readouterr().out
    assert figures["graph_bytes"] > 0
    # A step that is replayed launches nothing but itself.
    assert not any("in graphs" in entry["by"] and entry["count"] for entry in figures["operators"])
