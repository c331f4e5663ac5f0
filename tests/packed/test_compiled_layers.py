"""Layers and the head's chunks compiled: one graph each, once a shape, with the same gradients.

TorchDynamo traces on a CPU as it does on a GPU; the backends here run what was traced as it is.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

from hf_ebft import EBFTTrainer
from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.packed import drawing, step_attention
from hf_ebft.packed.compiled_layers import (
    CompiledForward,
    CompileOptions,
    compile_layers,
    layers_as_written,
)
from hf_ebft.packed.deferred import TrainingPass
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.packed.model_parts import decoder_layers
from hf_ebft.packed.sampling import (
    Rollouts,
    SamplingRecord,
    make_generator,
    sample_with_record,
)
from hf_ebft.packed.verification import verify_packing
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.buckets import Buckets
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from tests.support.architectures import tiny_model
from tests.support.exactness import lora_model, ragged_batch
from tests.support.tiny import config, texts, tiny_llama

# A break of a graph raises.
TRACED = CompileOptions("eager", fullgraph=True)
AOT = replace(TRACED, backend="aot_eager")


pytestmark = pytest.mark.usefixtures("flex_gradient_on_a_cpu")


@pytest.fixture(autouse=True)
def counters_from_zero(flex_gradient_on_a_cpu: None) -> None:
    counters.clear()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def rollouts_of(*lengths: int, seed: int = 0, multiple: int = 8) -> Rollouts:
    """Random rollouts over documents of these lengths, in a row of a multiple of `multiple`."""
    documents = Documents.from_inputs(ragged_batch(*lengths), widths=Buckets(multiple))
    blocks = find_blocks(
        documents, stride=4, context_length=4, generate_max_len=4, counts=Buckets(multiple)
    )
    layout = PackedLayout(documents, blocks, 2, 4)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 30, layout.rollout_shape, generator=generator)
    return Rollouts(tokens, blocks.exists, layout)


def log_probs_of(
    model: nn.Module, forward: PackedForward, rollouts: Rollouts, chunk_size: int
) -> Tensor:
    """The sum of all log-probabilities, with gradient."""
    found = packed_log_probs(
        model,
        forward,
        rollouts,
        temperature=0.8,
        with_document=True,
        chunk_size=chunk_size,
    )
    exists = rollouts.exists[:, None, :, None]
    assert found.document is not None
    return (found.rollout * exists).sum() + found.document.sum()


def gradient(model: nn.Module, forward: PackedForward, rollouts: Rollouts) -> Tensor:
    model.train()
    model.zero_grad()
    log_probs_of(model, forward, rollouts, chunk_size=7).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def policy(kind: str) -> nn.Module:
    if kind == "lora":
        return lora_model("llama")
    model = tiny_model(kind.split()[0], limit=4096)
    if "checkpointing" in kind:
        model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in kind.split()})
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("attention", ["flex_attention", "sdpa"])
@pytest.mark.parametrize(
    "kind",
    ["llama", "gemma3_text", "lora", "llama checkpointing", "llama reentrant checkpointing"],
)
def test_gradients_are_those_of_the_model_as_written(kind: str, attention: str) -> None:
    model = policy(kind)
    plain = copy.deepcopy(model)
    rollouts = rollouts_of(30, 21)
    expected = gradient(plain, PackedForward.for_model(plain, attention), rollouts)
    before = graphs()
    forward = PackedForward.for_model(model, attention, compiler=TRACED)
    found = gradient(model, forward, rollouts)
    assert graphs() > before
    largest = float(expected.abs().max())
    assert largest > 0.1
    # The two round the head's gradient differently. Gradients of adapters reach 200 here, and in
    # float32 either is 4e-3 away from double precision.
    torch.testing.assert_close(found, expected, atol=max(1e-5, 1e-6 * largest), rtol=1e-5)


@pytest.mark.parametrize(
    ("attention", "backend"),
    # flex_attention by itself would be traced in every pass; aot_eager keeps what it traced.
    [("sdpa", "eager"), pytest.param("flex_attention", "aot_eager", marks=pytest.mark.slow)],
)
def test_nothing_is_compiled_again_over_fifty_lengths_of_one_bucket(
    attention: str, backend: str
) -> None:
    """One graph for all layers, three for the chunks of the head: a rollout's first tokens have n
    targets a state, documents another temperature.
    """
    model = tiny_model("llama", limit=4096)
    compiler = replace(TRACED, backend=backend)
    forward = PackedForward.for_model(model, attention, compiler=compiler)
    shapes = set()
    for step in range(50):
        rollouts = rollouts_of(17 + step % 16, 5 + step // 2, seed=step, multiple=32)
        shapes.add((rollouts.layout.document_width, rollouts.tokens.shape))
        log_probs_of(model, forward, rollouts, chunk_size=64)
    assert len(shapes) == 1
    assert graphs() == 4
    assert not counters["graph_break"]


def test_every_layer_shares_one_graph() -> None:
    for n_layers in (2, 5):
        torch._dynamo.reset()
        counters.clear()
        model = tiny_model("llama", limit=4096, num_hidden_layers=n_layers)
        forward = PackedForward.for_model(model, "sdpa", compiler=TRACED)
        gradient(model, forward, rollouts_of(30, 21))
        assert graphs() == 4


@pytest.mark.parametrize("n_batches", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "expected"),
    # Kinds of layers that differ for the pass over the documents, and for steps.
    [
        ("llama", 1 + 1),
        ("gemma3_text", 1 + 2),
        pytest.param("qwen3", 1 + 2, marks=pytest.mark.slow),
        pytest.param("gpt_neox", 1 + 1, marks=pytest.mark.slow),
        ("lora", 1 + 1),
    ],
)
def test_sampling_is_one_graph_for_all_layers_steps_and_lengths_of_a_bucket(
    kind: str, expected: int, n_batches: int
) -> None:
    """And samples what the layers sample as they are written."""
    assert sampled_as_written(kind, "sdpa", n_batches) == expected


def test_with_flex_attention_too() -> None:
    """Windows and full attention, by block masks of documents and of steps."""
    # The layers as written trace flex_attention by itself, in every pass; here, one shape.
    assert sampled_as_written("gemma3_text", "flex_attention", 2) == 1 + 2


@pytest.mark.parametrize("kind", ["gemma2", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_what_only_a_gpu_compiles_samples_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in place of products, with bounds on the scores or sinks."""
    monkeypatch.setattr("hf_ebft.packed.step_views.fused_attention_works", lambda: False)
    assert sampled_as_written(kind, "eager", 2) >= 2


@pytest.mark.parametrize(
    ("kind", "attention", "expected"),
    # The documents' part and all the rest, which depends on whether the layer has a window.
    [
        ("llama", "sdpa", 1 + 1),
        ("gemma2", "eager", 1 + 2),
        pytest.param("llama", "flex_attention", 1 + 1, marks=pytest.mark.slow),
    ],
)
def test_what_cuda_compiles_by_itself_is_compiled_once_for_all_layers_and_steps(
    kind: str, attention: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `torch_compile`, as far as a CPU can tell."""
    model = policy(kind)
    forward = PackedForward.for_model(model, attention)
    forward.decoding.static = True
    plain = PackedForward.for_model(copy.deepcopy(model), attention)
    plain.decoding.static = True
    layouts = [rollouts_of(20 + i, 30 - i, seed=i, multiple=32).layout for i in range(3)]
    monkeypatch.setattr("hf_ebft.packed.step_views.fused_attention_works", lambda: False)
    records = [sampled(model, plain, layout) for layout in layouts]
    before = graphs()
    run = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    for module in (step_attention, drawing):
        monkeypatch.setattr(module, "fuses_kernels", lambda device: True)
        monkeypatch.setattr(module, "compiled", run)
    for cached in (step_attention._compiled, drawing._compiled_draw):
        cached.cache_clear()
    counts = []
    for layout, record in zip(layouts, records, strict=True):
        found = sampled(model, forward, layout)
        counts.append(graphs() - before)
        exists = layout.blocks.exists[:, None, :, None]
        assert torch.equal(found.rollouts.tokens * exists, record.rollouts.tokens * exists)
        difference = (found.log_probs - record.log_probs) * exists
        assert float(difference.abs().max()) < 1e-5
    assert forward.decoding.works
    # First and later tokens are drawn in full chunks and in a rest.
    of_drawing = 4
    assert counts == [expected + of_drawing] * 3
    for cached in (step_attention._compiled, drawing._compiled_draw):
        cached.cache_clear()


def sampled_as_written(kind: str, attention: str, n_batches: int) -> int:
    """Compare rollouts of compiled layers with those of the layers as written, batch by batch.

    Returns:
        How many graphs the compiled ones took.
    """
    model = policy(kind)
    plain_model = copy.deepcopy(model)
    traced = PackedForward.for_model(model, attention, compiler=AOT)
    plain = PackedForward.for_model(plain_model, attention)
    count = 0
    for step in range(n_batches):
        layout = rollouts_of(17 + step % 16, 5 + step // 2, seed=step, multiple=32).layout
        records = []
        for policy_model, forward in ((model, traced), (plain_model, plain)):
            forward.decoding.static = True
            before = graphs()
            records.append(sampled(policy_model, forward, layout))
            count += graphs() - before if forward is traced else 0
            assert forward.decoding.works
        exists = layout.blocks.exists[:, None, :, None]
        found, expected = (record.rollouts.tokens * exists for record in records)
        assert torch.equal(found, expected)
        difference = (records[0].log_probs - records[1].log_probs) * exists
        assert float(difference.abs().max()) < 1e-5
    assert not counters["graph_break"]
    return count


def sampled(model: nn.Module, forward: PackedForward, layout: PackedLayout) -> SamplingRecord:
    generator = make_generator(torch.device("cpu"), 3)
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 1.0, "chunk_size": 50}
    return sample_with_record(model, forward, layout, generator=generator, **options)[1]


def test_steps_whose_shapes_are_those_of_one_batch_are_not_compiled() -> None:
    """Tiles of steps on a CPU, and keys and values that grow; the documents' pass is."""
    model = tiny_model("llama", limit=4096)
    forward = PackedForward.for_model(model, "sdpa", compiler=TRACED)
    layout = rollouts_of(30, 21).layout
    sampled(model, forward, layout)
    assert forward.decoding.works and graphs() == 1
    forward.decoding.grows = "the test says so"
    sampled(model, forward, layout)
    assert graphs() == 1


@pytest.mark.parametrize("kind", ["gpt2", "gemma4_text", "llama4_text"])
def test_layers_that_do_more_with_a_cache_sample_as_written(kind: str) -> None:
    assert sampled_as_written(kind, "sdpa", 1) == 0


@pytest.mark.parametrize(
    ("kind", "attention", "expected"),
    [
        ("llama", "sdpa", 3),
        pytest.param("llama", "flex_attention", 3, marks=pytest.mark.slow),
        # Two kinds of layers.
        pytest.param("gemma3_text", "flex_attention", 6, marks=pytest.mark.slow),
        # With adapters, what the first layer reads needs no gradient, and what others read does.
        pytest.param("lora", "sdpa", 5, marks=pytest.mark.slow),
        pytest.param("lora", "flex_attention", 5, marks=pytest.mark.slow),
    ],
)
def test_chunks_of_training_share_one_graph_too(kind: str, attention: str, expected: int) -> None:
    """Against keys and values of the documents: one graph for these, one for all chunks; each with
    gradient, and chunks without it, too.
    """
    model = policy(kind)
    plain = copy.deepcopy(model)
    rollouts = rollouts_of(30, 29)
    found = []
    for policy_model, compiler in ((plain, None), (model, TRACED)):
        forward = PackedForward.for_model(policy_model, attention, compiler=compiler)
        policy_model.train()
        before = graphs()
        # Four blocks a row, two at a time.
        training = TrainingPass(
            forward, temperature=0.8, with_document=True, chunk_size=64, training_chunk_size=24
        )
        log_probs = training.log_probs(policy_model, rollouts)
        assert log_probs.document is not None
        exists = rollouts.exists[:, None, :, None]
        # Gradients of size 1, as what is compared rounds by the size of the largest.
        ((log_probs.rollout * exists).sum() + log_probs.document.sum()).mul(0.01).backward()
        weights = [weight.grad for weight in policy_model.parameters()]
        found.append(torch.cat([w.flatten() for w in weights if w is not None]))
    of_head = 4
    assert graphs() - before == expected + of_head
    assert found[0].abs().max() > 0.1
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_chunks_are_not_compiled_again_over_fifty_lengths_of_one_bucket(attention: str) -> None:
    """Documents, chunks and the same without gradient, and four chunks of the head."""
    model = tiny_model("llama", limit=4096).train()
    forward = PackedForward.for_model(model, attention, compiler=AOT)
    # Six chunks of six blocks each for 32 blocks: the last is filled up.
    training = TrainingPass(
        forward, temperature=0.8, with_document=True, chunk_size=64, training_chunk_size=72
    )
    shapes = set()
    for step in range(50):
        rollouts = rollouts_of(17 + step % 16, 5 + step // 2, seed=step, multiple=32)
        shapes.add((rollouts.layout.document_width, rollouts.tokens.shape))
        assert [chunk.stop for chunk in training._chunks(rollouts.layout)][-1] > 32
        found = training.log_probs(model, rollouts)
        assert found.document is not None
        (found.rollout.sum() + found.document.sum()).backward()
    assert len(shapes) == 1
    assert graphs() == 3 + 4
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    # Documents and chunks, else the whole row.
    ("chunk_size", "expected_graphs"),
    [(1000, 1), pytest.param(72, 2, marks=pytest.mark.slow)],
)
def test_the_feature_network_s_hooks_stay_outside(chunk_size: int, expected_graphs: int) -> None:
    """Hooks in a graph would be traced anew for every pass."""
    model = tiny_model("llama", limit=4096)
    settings: dict[str, Any] = {
        "feature_layers": (0.25, 0.75),
        "embed_method": "last_token",
        "normalization": "per_layer",
        "packed_attention": "flex_attention",
        "chunk_size": chunk_size,
    }
    plain = FeatureNetwork(copy.deepcopy(model), **settings)
    traced = FeatureNetwork(copy.deepcopy(model), compiler=TRACED, **settings)
    batches = [rollouts_of(*lengths, multiple=32) for lengths in ((30, 21), (29, 25), (31, 8))]
    expected = [plain.embed(rollouts).generated for rollouts in batches]
    before = graphs()
    for rollouts, embeddings in zip(batches, expected, strict=True):
        found = traced.embed(rollouts).generated
        torch.testing.assert_close(found, embeddings, atol=1e-5, rtol=0)
    assert graphs() == before + expected_graphs


def test_plain_rows_sampling_and_the_self_test_are_not_compiled() -> None:
    model = tiny_model("llama", limit=4096)
    forward = PackedForward.for_model(model, "sdpa", compiler=TRACED)
    with torch.no_grad():
        model(**ragged_batch(12))
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, pad_token_id=0)
        verify_packing(model, forward)
    assert graphs() == 0


def test_a_copy_runs_its_own_layers() -> None:
    model = tiny_model("llama", limit=4096)
    compile_layers(model, TRACED)
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for weight in duplicate.parameters():
            weight.zero_()
        assert float(duplicate(**ragged_batch(12)).logits.abs().max()) == 0.0
    for layer in decoder_layers(duplicate):
        assert isinstance(layer.forward, CompiledForward) and layer.forward.layer is layer


def test_layers_follow_their_class_as_fsdp2_changes_it() -> None:
    model = tiny_model("llama", limit=4096)
    compile_layers(model, TRACED)
    layer = decoder_layers(model)[0]

    class Sharded(type(layer)):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs) + 1

    hidden = torch.randn(1, 3, model.config.hidden_size)
    positions = model.model.rotary_emb(hidden, torch.arange(3)[None])
    with torch.no_grad():
        before = layer(hidden, position_embeddings=positions)
        layer.__class__ = Sharded
        torch.testing.assert_close(layer(hidden, position_embeddings=positions), before + 1)


def test_a_trainer_without_torch_compile_runs_layers_that_another_has_compiled_as_written(
    tmp_path: Path,
) -> None:
    model = tiny_llama()
    compile_layers(model, TRACED)
    trainer = EBFTTrainer(model, config(tmp_path, max_steps=1), train_dataset=texts(20, 17))
    trainer.train()
    assert graphs() == 0
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


def test_a_forward_that_something_has_replaced_is_refused() -> None:
    model = tiny_model("llama")
    decoder_layers(model)[1].forward = lambda *_, **__: None
    with pytest.raises(ValueError, match=r"replaces the forward of LlamaDecoderLayer.*device_map"):
        compile_layers(model, TRACED)


def test_layers_as_written_is_for_its_context_only() -> None:
    model = tiny_model("llama", limit=4096)
    forward = PackedForward.for_model(model, "sdpa", compiler=TRACED)
    with layers_as_written(), layers_as_written():
        pass
    gradient(model, forward, rollouts_of(30, 21))
    assert graphs() == 4


def test_a_compiled_run_trains_as_a_plain_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        # Equal shapes draw equal rollouts; a compiled run would round them up by itself.
        options |= {"pad_to_multiple_of": 48, "learning_rate": 0.01}
        args = config(tmp_path, max_steps=2, ce_coef=0.1, **options)
        trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(40, 33, 27, 21))
        with caplog.at_level(logging.WARNING):
            trainer.train()
        weights.append({name: w.detach().clone() for name, w in trainer.model.named_parameters()})
        # accelerate has compiled nothing beside the layers.
        assert isinstance(trainer.model_wrapped, LlamaForCausalLM)
        assert (graphs() > 0) == ("torch_compile" in options)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-4)
