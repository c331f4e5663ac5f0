"""Measurements per document against plain loops, intervals against what is known of them."""

import copy
import math
from collections import Counter
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import set_seed

from hf_ebft import EBFTTrainer
from hf_ebft.data import tokenize_and_cut
from hf_ebft.evaluation import (
    DOCUMENT_METRICS,
    Continuation,
    DocumentMeasurements,
    compare,
    evaluate_documents,
    format_samples,
    format_table,
    paired_bootstrap,
    sample_continuations,
)
from hf_ebft.evaluation.bootstrap import _expanded_tail
from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.packed.sampling import Rollouts
from hf_ebft.training import measuring
from tests.support.plain_forwards import last_token_embedding, plain_blocks, plain_pass
from tests.support.plain_objective import plain_group
from tests.support.tiny import batch_of, config, texts, tiny_llama, tiny_tokenizer, weights_of
from tests.support.tiny_evaluation import LAYERS, SETTINGS, network


def measure(model: nn.Module, rows: Any, phi: FeatureNetwork | None = None, **changed: Any) -> Any:
    return evaluate_documents(model, phi or network(), rows, SETTINGS, **changed)


# ---- Measurements --------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [{}, {"stride": 2, "n_samples": 4, "n_draws": 2}])
def test_measurements_equal_plain_loops(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, int]
) -> None:
    """Every measurement of every document, by definition, from plain forwards of single texts."""
    drawn: list[Rollouts] = []

    def recorded(*args: Any, **kwargs: Any) -> Rollouts:
        drawn.append(real_sampler(*args, **kwargs))
        return drawn[-1]

    real_sampler = measuring.sample_rollouts
    monkeypatch.setattr(measuring, "sample_rollouts", recorded)
    policy, phi, rows = tiny_llama().eval(), network(), texts(15, 12, 9)
    measured = measure(policy, rows, phi, batch_size=2, **changed)

    n_draws = changed.get("n_draws", 1)
    assert measured.row.tolist() == [0, 1, 2]
    for index, row in enumerate(rows):
        (blocks,) = plain_blocks(
            batch_of([row]),
            stride=changed.get("stride", SETTINGS.stride),
            context_length=3,
            generate_max_len=3,
        )
        batch, place = divmod(index, 2)
        values = Counter[str]()
        for rollouts in drawn[batch * n_draws : (batch + 1) * n_draws]:
            for k, block in enumerate(blocks):
                own = rollouts.tokens[place, :, k]
                passed = plain_pass(phi.model, block.prefix, own, hidden=True)
                x = last_token_embedding(passed.hidden, LAYERS)
                window = torch.tensor([block.window])
                passed = plain_pass(phi.model, block.prefix, window, hidden=True)
                y = last_token_embedding(passed.hidden, LAYERS)[0]
                with torch.no_grad():
                    logits = plain_pass(policy, block.prefix, own, hidden=False).log_probs
                predicted = (logits / 0.8).log_softmax(-1).gather(-1, own[..., None])
                values.update(plain_group(x, y))
                values["entropy"] -= float(predicted.mean())
        expected = {name: total / (n_draws * len(blocks)) for name, total in values.items()}
        ids = torch.tensor([row["input_ids"]])
        expected["cross_entropy"] = float(policy(input_ids=ids, labels=ids).loss.detach())
        assert expected.keys() == DOCUMENT_METRICS.keys()
        for name, value in expected.items():
            assert measured.values[name][index] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_rewarded_measurements_are_plain_ones_without_whitening() -> None:
    settings = copy.copy(SETTINGS)
    settings.use_whitening = False
    measured = evaluate_documents(tiny_llama(), network(), texts(12, 15), settings)
    for rewarded, plain in (("alignment", "cosine_alignment"), ("diversity", "dot_diversity")):
        assert np.array_equal(measured.values[rewarded], measured.values[plain])


def test_packed_documents_are_measured_one_by_one() -> None:
    """Their cross-entropy is what each has alone; a short one has no measurement of blocks."""
    first, second, short = (row["input_ids"] for row in texts(12, 15, 4))
    packed = [
        {"input_ids": first + short, "document_ids": [0] * 12 + [1] * 4},
        {"input_ids": second, "document_ids": [0] * 15},
    ]
    measured = measure(tiny_llama(), packed)
    assert measured.row.tolist() == [0, 0, 1]
    alone = measure(tiny_llama(), [{"input_ids": ids} for ids in (first, short, second)])
    np.testing.assert_allclose(
        measured.values["cross_entropy"], alone.values["cross_entropy"], rtol=1e-5
    )
    for name in DOCUMENT_METRICS.keys() - {"cross_entropy"}:
        assert np.isnan(measured.values[name]).tolist() == [False, True, False], name


def test_masked_labels_are_no_targets() -> None:
    (row,) = texts(15)
    row["labels"] = [-100] * 6 + row["input_ids"][6:]
    measured = measure(tiny_llama(), [row])
    policy = tiny_llama().eval()
    inputs = {name: torch.tensor([values]) for name, values in row.items()}
    expected = float(policy(**inputs).loss.detach())
    assert measured.values["cross_entropy"][0] == pytest.approx(expected, rel=1e-5)


def test_measuring_twice_gives_the_same_and_changes_nothing() -> None:
    """The comparison of a model with itself has to be exactly zero."""
    model, rows = tiny_llama(attention_dropout=0.3), texts(15, 12, 9, 14)
    model.lm_head.eval()  # a module that its user keeps in evaluation mode
    modes = [module.training for module in model.modules()]
    weights = weights_of(model)
    set_seed(3)
    expected_noise = torch.rand(3)
    set_seed(3)
    first, second = (measure(model, rows, batch_size=3) for _ in range(2))
    assert torch.equal(torch.rand(3), expected_noise)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], weight) for name, weight in weights_of(model).items())
    differences = compare(first, second)
    assert differences.keys() == DOCUMENT_METRICS.keys()
    for paired in differences.values():
        assert (paired.difference, paired.low, paired.high) == (0, 0, 0)
        assert not paired.beyond_noise


def test_other_seeds_draw_other_rollouts() -> None:
    model, rows = tiny_llama(), texts(15)
    first, second = (measure(model, rows, seed=seed) for seed in (0, 1))
    assert first.values["cosine_alignment"] != second.values["cosine_alignment"]
    np.testing.assert_allclose(
        first.values["cross_entropy"], second.values["cross_entropy"], rtol=1e-5
    )


def test_more_draws_mean_less_noise() -> None:
    model, rows, phi = tiny_llama(), texts(16), network()
    spread = {
        draws: np.std(
            [
                measure(model, rows, phi, n_draws=draws, seed=seed).values["cfm_loss"][0]
                for seed in range(12)
            ]
        )
        for draws in (1, 16)
    }
    # Expected: a quarter. Chance: an F distribution with 11 and 11 degrees of freedom.
    assert spread[16] < 0.6 * spread[1]


def test_the_noise_of_rollouts_is_not_taken_for_a_change() -> None:
    """One model measured with many seeds: about 1 interval in 20 may leave out zero."""
    model, phi, rows = tiny_llama(), network(), texts(*[12] * 24)
    measured = [measure(model, rows, phi, batch_size=24, seed=seed) for seed in range(40)]
    pairs = list(zip(measured[::2], measured[1::2], strict=True))
    names = ("cfm_loss", "cosine_alignment", "dot_diversity", "alignment", "entropy")
    wrong = sum(compare(*pair)[name].beyond_noise for pair in pairs for name in names)
    # Of 100 that are not independent, 5 are expected.
    assert wrong <= 14


def test_the_trainer_s_own_cross_entropy_is_the_mean(tmp_path: Path) -> None:
    rows = texts(14, 14, 14, 14)
    trainer = EBFTTrainer(tiny_llama(), config(tmp_path), eval_dataset=rows)
    measured = evaluate_documents(trainer.model, trainer.feature_network, rows, trainer.ebft)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        measured.values["cross_entropy"].mean(), rel=1e-5
    )


def test_training_by_cross_entropy_shows(tmp_path: Path) -> None:
    """A policy that has learned the text is told from the one before, adapters and all."""
    rows = texts(14, 14, 14, 14, 14, 14)
    trainer = EBFTTrainer(
        tiny_llama(),
        config(tmp_path, max_steps=8, ce_coef=1.0, rl_coef=0.0, learning_rate=5e-2),
        train_dataset=rows,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    before = evaluate_documents(trainer.model, trainer.feature_network, rows, trainer.ebft)
    trainer.train()
    after = evaluate_documents(trainer.model, trainer.feature_network, rows, trainer.ebft)
    learned = compare(before, after)["cross_entropy"]
    assert learned.high < 0 and learned.beyond_noise
    assert learned.n_documents == 6


@pytest.mark.parametrize(
    ("rows", "changed", "message"),
    [
        ([], {}, "rows=0"),
        (texts(12), {"n_draws": 0}, "n_draws=0 must be at least 1"),
        (texts(12), {"stride": 0}, "stride=0"),
        (texts(12), {"n_samples": 0}, "n_samples=0"),
        (texts(12), {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_nothing_to_measure_is_refused(rows: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(tiny_llama(), rows, **changed)


# ---- The bootstrap ------------------------------------------------------------------------------


def test_two_documents_have_a_known_interval() -> None:
    """Resampled means are d_1, d_2 or their mean, with probability 1/4, 1/4 and 1/2."""
    paired = paired_bootstrap([1.0, 5.0], [2.0, 8.0])
    assert (paired.before, paired.after, paired.difference) == (3.0, 5.0, 2.0)
    assert (paired.low, paired.high) == (1.0, 3.0)
    narrow = paired_bootstrap([1.0, 5.0], [2.0, 8.0], confidence=0.1)
    assert (narrow.low, narrow.high) == (2.0, 2.0)


def test_a_large_sample_has_the_normal_interval() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=1000)
    after = before + generator.normal(0.1, 0.5, size=1000)
    paired = paired_bootstrap(before, after, n_resamples=10_000)
    error = (after - before).std() / math.sqrt(1000)
    assert paired.difference == pytest.approx((after - before).mean())
    assert paired.low == pytest.approx(paired.difference - 1.96 * error, abs=0.1 * error)
    assert paired.high == pytest.approx(paired.difference + 1.96 * error, abs=0.1 * error)
    assert paired.beyond_noise


@pytest.mark.parametrize("count", [8, 12, 40])
def test_intervals_cover_the_truth_as_often_as_they_say(count: int) -> None:
    """With few documents as well: a plain percentile interval of 8 covers it 88 times in 100."""
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(600):
        differences = generator.normal(0.3, 1.0, size=count)
        paired = paired_bootstrap(np.zeros(count), differences, n_resamples=1000, seed=trial)
        covered += paired.low <= 0.3 <= paired.high
    # 600 trials have a standard error of 0.009.
    assert 0.925 < covered / 600 < 0.975


@pytest.mark.parametrize(
    ("count", "quantile", "error"), [(4, 3.1824, 0.04), (6, 2.5706, 0.01), (12, 2.2010, 0.001)]
)
def test_the_interval_ends_at_student_s_quantile(count: int, quantile: float, error: float) -> None:
    """97.5 % quantiles of Student's distribution with count - 1 degrees, from its table."""
    ends = -NormalDist().inv_cdf(_expanded_tail(0.025, count)) / math.sqrt(count / (count - 1))
    assert ends == pytest.approx(quantile, rel=error)


def test_groups_are_drawn_as_a_whole() -> None:
    """Copies of a document tell nothing new: the interval is that of the originals."""
    generator = np.random.default_rng(2)
    before, after = generator.normal(size=(2, 30))
    alone = paired_bootstrap(before, after)
    copies = paired_bootstrap(before.repeat(4), after.repeat(4), groups=np.arange(30).repeat(4))
    assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high))
    assert (copies.n_documents, copies.n_groups) == (120, 30)
    naive = paired_bootstrap(before.repeat(4), after.repeat(4))
    assert naive.high - naive.low < 0.7 * (alone.high - alone.low)


def test_documents_without_a_measurement_are_left_out_of_both() -> None:
    nan = math.nan
    paired = paired_bootstrap([1.0, nan, 5.0, 7.0], [2.0, 3.0, 8.0, nan])
    assert (paired.before, paired.after, paired.n_documents) == (3.0, 5.0, 2)


def test_rounding_is_no_change() -> None:
    """With whitening, diversity is zero but for rounding, which may well have a direction."""
    paired = paired_bootstrap(np.zeros(9), np.full(9, -3e-8))
    assert paired.high < 0 and not paired.beyond_noise
    assert paired_bootstrap(np.zeros(9), np.full(9, -3e-5)).beyond_noise


def test_chunks_of_resamples_change_nothing_but_the_draws(monkeypatch: Any) -> None:
    generator = np.random.default_rng(3)
    before, after = generator.normal(size=(2, 50))
    whole = paired_bootstrap(before, after)
    monkeypatch.setattr("hf_ebft.evaluation.bootstrap.CHUNK", 120)
    parts = paired_bootstrap(before, after)
    width = whole.high - whole.low
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.05 * width)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0]), r"1 documents in 1 group"),
        (([1.0, 2.0], [1.0]), r"one shape .* not \(2,\), \(1,\)"),
        (([[1.0, 2.0]], [[1.0, 2.0]]), r"\(1, 2\)"),
        (([math.nan, 1.0], [1.0, 1.0]), r"1 documents in 1 group"),
    ],
)
def test_too_little_or_unpaired_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(*arguments)


@pytest.mark.parametrize("changed", [{"n_resamples": 0}, {"confidence": 1.0}])
def test_settings_out_of_range_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"n_resamples=.* confidence="):
        paired_bootstrap([1.0, 2.0], [1.0, 3.0], **changed)


# ---- What a person reads ------------------------------------------------------------------------


def test_continuations_are_those_of_the_model() -> None:
    """At a temperature near 0 they are greedy, and prefix and truth are the row itself."""
    settings = copy.copy(SETTINGS)
    settings.temperature = 1e-3
    model, rows = tiny_llama(), texts(15, 30, 5)
    continuations = sample_continuations(model, rows, settings, length=6)
    assert len(continuations) == 2  # the third is too short
    for row, continuation in zip(rows, continuations, strict=False):
        ids, start = row["input_ids"], len(continuation.prefix)
        assert ids[:start] == continuation.prefix
        assert ids[start : start + 6] == continuation.ground_truth
        written = list(continuation.prefix)
        for token in continuation.rollout:
            with torch.no_grad():
                assert token == int(model.eval()(torch.tensor([written])).logits[0, -1].argmax())
            written.append(token)
        assert len(continuation.rollout) == 6
    # In the middle: 13 places for the 30 tokens, 3, 7, ..., 23.
    assert len(continuations[1].prefix) == 15


def test_the_same_seed_gives_the_same_continuations() -> None:
    model, rows = tiny_llama(), texts(15, 30)
    first, again, other = (
        sample_continuations(model, rows, SETTINGS, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert [c.rollout for c in first] != [c.rollout for c in other]


def of_documents(**values: list[float]) -> DocumentMeasurements:
    missing = np.full(2, math.nan)
    return DocumentMeasurements(
        row=np.arange(2),
        values={name: np.array(values.get(name, missing)) for name in DOCUMENT_METRICS},
    )


def test_the_table_shows_what_there_is() -> None:
    differences = compare(
        of_documents(cross_entropy=[3.0, 4.0], cfm_loss=[0.5, 0.7]),
        of_documents(cross_entropy=[2.0, 3.5], cfm_loss=[0.6, 0.6]),
    )
    assert list(differences) == ["cross_entropy", "cfm_loss"]
    _, entropy, cfm = format_table(differences).splitlines()
    entropy, cfm = " ".join(entropy.split()), " ".join(cfm.split())
    assert entropy == "cross-entropy, nats/token 3.5000 2.7500 -0.7500 [-1.0000, -0.5000] *"
    assert cfm == "CFM loss 0.6000 0.6000 +0.0000 [-0.1000, +0.1000]"


def test_measurements_of_other_rows_are_not_compared() -> None:
    other = DocumentMeasurements(row=np.array([0, 2]), values=of_documents().values)
    with pytest.raises(ValueError, match="different documents"):
        compare(of_documents(), other)


def test_samples_stand_on_a_line_each() -> None:
    tokenizer = tiny_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    truth = ids("\n\tpass")
    before = [Continuation(ids("x" * 200 + "def f():"), ids("  1"), truth)]
    after = [Continuation(before[0].prefix, ids("return"), truth)]
    lines = format_samples(before, after, tokenizer.decode).splitlines()
    names = [line.split(" | ")[0].strip() for line in lines]
    assert names == ["prefix", "before", "after", "truth"]
    assert lines[0].endswith("xdef f():") and " | ...x" in lines[0]
    assert lines[1].endswith("|   1") and lines[2].endswith("| return")
    assert lines[3].endswith("| ⏎→pass")
    with pytest.raises(ValueError, match="different prefixes"):
        format_samples(before, [Continuation(ids("a"), [], [])], tokenizer.decode)


def test_tokenized_text_can_be_measured() -> None:
    tokenizer = tiny_tokenizer(eos_token="<eos>")
    documents = ["def f(x):\n    return x\n" * 4, "import os\n" * 8]
    rows = tokenize_and_cut(documents, tokenizer, sequence_len=24, min_length=6)
    measured = measure(tiny_llama(vocabulary=300), rows, network_of(300))
    assert measured.row.tolist() == list(range(len(rows)))
    assert not np.isnan(measured.values["cfm_loss"]).any()


def network_of(vocabulary: int) -> FeatureNetwork:
    return FeatureNetwork(
        tiny_llama(seed=1, vocabulary=vocabulary),
        feature_layers=[0.5],
        embed_method="mean_pooling",
        normalization="joint",
    )
