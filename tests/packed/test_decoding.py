"""Decoding against preallocated keys and values equals decoding against a cache that grows."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_ebft.packed import cuda_graphs
from hf_ebft.packed.cuda_graphs import KEPT, StepGraphs, _stream_for_captures
from hf_ebft.packed.decoding import StaticDecoder, _lies_whole_on
from hf_ebft.packed.deferred import TrainingPass
from hf_ebft.packed.forward import PackedForward, evaluation_mode
from hf_ebft.packed.sampling import SamplingRecord, make_generator, sample_with_record
from hf_ebft.packed.static_cache import StaticCache
from hf_ebft.rows.layout import PackedLayout
from tests.support.architectures import tiny_model
from tests.support.decoding import decoder_for
from tests.support.exactness import Case, lora_model, packed_documents, ragged_batch

CPU = torch.device("cpu")
ARCHITECTURES = (
    "gemma2",  # soft caps
    "gemma3_text",
    "gemma3n_text",  # layers that share keys
    "gemma4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",  # attention sinks
    "llama",
    "llama4_text",  # chunks
    "mistral",
    "opt",
    "phi",
    "qwen2",
    "qwen3_moe",
)
CASES = {
    # One document has no block at all; the window of 7 is shorter than prefix and rollout.
    "ragged": Case(ragged_batch(33, 21, 5), stride=6, generate_max_len=9),
    "packed documents": Case(
        packed_documents([15, 9, 4], [20]), stride=4, context_length=1, n_samples=3
    ),
    # Documents and rollouts of several of flex_attention's tiles.
    "long": Case(ragged_batch(300, 280), stride=5, n_samples=4, generate_max_len=4),
    # More than one tile of rollouts.
    "many samples": Case(ragged_batch(40, 31), stride=5, n_samples=70, generate_max_len=3),
}


# Of log-probabilities, in float32.
ROUNDING = 1e-5


def rounding(architecture: str) -> float:
    """Gemma 4 does not divide its scores by the square root of the heads' width, which is 4."""
    return 4 * ROUNDING if architecture.startswith("gemma4") else ROUNDING


def grown(forward: PackedForward) -> PackedForward:
    """The same, told to let the cache grow."""
    other = replace(forward)
    other.decoding.grows = "the test says so"
    return other


def sampled(
    model: nn.Module, forward: PackedForward, layout: PackedLayout, **settings: Any
) -> SamplingRecord:
    options = {"temperature": 0.9, "top_p": 1.0, "chunk_size": 50} | settings
    return sample_with_record(model, forward, layout, generator=make_generator(CPU, 3), **options)[
        1
    ]


def assert_equal_rollouts(
    found: SamplingRecord, expected: SamplingRecord, tolerance: float = ROUNDING
) -> None:
    """Token for token, where there are blocks."""
    exists = expected.rollouts.exists[:, None, :, None]
    assert torch.equal(found.rollouts.tokens * exists, expected.rollouts.tokens * exists)
    difference = (found.log_probs - expected.log_probs) * exists
    assert float(difference.abs().max()) < tolerance


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_static_decoding_equals_a_growing_cache(architecture: str, case: Case) -> None:
    model = tiny_model(architecture, limit=4096)
    forward = PackedForward.for_model(model)
    found = sampled(model, forward, case.layout())
    assert forward.decoding.works
    expected = sampled(model, grown(forward), case.layout())
    assert_equal_rollouts(found, expected, rounding(architecture))


@pytest.mark.parametrize("attention", ["split", "sdpa", "eager"])
@pytest.mark.parametrize("settings", [{"top_p": 0.7}, {"chunk_size": 3}, {"temperature": 1.0}])
def test_it_does_for_every_attention_and_way_of_drawing(
    attention: str, settings: dict[str, float]
) -> None:
    model = tiny_model("gemma3_text")
    forward, layout = PackedForward.for_model(model, attention), CASES["ragged"].layout()
    found = sampled(model, forward, layout, **settings)
    assert forward.decoding.works
    assert_equal_rollouts(found, sampled(model, grown(forward), layout, **settings))
    assert forward.recipe.implementation.endswith(attention)
    assert model.config._attn_implementation.endswith(attention)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_it_does_with_adapters(architecture: str) -> None:
    model = lora_model(architecture)
    forward, layout = PackedForward.for_model(model), CASES["packed documents"].layout()
    found = sampled(model, forward, layout)
    assert forward.decoding.works
    assert_equal_rollouts(found, sampled(model, grown(forward), layout))


def test_rollouts_do_not_depend_on_how_many_rows_of_logits_exist_at_once() -> None:
    model = tiny_model("llama")
    forward, layout = PackedForward.for_model(model), CASES["ragged"].layout()
    whole, single = (sampled(model, forward, layout, chunk_size=size) for size in (10_000, 1))
    assert torch.equal(whole.rollouts.tokens, single.rollouts.tokens)


@pytest.mark.parametrize("architecture", ["deepseek_v3", "falcon", "mllama"])
def test_other_models_grow_their_cache_and_say_so_once(
    architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(architecture)
    forward = PackedForward.for_model(model)
    with caplog.at_level(logging.WARNING, "hf_ebft.packed.decoding"):
        for _ in range(2):
            sampled(model, forward, CASES["ragged"].layout())
    messages = [record.message for record in caplog.records if "grow" in record.message]
    assert len(messages) == 1 and type(model).__name__ in messages[0]
    # Foreseen: no traceback of an error that looks like a bug.
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda mask, **states: {"attention_mask": mask.clone()}, "attention mask"),
        (lambda mask, **states: {"attention_mask": mask, "position_bias": mask}, "position_bias"),
    ],
)
def test_a_model_that_does_more_than_hand_on_is_noticed_in_its_first_step(
    change: Callable[..., dict[str, Any]], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it did with the mask or the scores would be lost; the rollouts must not be."""
    import hf_ebft.packed.static_cache as static_cache

    original = static_cache._decoding_attention_forward

    def changed(module: nn.Module, *states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        return original(module, *states, **kwargs | change(attention_mask))

    def in_place(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
    ) -> Any:
        return changed(module, query, key, value, attention_mask=mask, **kwargs)

    model = tiny_model("llama")
    forward, layout = PackedForward.for_model(model), CASES["ragged"].layout()
    expected = sampled(model, grown(forward), layout)
    from transformers import AttentionInterface

    AttentionInterface.register(static_cache.DECODING, in_place)
    try:
        found = sampled(model, forward, layout)
    finally:
        AttentionInterface.register(static_cache.DECODING, original)
    assert reason in str(forward.decoding.grows)
    assert_equal_rollouts(found, expected)
    assert model.config._attn_implementation == "ebft_split"


# ---- One step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gemma4", "llama4_text"])
def test_a_step_is_a_function_of_its_tensors(architecture: str) -> None:
    """The same contents give the same results, and no tensor is replaced by another."""
    model = tiny_model(architecture, limit=4096).eval()
    forward = PackedForward.for_model(model)
    decoder = decoder_for(model, forward, CASES["ragged"].layout())
    with evaluation_mode(model), decoder.ready():
        decoder.step()
        assert isinstance(decoder._cache, StaticCache)
        layers = [part for layer in decoder._cache.layers for part in (layer.keys, layer.values)]
        places = [tensor.data_ptr() for tensor in (*decoder.inputs, *layers)]
        before = [tensor.clone() for tensor in (*decoder.inputs, *layers)]
        decoder.step()
        after = [tensor.clone() for tensor in (*decoder.inputs, *layers)]
        for tensor, value in zip((*decoder.inputs, *layers), before, strict=True):
            tensor.copy_(value)
        decoder.step()
    again = [*decoder.inputs, *layers]
    assert all(torch.equal(one, two) for one, two in zip(after, again, strict=True))
    assert not torch.equal(before[0], after[0])
    assert places == [tensor.data_ptr() for tensor in again]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "architecture", ["gemma2", "gemma3_text", "gemma4", "gpt_oss", "llama4_text"]
)
def test_block_masks_show_what_tiles_show(architecture: str, case: Case) -> None:
    """Windows move from step to step, under one block mask; several tiles of it, too."""
    model = tiny_model(architecture, limit=4096).eval()
    forward = PackedForward.for_model(model)
    found = []
    for by_blocks in (False, True):
        decoder = decoder_for(model, forward, case.layout(), by_blocks=by_blocks)
        with evaluation_mode(model), decoder.ready():
            for _ in range(decoder.n_steps):
                decoder.step()
        exists = case.layout().blocks.exists.repeat_interleave(case.n_samples, dim=1)
        count = exists.shape[1]
        found.append((decoder.tokens[..., :count], decoder.log_probs[..., :count], exists))
    (tokens, log_probs, exists), (expected_tokens, expected, _) = found
    assert torch.equal(tokens * exists, expected_tokens * exists)
    assert float(((log_probs - expected) * exists).abs().max()) < rounding(architecture)


@pytest.mark.parametrize("n_batches", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_step_is_one_graph_for_all_lengths_of_a_bucket(n_batches: int) -> None:
    """No break, and nothing is compiled again for batches of other lengths."""
    model = tiny_model("llama", limit=4096).eval()
    forward = PackedForward.for_model(model)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    batches = [
        Case(ragged_batch(130 + length, 240 - 2 * length), stride=6, n_samples=2)
        for length in range(0, 50, 50 // n_batches)
    ]
    decoders = [
        decoder_for(model, forward, batch.layout(), seed) for seed, batch in enumerate(batches)
    ]
    captured = decoder_for(model, forward, batches[0].layout())
    torch._dynamo.reset()
    with evaluation_mode(model), captured.ready(traceable=True):
        compiled = torch.compile(captured.step, fullgraph=True, backend=backend)
        for decoder in decoders:
            found = []
            for step in (compiled, captured.step):
                captured.take_inputs_of(decoder)
                for _ in range(captured.n_steps):
                    step()
                found.append(captured.tokens.clone())
            assert torch.equal(*found)
    assert len(graphs) == 1


def test_compiled_layers_are_not_compiled_again_for_steps() -> None:
    """Each would be, one by one: its own number is part of what it computes with a cache."""
    model = tiny_model("llama").eval()
    forward, layout = PackedForward.for_model(model), CASES["ragged"].layout()
    decoder = decoder_for(model, forward, layout)
    calls: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph

    for layer in model.model.layers:
        layer.compile(backend=backend)
    with evaluation_mode(model), decoder.ready():
        decoder.step()
    assert not calls
    with torch.no_grad():
        model(layout.documents.input_ids, use_cache=False)
    assert calls


def test_a_step_to_be_captured_casts_its_weights_itself() -> None:
    """Whatever copies autocast has of them, with accelerate's context around the model's forward;
    and it leaves none behind."""
    model = tiny_model("llama").eval()
    weight = model.get_output_embeddings().weight
    assert weight.requires_grad
    inner = torch.autocast("cpu", torch.bfloat16)
    model.forward = inner(model.forward)
    forward = PackedForward.for_model(model)
    state = torch.randn(1, weight.shape[1])
    with evaluation_mode(model), torch.autocast("cpu", torch.bfloat16):
        decoder = decoder_for(model, forward, CASES["ragged"].layout())
        before = nn.functional.linear(state, weight)
        weight.zero_()  # the copy that autocast has stays
        assert torch.equal(nn.functional.linear(state, weight), before)
        with decoder.ready():
            decoder.step_alone()
        uniform = -torch.tensor(float(len(weight))).log()
        torch.testing.assert_close(decoder.log_probs[1], uniform.expand_as(decoder.log_probs[1]))
        weight.fill_(1.0)
        assert not torch.equal(nn.functional.linear(state, weight), torch.zeros(1, len(weight)))


# ---- Graphs -------------------------------------------------------------------------------------


class FakeCapture:
    """In the place of `capture`: counts, and replays by running the step again."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.pools: list[str] = []

    def __call__(self, step: Callable[[], None], pool: str | None) -> Any:
        self.captures += 1
        self.pools.append(pool or f"pool {self.captures}")
        own = self.pools[-1]
        step()  # as a warm-up does; what it wrote must not be seen later
        decoder = step.__self__  # type: ignore[attr-defined]

        def replay() -> None:
            self.replays += 1
            with evaluation_mode(decoder.model), decoder.ready():
                step()

        return SimpleNamespace(replay=replay, pool=lambda: own)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    monkeypatch.setattr(StaticDecoder, "can_be_captured", True)
    return FakeCapture()


def captured_by(model: nn.Module, fake: FakeCapture) -> PackedForward:
    forward = PackedForward.for_model(model)
    forward.decoding.static, forward.decoding.graphs = True, StepGraphs(capture=fake)
    return forward


def lengths(*documents: int) -> PackedLayout:
    return Case(ragged_batch(*documents, seed=sum(documents)), stride=6, n_samples=2).layout()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_replayed_steps_give_the_same_rollouts(architecture: str, fake: FakeCapture) -> None:
    """With and without a graph, batch after batch of one bucket."""
    model = tiny_model(architecture, limit=4096)
    forward = captured_by(model, fake)
    plain = PackedForward.for_model(model)
    plain.decoding.static, plain.decoding.graphs = True, StepGraphs(works=False)
    other_way = grown(plain)
    kept = []
    for layout in (lengths(40, 33), lengths(38, 45), lengths(21, 44), lengths(40, 33)):
        kept.append(sampled(model, forward, layout))
        assert torch.equal(kept[-1].rollouts.tokens, sampled(model, plain, layout).rollouts.tokens)
    assert_equal_rollouts(kept[0], sampled(model, other_way, lengths(40, 33)))
    # From the second on; and earlier results are not written over.
    assert (fake.captures, fake.replays) == (1, 9)
    assert torch.equal(kept[0].rollouts.tokens, kept[-1].rollouts.tokens)
    assert torch.equal(kept[0].log_probs, kept[-1].log_probs)


def test_the_pass_over_the_documents_stays_as_it_was(fake: FakeCapture) -> None:
    """A graph copies keys and values: those of training's own pass must not be written over."""
    model = tiny_model("llama", limit=4096)
    forward = captured_by(model, fake)
    training = TrainingPass(
        forward, temperature=1.0, with_document=True, chunk_size=50, training_chunk_size=1
    )
    records = []
    for layout in (lengths(40, 33), lengths(38, 45), lengths(40, 33)):
        targets = training.document_targets(model, layout)
        records.append(sampled(model, forward, layout, temperature=1.0, targets=targets))
        if len(records) == 2:
            assert records[1].document_pass is not None
            before = [states.clone() for states in records[1].document_pass.states]
    assert fake.captures == 1
    after = records[1].document_pass
    assert after is not None
    assert all(torch.equal(one, two) for one, two in zip(before, after.states, strict=True))


def test_other_shapes_settings_and_weights_get_graphs_of_their_own(fake: FakeCapture) -> None:
    model = lora_model("llama")
    forward = captured_by(model, fake)

    def captures(layout: PackedLayout, **settings: Any) -> int:
        before = fake.captures
        for _ in range(2):
            sampled(model, forward, layout, **settings)
        return fake.captures - before

    assert captures(lengths(40, 33)) == 1
    assert captures(lengths(40, 33)) == 0
    assert captures(lengths(40)) == 1
    assert captures(lengths(40, 33), temperature=0.5) == 1
    with model.disable_adapter():  # type: ignore[operator]
        assert captures(lengths(40, 33)) == 1
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    weight.data = weight.data.clone()
    assert captures(lengths(40, 33)) == 1
    for temperature in (0.6, 0.7, 0.8):
        assert captures(lengths(40, 33), temperature=temperature) == 1
    graphs = forward.decoding.graphs
    assert len(graphs._captured) == KEPT
    # The first one's pool serves all, also after that graph has gone.
    assert fake.captures > KEPT and set(fake.pools) == {"pool 1"}


def test_weights_of_several_devices_are_not_captured() -> None:
    """`device_map` moves states from device to device, or weights to where they are needed."""
    model = tiny_model("llama")
    assert _lies_whole_on(model, CPU)
    model.get_output_embeddings().to("meta")
    assert not _lies_whole_on(model, CPU)


def test_decoding_goes_on_where_a_capture_fails(
    fake: FakeCapture, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(step: Callable[[], None], pool: Any) -> Any:
        step()
        raise RuntimeError("operation not permitted when stream is capturing")

    model = tiny_model("llama", limit=4096)
    forward = captured_by(model, fake)
    forward.decoding.graphs.capture = failing
    with caplog.at_level(logging.WARNING, "hf_ebft.packed.cuda_graphs"):
        records = [sampled(model, forward, lengths(40, 33)) for _ in range(4)]
    assert all(
        torch.equal(record.rollouts.tokens, records[0].rollouts.tokens) for record in records
    )
    assert [record.message for record in caplog.records] == [
        "Decoding steps cannot be captured as a CUDA graph (RuntimeError: operation not permitted "
        "when stream is capturing). They run one operator at a time, which takes more time."
    ]


class PretendedDevice:
    """In the place of `torch.cuda`: keeps what it is asked for, and the stream that is current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, breaks: bool = False) -> None:
        self.stream, self.mode = "usual", "default"
        self.asked: list[Any] = []
        pretended = SimpleNamespace(
            current_stream=lambda: SimpleNamespace(wait_stream=lambda stream: None),
            current_device=lambda: 1,
            Stream=self._new_stream,
            stream=self._within,
            set_stream=lambda stream: setattr(self, "stream", "usual"),
            get_sync_debug_mode=lambda: self.mode,
            set_sync_debug_mode=self._set_mode,
            CUDAGraph=lambda: "a graph",
            graph=self._graph,
        )
        self._breaks = breaks
        monkeypatch.setattr(cuda_graphs, "torch", SimpleNamespace(cuda=pretended))
        # As new here, and without streams that do not exist afterwards.
        monkeypatch.setattr(
            cuda_graphs, "_stream_for_captures", cache(_stream_for_captures.__wrapped__)
        )

    def _new_stream(self, device: int) -> Any:
        self.asked.append(f"a stream on device {device}")
        return SimpleNamespace(wait_stream=lambda stream: None)

    def _set_mode(self, mode: str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
        self.mode = mode

    @contextmanager
    def _within(self, stream: Any) -> Iterator[None]:
        self.stream = "other"
        try:
            yield
        finally:
            self.stream = "usual"

    @contextmanager
    def _graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        # Like torch's, which does not come back from a capture that it cannot end.
        self.stream = "other"
        yield
        if self._breaks:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.stream = "usual"

    def step(self) -> None:
        self.asked.append((self.stream, self.mode))


def test_a_capture_is_tried_out_where_waiting_for_the_device_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a stream of the device that is current; the second capture there needs no other."""
    device = PretendedDevice(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            cuda_graphs.capture(device.step)
    trial, capture = ("other", "error"), ("other", "default")
    each = [("other", "default"), trial, capture]  # compilers may wait, the first time
    assert device.asked == ["a stream on device 1", *each, *each]
    assert (device.stream, device.mode) == ("usual", "default")


def test_work_goes_on_where_it_was_after_a_capture_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = PretendedDevice(monkeypatch, breaks=True)
    with pytest.raises(RuntimeError, match="previous error"):
        cuda_graphs.capture(device.step)
    assert (device.stream, device.mode) == ("usual", "default")


def test_a_step_that_waits_for_the_device_is_never_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = PretendedDevice(monkeypatch)

    def waiting() -> None:
        device.step()
        if device.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        cuda_graphs.capture(waiting)
    assert device.asked == ["a stream on device 1", ("other", "default"), ("other", "error")]
    assert (device.stream, device.mode) == ("usual", "default")


def test_an_error_that_nobody_foresaw_is_shown_with_its_traceback(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a bug of ours, which a slower run would hide."""

    def broken(decoder: StaticDecoder) -> None:
        raise KeyError("a bug")

    model = tiny_model("llama")
    forward, layout = PackedForward.for_model(model), CASES["ragged"].layout()
    expected = sampled(model, grown(forward), layout)
    monkeypatch.setattr(StaticDecoder, "step", broken)
    forward = PackedForward.for_model(model)
    with caplog.at_level(logging.WARNING, "hf_ebft.packed.decoding"):
        assert_equal_rollouts(sampled(model, forward, layout), expected)
    (record,) = [record for record in caplog.records if "grow" in record.message]
    assert record.exc_info is not None and record.exc_info[0] is KeyError
