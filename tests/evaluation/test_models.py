"""Several models side by side: measurements against plain loops, the table, its files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from hf_ebft.evaluation import compare_models, mean_bootstrap, measure_model, table
from hf_ebft.evaluation.models import ModelMeasurements
from hf_ebft.packed.sampling import Rollouts
from hf_ebft.training import measuring
from hf_ebft.training.metric_table import (
    ROLLOUT_METRICS,
    SECOND_NETWORK,
    SECOND_NETWORK_METRICS,
)
from tests.support.plain_forwards import last_token_embedding, plain_blocks, plain_pass
from tests.support.plain_objective import plain_group
from tests.support.tiny import batch_of, config, texts, tiny_llama
from tests.support.tiny_evaluation import LAYERS, SETTINGS, network

LENGTHS = (2, 3, 5)
ROWS = texts(17, 12, 5, 14)  # the third has no room for a rollout of 5 after a prefix of 3


def measure(model: Any, rows: Any = None, **changed: Any) -> ModelMeasurements:
    values: dict[str, Any] = {"lengths": LENGTHS, "tokens_at_once": 45} | changed
    return measure_model(model, network(), ROWS if rows is None else rows, SETTINGS, **values)


# ---- Measurements --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_draws", [1, 2])
def test_measurements_equal_plain_loops(monkeypatch: pytest.MonkeyPatch, n_draws: int) -> None:
    """Prefixes are those with room for 5; every length is the beginning of the same rollouts."""
    drawn: list[Rollouts] = []
    sample = measuring.sample_rollouts

    def recorded(*args: Any, **kwargs: Any) -> Rollouts:
        drawn.append(sample(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(measuring, "sample_rollouts", recorded)
    policy, phi = tiny_llama().eval(), network()
    measured = measure(policy, n_draws=n_draws)
    # 3 samples x 5 tokens: 3 prefixes at a time. 17 tokens have room for 3 or 4 of them.
    for row, text in enumerate(ROWS):
        ids = text["input_ids"]
        (blocks,) = plain_blocks(
            batch_of([text]), stride=4, context_length=3, generate_max_len=max(LENGTHS)
        )
        assert measured.blocks[row] == len(blocks)
        logits = policy(torch.tensor([ids])).logits[0].detach()
        expected = float(cross_entropy(logits[:-1], torch.tensor(ids[1:])))
        assert measured.text["cross_entropy"][row] == pytest.approx(expected, rel=1e-5)
        assert measured.tokens["cross_entropy"][row] == len(ids) - 1
        if not blocks:
            assert all(np.isnan(values[row]) for values in measured.rollouts[2].values())
            continue
        groups = []
        portions = -(-len(blocks) // 3)
        for _ in range(n_draws):
            mine, drawn = drawn[:portions], drawn[portions:]
            own = torch.cat([part.tokens[0][:, part.exists[0]] for part in mine], dim=1)
            groups += [(block, own[:, k]) for k, block in enumerate(blocks)]
        for g in LENGTHS:
            sums: dict[str, float] = dict.fromkeys(ROLLOUT_METRICS, 0.0)
            for block, own in groups:
                found = by_definition(policy, phi, block, own[:, :g], g)
                sums = {name: total + found[name] for name, total in sums.items()}
            for name, total in sums.items():
                actual = measured.rollouts[g][name][row]
                assert actual == pytest.approx(total / len(groups), rel=1e-4, abs=1e-5), name
    assert drawn == []


def by_definition(policy: Any, phi: Any, block: Any, own: Any, g: int) -> dict[str, float]:
    passed = plain_pass(phi.model, block.prefix, own, hidden=True)
    x = last_token_embedding(passed.hidden, LAYERS)
    passed = plain_pass(phi.model, block.prefix, torch.tensor([block.window[:g]]), hidden=True)
    y = last_token_embedding(passed.hidden, LAYERS)[0]
    with torch.no_grad():
        log_probs = plain_pass(policy, block.prefix, own, hidden=False).log_probs
    found = plain_group(x, y)
    found["entropy"] = -float((log_probs / 0.8).log_softmax(-1).gather(-1, own[..., None]).mean())
    found["cosine_alignment_best"] = max(2 * float(row @ y) for row in x)
    found["reward"] = found["alignment"] - found["diversity"]
    # With whitening and distinct rollouts, each diversity is zero: the best reward is alignment's.
    _, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    white = vt.T @ torch.diag(torch.where(s > 1e-5 * s[0], 1 / s, 0.0)) @ vt
    cosines = torch.cosine_similarity(x.double() @ white, (y.double() @ white)[None])
    gram = (x.double() @ white) @ (x.double() @ white).T
    n = len(x)
    diversity = [2 / (n - 1) * float(gram[j].sum() - gram[j, j]) for j in range(n)]
    found["reward_best"] = max(2 * float(cosines[j]) - diversity[j] for j in range(n))
    found["duplicates"] = (n - len({tuple(row.tolist()) for row in own})) / n
    return found


def test_completions_have_a_cross_entropy_of_their_own() -> None:
    row = texts(15)[0]
    row["labels"] = [-100] * 6 + row["input_ids"][6:]
    policy = tiny_llama().eval()
    measured = measure(policy, [row, *texts(14)])
    inputs = {name: torch.tensor([values]) for name, values in row.items()}
    expected = float(policy(**inputs).loss.detach())
    assert measured.text["cross_entropy_completion"][0] == pytest.approx(expected, rel=1e-5)
    assert measured.tokens["cross_entropy_completion"].tolist() == [9, 0]
    assert np.isnan(measured.text["cross_entropy_completion"][1])
    assert measured.tokens["cross_entropy"].tolist() == [14, 13]


def test_packed_documents_have_figures_of_their_own() -> None:
    first, second = (row["input_ids"] for row in texts(12, 14))
    packed = [{"input_ids": first + second, "document_ids": [0] * 12 + [1] * 14}]
    together = measure(tiny_llama(), packed)
    alone = measure(tiny_llama(), [{"input_ids": first}, {"input_ids": second}])
    assert together.row.tolist() == [0, 0]
    assert together.blocks.tolist() == alone.blocks.tolist()
    assert together.document.tolist() == alone.document.tolist()
    np.testing.assert_allclose(
        together.text["cross_entropy"], alone.text["cross_entropy"], rtol=1e-5
    )


def test_small_portions_of_text_change_nothing() -> None:
    whole, parts = (measure(tiny_llama(), tokens_at_once=n) for n in (1000, 4))
    np.testing.assert_allclose(parts.text["cross_entropy"], whole.text["cross_entropy"], rtol=1e-5)
    assert parts.blocks.tolist() == whole.blocks.tolist()


@pytest.mark.parametrize("lengths", [(), (3, 2), (2, 2), (0, 1)])
def test_lengths_must_ascend(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"lengths=\[.*ascending"):
        measure(tiny_llama(), lengths=lengths)


def test_text_that_is_too_short_for_every_rollout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"None of the 4 documents has room .* 99 tokens"):
        measure(tiny_llama(), lengths=(2, 99))


@pytest.mark.parametrize("name", ["n_draws", "tokens_at_once"])
def test_numbers_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        measure(tiny_llama(), **{name: 0})


# ---- Controls -----------------------------------------------------------------------------------


def test_a_tempered_model_is_the_one_with_divided_logits() -> None:
    """Against a model whose head is divided: text and rollouts alike."""
    divided = tiny_llama()
    with torch.no_grad():
        divided.lm_head.weight.div_(0.5)
    control, by_hand = measure(tiny_llama(), tempered=0.5), measure(divided)
    text = (control.text["cross_entropy"], by_hand.text["cross_entropy"])
    np.testing.assert_allclose(*text, rtol=1e-5)
    assert np.abs(measure(tiny_llama()).text["cross_entropy"] - text[0]).max() > 1e-3
    for g, by_name in control.rollouts.items():
        for name, values in by_name.items():
            np.testing.assert_allclose(values, by_hand.rollouts[g][name], rtol=1e-4, atol=1e-5)


def test_settings_of_a_trainer_leave_its_accelerator_alone(tmp_path: Path) -> None:
    """A new EBFTConfig would reset the state that accelerate shares, and end its autocast."""
    settings = config(tmp_path)
    accelerator = Accelerator()
    measure_model(tiny_llama(), network(), texts(12), settings, lengths=(2,), tempered=0.5)
    with accelerator.autocast():
        pass
    assert settings.temperature == 0.8


@pytest.mark.parametrize("tempered", [0.0, -1.0])
def test_a_temperature_is_above_zero(tempered: float) -> None:
    with pytest.raises(ValueError, match=f"tempered={tempered} must be above 0"):
        measure(tiny_llama(), tempered=tempered)


def test_a_second_network_reads_the_same_rollouts() -> None:
    """What it says is what it says as the only one, at unchanged figures of the first."""
    policy, other = tiny_llama(), network(seed=5)
    both = measure(policy, second_network=other)
    first, second = (
        measure(policy),
        measure_model(policy, other, ROWS, SETTINGS, lengths=LENGTHS, tokens_at_once=45),
    )
    for g in LENGTHS:
        assert both.rollouts[g].keys() == ROLLOUT_METRICS.keys() | SECOND_NETWORK_METRICS.keys()
        for name, values in both.rollouts[g].items():
            alone = first.rollouts[g] if name in ROLLOUT_METRICS else second.rollouts[g]
            np.testing.assert_array_equal(values, alone[name.removeprefix(SECOND_NETWORK)])
    table_of_both = compare_models({"a": both, "b": both}, n_resamples=100).to_markdown()
    assert "**energy score, second feature network, lower is better**" in table_of_both
    with pytest.raises(ValueError, match="Only one of 'b' and 'a' was measured with a second"):
        compare_models({"a": both, "b": first})


def test_one_pass_of_the_network_serves_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    phi, passes = network(), []
    run = type(phi.backbone).forward
    monkeypatch.setattr(
        type(phi.backbone), "forward", lambda self, *a, **k: passes.append(1) or run(self, *a, **k)
    )
    layouts = []
    for lengths in ((5,), LENGTHS):
        passes.clear()
        measure_model(tiny_llama(), phi, ROWS[:1], SETTINGS, lengths=lengths)
        layouts.append(len(passes))
    assert layouts[0] == layouts[1] > 0


# ---- The table ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison() -> table.ModelComparison:
    rows = [*texts(17, 12, 5, 14, 21, 19), texts(17)[0]]  # the last equals the first
    measured = {
        name: measure(tiny_llama(seed=seed), rows) for name, seed in {"base": 0, "other": 1}.items()
    }
    measured["again"] = measure(tiny_llama(seed=0), rows)
    return compare_models(measured, n_resamples=500, settings={"temperature": 0.8})


def test_what_was_left_out_is_counted(comparison: table.ModelComparison) -> None:
    assert comparison.counts == {
        "documents": 7,
        "duplicates": 1,
        "skipped": 1,
        "prefixes": 3 + 2 + 2 + 4 + 3 + 3,
        "groups": 6,
    }


def test_a_model_does_not_differ_from_itself(comparison: table.ModelComparison) -> None:
    own = [entry for entry in comparison.entries if entry.model == "again"]
    assert len(own) == 2 + len(LENGTHS) * len(ROLLOUT_METRICS)
    for entry in own:
        base = comparison.get("base", entry.measurement, entry.length)
        assert (entry.value, entry.low, entry.high) == (base.value, base.low, base.high)
        if entry.measurement != "perplexity":
            assert (entry.difference, entry.difference_low, entry.difference_high) == (0, 0, 0)
        assert not entry.beyond_noise


def test_text_metrics_are_means_over_tokens(comparison: table.ModelComparison) -> None:
    rows = [*texts(17, 12, 5, 14, 21, 19), texts(17)[0]]
    policy, total, tokens = tiny_llama(seed=1).eval(), 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        total += float(policy(ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    entry = comparison.get("other", "cross_entropy")
    assert entry.value == pytest.approx(total / tokens, rel=1e-5)
    perplexity = comparison.get("other", "perplexity")
    assert perplexity.value == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert perplexity.low == pytest.approx(math.exp(entry.low))
    base = comparison.get("base", "cross_entropy").value
    assert entry.difference == pytest.approx(entry.value - base)


def test_equal_documents_are_resampled_together(comparison: table.ModelComparison) -> None:
    entry = comparison.get("base", "cfm_loss", 5)
    assert (entry.n_documents, entry.n_groups) == (6, 5)


def test_weights_enter_means_and_intervals() -> None:
    """Weights that are counts mean the same as repeating a group's documents."""
    values, weights = np.array([1.0, 4.0, 2.0]), np.array([1, 2, 3])
    weighted = mean_bootstrap(values, weights=weights, n_resamples=300)
    repeated = np.repeat(values, weights)
    plain = mean_bootstrap(repeated, groups=np.repeat(range(3), weights), n_resamples=300)
    assert weighted.mean == pytest.approx(15 / 6)
    assert (weighted.low, weighted.high) == pytest.approx((plain.low, plain.high))


def test_json_holds_every_entry(comparison: table.ModelComparison) -> None:
    stored = json.loads(comparison.to_json())
    assert stored["models"] == ["base", "other", "again"]
    assert stored["lengths"] == list(LENGTHS)
    assert stored["settings"] == {"temperature": 0.8}
    assert len(stored["entries"]) == len(comparison.entries)


def test_markdown_shows_every_model_and_length(comparison: table.ModelComparison) -> None:
    text = comparison.to_markdown()
    assert "7 documents (1 equal to an earlier one)" in text
    assert "1 documents are too short for a rollout of 5 tokens" in text
    assert text.count("| rollout tokens | base | other | again |") == len(ROLLOUT_METRICS)
    value = comparison.get("base", "cfm_loss", 3)
    assert f"| 3 | {value.value:.4f} [{value.low:.4f}, {value.high:.4f}] |" in text
    other = comparison.get("other", "cross_entropy")
    assert f"{other.value:.4f}, " in text
    assert "completions" not in text  # none are marked
    assert "-0.0000" not in text


def test_a_picture_is_drawn(comparison: table.ModelComparison, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = comparison.save(tmp_path / "new")
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    assert paths[-1].read_bytes().startswith(b"\x89PNG")


def test_other_documents_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"'b' and 'a' were measured on different documents"):
        compare_models({"a": measure(model), "b": measure(model, texts(17, 12, 6, 14))})
    with pytest.raises(ValueError, match="or lengths"):
        compare_models({"a": measure(model), "b": measure(model, lengths=(2, 5))})
    with pytest.raises(ValueError, match="holds no models"):
        compare_models({})
