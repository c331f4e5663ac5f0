"""The benchmarks measure what they say: one computation, done two ways, counted and timed."""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_ebft.packed.model_parts import bare_model
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.rows.visibility import sees
from tests.support.plain_forwards import plain_pass
from tests.support.tiny import (
    GivenRollouts,
    assert_same_tensors,
    batch_of,
    config,
    gradient_of,
    gradients,
    texts,
    tiny_llama,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import layers  # noqa: E402  (scripts beside their own modules)
import limit  # noqa: E402
import memory  # noqa: E402
import naive  # noqa: E402
import scaling  # noqa: E402
import settings  # noqa: E402
import steady  # noqa: E402
import step  # noqa: E402

# Blocks need 4 + 3 tokens: the last document has none.
LENGTHS = (21, 30, 13, 5)
SMALL_PRODUCT = functools.partial(limit.MatrixProduct, size=128)
LORA = LoraConfig(r=2, target_modules="all-linear")


def trainer_and_naive(
    folder: Path,
    *,
    lora: bool = False,
    rows_at_once: int | None = None,
    attention: str = "sdpa",
    **options: Any,
) -> tuple[GivenRollouts, naive.NaiveStep]:
    """A trainer, and the naive step over copies of its networks."""
    trainer = GivenRollouts(
        tiny_llama(num_hidden_layers=4),
        config(folder, **options),
        peft_config=LORA if lora else None,
    )
    if lora:  # a trained adapter: one that starts at zero has no gradient for half of it
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
    phi = None if lora else settings.copy_of(trainer.feature_network.model)
    theirs = naive.NaiveStep(
        settings.copy_of(trainer.model), phi, trainer.ebft, rows_at_once=rows_at_once
    )
    for network in (theirs.policy, phi):
        if network is not None:
            bare_model(network).set_attn_implementation(attention)
    return trainer, theirs


def sampled_by(
    trainer: GivenRollouts, theirs: naive.NaiveStep, batch: dict[str, Tensor]
) -> list[naive.Sampled]:
    """The trainer's rollouts, document by document."""
    assert trainer.given is not None
    return [
        naive.Sampled(document, trainer.given.tokens[row, :, : document.ends.shape[0]])
        for row, document in enumerate(naive.read_documents(batch, theirs.settings))
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ce_coef": 0.3, "rows_at_once": 1, "attention": "eager"},
        {"ce_coef": 0.3, "lora": True, "rows_at_once": 2},
        {"embed_method": "mean_pooling", "advantage_estimator": "group_norm", "temperature": 1.3},
    ],
    ids=["paper", "ce", "lora", "others"],
)
def test_naive_computes_the_librarys_step(tmp_path: Path, options: dict[str, Any]) -> None:
    """Log-probabilities, rewards, loss and gradient, with padding on the left."""
    trainer, theirs = trainer_and_naive(tmp_path, **options)
    batch = batch_of(texts(*LENGTHS), side="left")
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    sampled = sampled_by(trainer, theirs, batch)
    for row, document in enumerate(sampled):
        n_blocks = document.tokens.shape[1]
        log_probs, _ = theirs.log_probs(document)
        expected = outputs.log_probs[row, :, :n_blocks]
        # Relative too: these models are sure of themselves, and rounding grows with a log-prob.
        torch.testing.assert_close(log_probs, expected, rtol=5e-6, atol=1e-5)
        rewards = theirs.rewards(document).reward[0]
        expected = outputs.rewards.reward[row, :, :n_blocks]
        torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-5)

    expected_loss, expected_gradient = gradients(trainer, batch)
    loss = theirs.learn(sampled)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert_same_tensors(gradient_of(theirs.policy), expected_gradient, relative=3e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected_gradient.values())


def test_naive_samples_from_the_distributions_of_plain_forwards(tmp_path: Path) -> None:
    """Each next token after forced ones, over the whole vocabulary."""
    trainer, theirs = trainer_and_naive(tmp_path)
    theirs.policy.train()
    batch = batch_of(texts(*LENGTHS))
    trainer.sample_rollouts(trainer.model, batch)
    for document, tokens in [
        (s.document, s.tokens) for s in sampled_by(trainer, theirs, batch)[:3]
    ]:
        for drawn in range(tokens.shape[2]):
            actual = theirs.next_token_probabilities(document, tokens[:, :, :drawn])
            for block, end in enumerate(document.ends.tolist()):
                prefix = document.tokens[:end].tolist()
                plain = plain_pass(trainer.model, prefix, tokens[:, block], hidden=False)
                expected = torch.softmax(plain.log_probs[:, drawn] / trainer.ebft.temperature, -1)
                torch.testing.assert_close(actual[:, block], expected, rtol=0, atol=1e-5)
    assert theirs.policy.training


def test_naive_draws_by_its_distributions(tmp_path: Path) -> None:
    """First tokens of many samples, by the frequency of the likeliest one."""
    _, theirs = trainer_and_naive(tmp_path, n_samples_per_prompt=800, stride=64)
    document = naive.read_documents(batch_of(texts(12)), theirs.settings)[0]
    tokens = theirs.sample(document).tokens
    assert tokens.shape == (800, 1, 3)
    for drawn in range(2):  # the first token, and the second after the commonest first one
        probabilities = theirs.next_token_probabilities(document, tokens[:, :, :drawn])[:, 0]
        commonest = tokens[:, 0, 0].mode().values
        asked = torch.ones(800, dtype=torch.bool) if drawn == 0 else tokens[:, 0, 0] == commonest
        expected, token = probabilities[asked][0].max(dim=0)
        share = (tokens[asked, 0, drawn] == token).float().mean()
        noise = (expected * (1 - expected) / asked.sum()).sqrt()
        assert abs(share - expected) < 4 * noise


def test_naive_refuses_columns_it_does_not_read(tmp_path: Path) -> None:
    """A batch with labels would be another objective."""
    _, theirs = trainer_and_naive(tmp_path)
    batch = batch_of(texts(20))
    with pytest.raises(ValueError, match="labels"):
        theirs.step(batch | {"labels": batch["input_ids"]})


def test_naive_leaves_the_same_gradient_whatever_the_chunks(tmp_path: Path) -> None:
    """A whole step, sampled with the same seed."""
    found = []
    for rows_at_once in (None, 2):
        _, theirs = trainer_and_naive(tmp_path, rows_at_once=rows_at_once)
        theirs.step(batch_of(texts(*LENGTHS)))
        found.append(gradient_of(theirs.policy))
        seconds = theirs.stopwatch.take()
        assert seconds.keys() == set(step.PHASES)
        assert min(seconds.values()) > 0
    assert_same_tensors(found[0], found[1], relative=1e-5)


def layout_of(rows: Sequence[dict[str, Any]], n_samples: int = 3, length: int = 3) -> PackedLayout:
    """The layout of a padded batch."""
    documents = Documents.from_inputs(batch_of(list(rows)))
    blocks = find_blocks(documents, stride=4, context_length=4, generate_max_len=length)
    return PackedLayout(documents, blocks, n_samples, length)


def packed(*lengths: int) -> dict[str, Any]:
    """A row of several documents."""
    ids = [index for index, length in enumerate(lengths) for _ in range(length)]
    return texts(sum(lengths))[0] | {"document_ids": ids}


BATCHES = {
    "one": texts(21),
    "padded": texts(*LENGTHS),
    "packed": [packed(14, 5, 9), packed(21)],
    "no_blocks": texts(5),
}


@pytest.mark.parametrize("with_cross_entropy", [False, True])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_work_is_what_the_outputs_depend_on(
    rows: list[dict[str, Any]], with_cross_entropy: bool
) -> None:
    """Start at the places that are read, follow who sees whom, count."""
    layout = layout_of(rows)
    where = layout.coordinates
    visible = sees(where.map(lambda f: f[:, :, None]), where.map(lambda f: f[:, None, :]))

    def work(places: set[tuple[int, int]], *, head: bool) -> limit.Work:
        """What is needed for the states at `places` (row, place)."""
        needed = torch.zeros_like(where.slot, dtype=torch.bool)
        for row, place in places:
            needed[row] |= visible[row, place]
        pairs = int(visible[needed].sum())
        return limit.Work(int(needed.sum()), pairs, len(places) if head else 0)

    exists = layout.blocks.exists.nonzero().tolist()
    predictors = {
        (row, place)
        for row, block in exists
        for place in layout.predictor[row, :, block].flatten().tolist()
    }
    read = {
        (row, place)
        for row, block in exists
        for place in [
            int(layout.window[row, block, -1]),
            # The last token of each sample comes one place after its predictor.
            *(layout.predictor[row, :, block, -1] + 1).tolist(),
        ]
    }
    trained = set(predictors)
    if with_cross_entropy:
        documents = layout.documents
        trained |= {(row, place - 1) for row, place in (documents.position > 0).nonzero().tolist()}
    # What sampling computes of the documents serves the training pass, too.
    first = {
        (row, place)
        for row, block in exists
        for place in layout.predictor[row, :, block, 0].tolist()
    }
    whole, done = (dataclasses.astuple(work(places, head=True)) for places in (trained, first))
    assert limit.count_work(layout, with_cross_entropy=with_cross_entropy) == {
        "sampling": work(predictors, head=True),
        "features": work(read, head=False),
        "training_forward": limit.Work(*(a - b for a, b in zip(whole, done, strict=True))),
        "backward": work(trained, head=True),
    }


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_costs_are_those_of_the_flop_counter(lora: bool, tied: bool) -> None:
    """A plain forward and backward, where every token is multiplied with every other."""
    length = 7
    base = tiny_llama(attn_implementation="eager", tie_word_embeddings=tied)
    model = settings.with_adapters(base, rank=2 if lora else 0)
    ids = torch.arange(length)[None]
    work = limit.Work(tokens=length, pairs=length**2, head_rows=length)
    forward, backward = limit.measure_costs(model)
    assert len(forward.per_token) == 2

    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, use_cache=False).logits.sum()
    assert counter.get_total_flops() == 2 * forward.multiply_adds(work)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * backward.multiply_adds(work)

    if lora:
        frozen, _ = limit.measure_costs(model, adapters=False)
        assert frozen == limit.measure_costs(tiny_llama(), adapters=False)[0]
        assert (
            2 * frozen.multiply_adds(work)
            < counter.get_total_flops()
            < 4 * frozen.multiply_adds(work)
        )


def test_costs_of_some_layers() -> None:
    """A pass that ends early pays for no later layer, and for no head."""
    cost = limit.Cost(per_token=(2, 3, 5), per_pair=7, per_head_row=11)
    work = limit.Work(tokens=10, pairs=100, head_rows=0)
    assert cost.multiply_adds(work, 2) == 10 * (2 + 3) + 100 * 7 * 2
    assert cost.multiply_adds(work) == 10 * (2 + 3 + 5) + 100 * 7 * 3
    assert (
        cost.multiply_adds(dataclasses.replace(work, head_rows=1)) == cost.multiply_adds(work) + 11
    )


def test_costs_leave_the_model_as_it_was() -> None:
    """No gradient, no hook, no change of mode stays behind."""
    model = tiny_llama()
    limit.measure_costs(model)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


def test_costs_refuse_layers_with_a_window() -> None:
    """Their attention is not counted."""
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            sliding_window=4,
        )
    )
    with pytest.raises(ValueError, match="sliding_window=4"):
        limit.measure_costs(model)


def test_limit_of_a_step_is_the_sum_of_its_passes(tmp_path: Path) -> None:
    """By hand, for one document of 13 tokens: blocks end at 4 and 8, 3 samples of 3 tokens."""
    trainer, _ = trainer_and_naive(tmp_path)
    counted = limit.count_step(
        layout_of(texts(13)),
        trainer.model,
        n_feature_layers=max(trainer.feature_network.layer_indices),
        with_cross_entropy=False,
    )
    # Per token: q and o (16 x 16), k and v (16 x 8), the three of the MLP (16 x 24). Per pair: two
    # products of 8 for each of 2 heads. Head: 16 x 61. Layers: 4, of which 3 for the features.
    per_token, per_pair, head = 2 * 256 + 2 * 128 + 3 * 384, 32, 976
    tokens = 8 + 2 * 3 * 2
    pairs = 8 * 9 // 2 + 3 * (5 + 6) + 3 * (9 + 10)
    forward = 4 * (tokens * per_token + pairs * per_pair) + (2 + 12) * head
    document = 4 * (8 * per_token + 8 * 9 // 2 * per_pair) + 2 * head
    tokens = 11 + 2 * 3 * 3
    pairs = 11 * 12 // 2 + 3 * (5 + 6 + 7) + 3 * (9 + 10 + 11)
    assert counted == {
        "sampling": forward,
        "features": 3 * (tokens * per_token + pairs * per_pair),
        "training_forward": forward - document,
        "backward": 2 * forward,
    }


def test_matrix_product_is_timed() -> None:
    """Some speed between a pocket calculator's and a data centre's."""
    assert 1e6 < SMALL_PRODUCT(torch.device("cpu"), torch.float32).speed() < 1e15


MIB = 2**20


def block(mebibytes: int) -> Tensor:
    """A tensor of this size."""
    return torch.empty(mebibytes * MIB, dtype=torch.uint8)


def test_peak_memory_of_known_allocations() -> None:
    """8 at once, then 4 + 2: the peak is 12."""

    def work() -> None:
        first, second = block(8), block(4)
        del first
        third = block(2)
        del second, third

    assert memory.peak_bytes(work, torch.device("cpu")) == 12 * MIB
    assert memory.peak_bytes(lambda: None, torch.device("cpu")) == 0


def test_peak_memory_counts_only_its_own() -> None:
    """What was there before is neither counted nor credited, what stays is counted."""
    before, kept = [block(16)], []

    def work() -> None:
        before.clear()
        kept.append(block(4))

    assert memory.peak_bytes(work, torch.device("cpu")) == 4 * MIB


def test_peak_memory_of_a_backward_pass() -> None:
    """Squaring keeps its input; backward needs a gradient beside it."""
    weight = torch.zeros(MIB, requires_grad=True)  # 4 MiB
    weight.grad = torch.zeros_like(weight)

    def work() -> None:
        square = weight.square()  # 4
        square.backward(torch.ones_like(square))  # 4, and at most 3 x 4 in the backward

    assert 12 * MIB <= memory.peak_bytes(work, torch.device("cpu")) <= 20 * MIB


def check_figures(figures: dict[str, Any], *, with_naive: bool) -> None:
    """Fields and their arithmetic."""
    names = ["ours", "naive"] if with_naive else ["ours"]
    seconds, peaks = figures["seconds"], figures["peak_bytes"]
    assert sorted(seconds) == sorted([*names, "limit"])
    assert sorted(peaks) == sorted(names)
    for phases in seconds.values():
        assert phases.keys() == {*step.PHASES, "total"}
        assert all(time > 0 for time in phases.values())
    for name in names:
        for run in figures["runs"][name]:
            # Nothing is counted twice; what lies between the phases is little.
            phases = sum(run[phase] for phase in step.PHASES)
            assert 0.5 * run["total"] < phases <= run["total"] * (1 + 1e-6)
    total = {name: phases["total"] for name, phases in seconds.items()}
    speed = figures["matrix_product"]["multiply_adds_per_second"]
    assert total["limit"] == pytest.approx(sum(figures["multiply_adds"].values()) / speed)
    assert figures["ratio_vs_limit"] == pytest.approx(total["ours"] / total["limit"])
    assert figures["reward_share"] == pytest.approx(figures["reward_seconds"] / total["ours"])
    if with_naive:
        assert figures["ratio_vs_naive"] == pytest.approx(total["naive"] / total["ours"])
        assert figures["memory_ratio_vs_naive"] == pytest.approx(peaks["naive"] / peaks["ours"])
        assert figures["difference"]["log_probs"] < 1e-4
        assert figures["difference"]["rewards"] < 1e-4
    else:
        assert figures["ratio_vs_naive"] is None
        assert figures["memory_ratio_vs_naive"] is None
    assert {"device", "threads", "versions", "date"} <= figures["machine"].keys()


def test_step_writes_what_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line, on a model of seconds."""
    path = tmp_path / "step.json"
    monkeypatch.setattr(step, "MatrixProduct", SMALL_PRODUCT)
    asked = "--preset tiny --model tiny --repeats 1 --naive-repeats 2 --documents 2 --ce-coef 0.1"
    asked += " --threads 1 --device cpu --set temperature=0.9"
    step.main([*asked.split(), "--json", str(path)])
    figures = json.loads(path.read_text())
    check_figures(figures, with_naive=True)
    assert [len(figures["runs"][name]) for name in ("ours", "naive")] == [1, 2]
    assert figures["settings"]["more"] == {"temperature": 0.9}
    printed = capsys.readouterr().out
    assert printed.startswith(f"{figures['ratio_vs_naive']:.2f} times as fast")
    assert "| training forward |" in printed


def test_step_without_the_naive_one_and_with_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `lora` and `--skip-naive` set."""
    monkeypatch.setattr(step, "MatrixProduct", SMALL_PRODUCT)
    preset = dataclasses.replace(settings.PRESETS["tiny"], lora_rank=2, repeats=1)
    figures = step.measure(preset, "tiny", step.Options(with_naive=False))
    check_figures(figures, with_naive=False)
    assert "naive" not in step.report(figures)
    full = step.measure(
        dataclasses.replace(preset, lora_rank=0), "tiny", step.Options(with_naive=False)
    )
    adapted, whole = figures["multiply_adds"], full["multiply_adds"]
    assert adapted["features"] == whole["features"]
    assert adapted["sampling"] > whole["sampling"]
    assert adapted["backward"] < whole["backward"]


def test_step_prepares_the_model_as_trainer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, and in autocast; earlier the settings were taken and nothing came of them."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # Trainer sets it for good
    preset, tiny = settings.PRESETS["tiny"], settings.MODELS["tiny"]
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "bf16": True}
    ours = step.OurStep(tiny.build(), preset, use_cpu=True, documents=1, settings=compiled)
    # The model as a whole or layer by layer.
    assert ours.prepared is not ours.policy or all(
        layer._compiled_call_impl is not None or "forward" in vars(layer)
        for layer in ours.policy.model.layers
    )
    inputs = settings.random_documents(1, preset.document, 64, torch.device("cpu"))
    with torch.no_grad():
        found = ours.policy(**inputs).logits
    model = tiny.build()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits.float()
    assert torch.equal(found, expected)
    assert not torch.equal(found, model(**inputs).logits)


def test_step_in_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--dtype` is that of the weights and of the matrix product that they are held against."""
    products = []

    def product(device: torch.device, dtype: torch.dtype) -> limit.MatrixProduct:
        products.append(dtype)
        return SMALL_PRODUCT(device, dtype)

    monkeypatch.setattr(step, "MatrixProduct", product)
    given = step.Options(with_naive=False, dtype=torch.bfloat16)
    preset = dataclasses.replace(settings.PRESETS["tiny"], repeats=1)
    figures = step.measure(preset, "tiny", given)
    assert products == [torch.bfloat16]
    assert figures["settings"]["dtype"] == "bfloat16"


def test_step_refuses_to_time_two_different_things(tmp_path: Path) -> None:
    """A naive policy with another weight has other log-probabilities."""
    preset, cpu = settings.PRESETS["tiny"], torch.device("cpu")
    model = settings.MODELS["tiny"].build()
    reference = settings.copy_of(model)
    ours = step.OurStep(model, preset, use_cpu=True, documents=1, settings={})
    phi = settings.copy_of(reference)
    theirs = step.TheirStep(naive.NaiveStep(reference, phi, ours.trainer.ebft), cpu)
    inputs = settings.random_documents(1, preset.document, 64, cpu)
    assert step.compare(ours, theirs, inputs).log_probs < 1e-4
    with torch.no_grad():
        next(reference.parameters()).mul_(1.01)
    with pytest.raises(RuntimeError, match="do not compute the same thing"):
        step.compare(ours, theirs, inputs)


@pytest.mark.parametrize("preset", sorted(settings.PRESETS))
def test_presets_parse(preset: str) -> None:
    """Each has a name on the command line, and settings that a configuration accepts."""
    assert step.parse(["--preset", preset, "--json", "x.json"]).preset == preset
    settings.PRESETS[preset].config("unused", use_cpu=True)
    assert step.parse(["--preset", preset]).model == "10m"


def test_set_reads_values() -> None:
    """JSON where it is, text elsewhere."""
    assert step.setting("gradient_checkpointing=true") == ("gradient_checkpointing", True)
    assert step.setting("packed_attention=eager") == ("packed_attention", "eager")
    with pytest.raises(ValueError, match="NAME=VALUE"):
        step.setting("bf16")


@pytest.mark.parametrize(
    ("name", "millions"), [("3m", 3.0), ("10m", 10.0), ("smollm2", 134.5), ("1b", 1236)]
)
def test_model_sizes(name: str, millions: float) -> None:
    """Parameters, and rows of the naive step that divide the samples."""
    with torch.device("meta"):
        model = settings.MODELS[name].build()
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(
        millions, rel=0.02
    )
    for preset in settings.PRESETS.values():
        rows = settings.naive_rows_at_once(preset, model, torch.device("cpu"), "eager")
        assert preset.n_samples % rows == 0


def test_naive_rows_follow_memory() -> None:
    """All samples of a small model at once, fewer of a large one."""
    small, large = settings.MODELS["tiny"].build(), settings.MODELS["smollm2"]
    cpu, paper = torch.device("cpu"), settings.PRESETS["paper"]
    with torch.device("meta"):
        assert settings.naive_rows_at_once(paper, large.build(), cpu, "sdpa") < paper.n_samples
    assert settings.naive_rows_at_once(paper, small, cpu, "sdpa") == paper.n_samples
    assert paper.naive_row == 1024 + 127 * 8


def test_layers_are_timed_and_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All their weights are used, forward and backward, by a model whose attention is left out."""
    monkeypatch.setattr(layers, "MatrixProduct", SMALL_PRODUCT)
    path = tmp_path / "layers.json"
    layers.main(["--model", "tiny", "--tokens", "8", "--repeats", "2", "--json", str(path)])
    figures = json.loads(path.read_text())
    assert capsys.readouterr().out.startswith(f"{figures['ratio_vs_limit']:.2f} times the limit")
    assert all(value > 0 for name in ("seconds", "limit") for value in figures[name].values())
    model = settings.MODELS["tiny"].build()
    weights = sum(
        module.weight.numel() for module in model.model.modules() if isinstance(module, nn.Linear)
    )
    counted = figures["multiply_adds"]
    assert counted["forward"] == 8 * weights
    assert counted["backward"] == 2 * counted["forward"]

    model.set_attn_implementation(layers.NO_ATTENTION)
    layers.pass_through(model, 8, torch.device("cpu"))
    for name, weight in model.model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_exponents() -> None:
    """Of power laws, exactly; of a constant 0."""
    points = [
        {"value": x, "seconds": 3.0 * x**2, "peak_bytes": 5.0 * x, "multiply_adds": 7.0}
        for x in (2, 4, 8)
    ]
    found = scaling.exponents(points)
    for name, expected in (("seconds", 2.0), ("peak_bytes", 1.0), ("multiply_adds", 0.0)):
        assert found[name] == pytest.approx({"all": expected, "last": expected})


def test_scaling_writes_a_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two points of one axis on a tiny model."""
    monkeypatch.setattr(step, "MatrixProduct", SMALL_PRODUCT)
    monkeypatch.setattr(scaling, "MODEL", "tiny")
    monkeypatch.setattr(scaling, "BASE", dataclasses.replace(settings.PRESETS["tiny"], repeats=1))
    monkeypatch.setitem(scaling.AXES, "document", ("document tokens S", (40, 80)))
    path = tmp_path / "scaling.json"
    scaling.main(["--axes", "document", "--threads", "1", "--device", "cpu", "--json", str(path)])
    curve = json.loads(path.read_text())["curves"]["document"]
    assert [point["value"] for point in curve["points"]] == [40, 80]
    # The first of the document's blocks ends at 4: a little more than twice as many.
    assert 1 < curve["exponents"]["multiply_adds"]["all"] < 1.5
    assert "| exponent (of the last two) |" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    scaling.plot({"document": curve}, tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").stat().st_size > 1000


def test_steady_counts_shapes_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Padded to a multiple, documents of 40 to 70 tokens make at most two widths."""
    path = tmp_path / "steady.json"
    arguments = ["--steps", "6", "--model", "tiny", "--shortest", "40", "--longest", "70"]
    arguments += ["--device", "cpu", "--threads", "1", "--json", str(path)]
    steady.main([*arguments, "--pad-to-multiple-of", "40"])
    padded = json.loads(path.read_text())
    assert padded["shapes"] <= 2 < 6 == len(padded["steps"])
    assert padded["steps"][-1]["bytes"] > 0 and padded["graphs_of_halves"] == [0, 0]
    assert "of peak memory from the first half" in capsys.readouterr().out
    # Two steps, the fewest that have halves, whatever they take.
    steady.main([*arguments, "--seconds", "0"])
    assert len(json.loads(path.read_text())["steps"]) == 2
    assert "Stopped after 2 of 6 steps" in capsys.readouterr().out
