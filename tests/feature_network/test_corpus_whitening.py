"""Whitening by corpus: closed forms, invariances, and features measured by plain forward passes."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hf_ebft.trainer
from hf_ebft import EBFTTrainer
from hf_ebft.evaluation import evaluate_documents
from hf_ebft.feature_network.corpus_whitening import choose_rows
from hf_ebft.objective.rewards import feature_matching_rewards
from hf_ebft.objective.whitening import CorpusWhitening
from hf_ebft.training.random_streams import corpus_rows
from tests.support.plain_objective import unit
from tests.support.tiny import (
    assert_same_tensors,
    batch_of,
    config,
    logged,
    texts,
    tiny_llama,
    weights_of,
)

WIDTH = 6
CORPUS: dict[str, Any] = {"whitening_space": "corpus", "corpus_whitening_documents": 4}


def skewed_moment(width: int = WIDTH, seed: int = 0) -> Tensor:
    """A second moment with one strong direction, as the features of language models have."""
    features = unit(200, width, seed=seed)
    features[:, 0] += 2.0
    return features.T @ features / len(features)


def rotation(width: int = WIDTH, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator)).Q


# ---- The map --------------------------------------------------------------------------------


def test_two_dimensions_by_hand() -> None:
    """C = diag(0.9, 0.1), s = 0.5: M = diag(0.45 + 0.25, 0.05 + 0.25)."""
    whitening = CorpusWhitening.from_second_moment(torch.diag(torch.tensor([0.9, 0.1])), 0.5)
    x = torch.tensor([0.6, 0.8])
    mapped = torch.tensor([0.6 / math.sqrt(0.7), 0.8 / math.sqrt(0.3)])
    torch.testing.assert_close(whitening.apply(x), mapped / mapped.norm())
    assert whitening.effective_rank == pytest.approx(1 / (0.81 + 0.01))


def test_the_matrix_whitens_the_shrunk_moment() -> None:
    moment, shrinkage = skewed_moment(), 0.2
    matrix = CorpusWhitening.from_second_moment(moment, shrinkage).matrix
    shrunk = (1 - shrinkage) * moment + shrinkage * moment.trace() / WIDTH * torch.eye(WIDTH)
    product = matrix @ shrunk @ matrix
    torch.testing.assert_close(product, moment.trace() / WIDTH * torch.eye(WIDTH))
    torch.testing.assert_close(matrix, matrix.T)


@pytest.mark.parametrize(("moment", "shrinkage"), [(3.0 * torch.eye(WIDTH), 0.01), (None, 1.0)])
def test_nothing_changes_if_directions_are_alike_or_shrunk_to_be(
    moment: Tensor | None, shrinkage: float
) -> None:
    moment = skewed_moment() if moment is None else moment
    whitening = CorpusWhitening.from_second_moment(moment, shrinkage)
    x = 0.3 * unit(4, 5, WIDTH)
    torch.testing.assert_close(whitening.apply(x), x)


def test_norms_are_kept_and_zeros_stay() -> None:
    whitening = CorpusWhitening.from_second_moment(skewed_moment(), 0.1)
    x = torch.tensor([0.0, 1e-3, 0.5, 1.0])[:, None] * unit(4, WIDTH)
    torch.testing.assert_close(whitening.apply(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(whitening.apply(x)[0], torch.zeros(WIDTH))


def test_whitening_evens_out_directions() -> None:
    moment = skewed_moment()
    generator = torch.Generator().manual_seed(1)
    factor = torch.linalg.cholesky(moment)
    features = torch.randn(5000, WIDTH, generator=generator) @ factor.T
    mapped = CorpusWhitening.from_second_moment(moment, 0.05).apply(features)
    before = torch.linalg.eigvalsh(features.T @ features)
    after = torch.linalg.eigvalsh(mapped.T @ mapped)
    assert before[-1] / before[0] > 20
    assert after[-1] / after[0] < 4


def test_singular_moments_are_finite() -> None:
    """Fewer features than dimensions."""
    features = unit(2, WIDTH)
    whitening = CorpusWhitening.from_second_moment(features.T @ features / 2, 0.01)
    assert whitening.apply(unit(9, WIDTH, seed=2)).isfinite().all()


def test_autocast_does_not_change_the_whitening() -> None:
    whitening = CorpusWhitening.from_second_moment(skewed_moment(), 0.1)
    x = unit(3, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = whitening.apply(x)
    assert torch.equal(inside, whitening.apply(x))


@pytest.mark.parametrize("shrinkage", [0.0, -0.1, 1.5, math.nan])
def test_a_shrinkage_out_of_range_is_refused(shrinkage: float) -> None:
    with pytest.raises(ValueError, match=r"corpus_whitening_shrinkage=.*\(0, 1\]"):
        CorpusWhitening.from_second_moment(skewed_moment(), shrinkage)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.zeros(3, 3), "all zero"),
        (torch.full((3, 3), math.nan), "not finite"),
        (torch.ones(3, 4), r"\(D, D\)"),
    ],
)
def test_a_moment_of_zero_features_is_refused(moment: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorpusWhitening.from_second_moment(moment, 0.1)


def test_features_of_another_width_are_refused() -> None:
    whitening = CorpusWhitening.from_second_moment(skewed_moment(), 0.1)
    with pytest.raises(ValueError, match="width 7, but those of the corpus had width 6"):
        whitening.apply(unit(3, 7))


# ---- Rewards --------------------------------------------------------------------------------


def corpus_rewards(x: Tensor, y: Tensor, moment: Tensor, shrinkage: float = 0.1) -> Any:
    return feature_matching_rewards(
        x,
        y,
        whitening_space="corpus",
        corpus_whitening=CorpusWhitening.from_second_moment(moment, shrinkage),
    )


def test_rewards_equal_plain_loops() -> None:
    x, y, moment = unit(2, 3, 4, WIDTH), unit(2, 4, WIDTH, seed=1), skewed_moment()
    rewards = corpus_rewards(x, y, moment)
    c = moment.double().numpy()
    eigenvalues, vectors = np.linalg.eig(0.9 * c + 0.1 * np.trace(c) / WIDTH * np.eye(WIDTH))
    root = vectors @ np.diag(eigenvalues**-0.5) @ np.linalg.inv(vectors)

    def mapped(feature: Tensor) -> Any:
        vector = root @ feature.double().numpy()
        return vector / np.linalg.norm(vector)

    for b, k in itertools.product(range(2), range(4)):
        group, truth = [mapped(x[b, j, k]) for j in range(3)], mapped(y[b, k])
        for j in range(3):
            others = sum(group[j] @ group[i] for i in range(3) if i != j)
            assert rewards.alignment[b, j, k] == pytest.approx(2 * group[j] @ truth, abs=1e-5)
            assert rewards.diversity[b, j, k] == pytest.approx(others, abs=1e-5)


def test_rewards_do_not_depend_on_the_basis() -> None:
    x, y, moment, q = unit(1, 4, 3, WIDTH), unit(1, 3, WIDTH, seed=1), skewed_moment(), rotation()
    plain = corpus_rewards(x, y, moment)
    turned = corpus_rewards(x @ q, y @ q, q.T @ moment @ q)
    torch.testing.assert_close(turned.reward, plain.reward, rtol=1e-4, atol=1e-5)


def test_rewards_without_structure_in_the_corpus_are_the_unwhitened_ones() -> None:
    x, y = unit(2, 4, 3, WIDTH), unit(2, 3, WIDTH, seed=1)
    plain = feature_matching_rewards(x, y, use_whitening=False)
    torch.testing.assert_close(corpus_rewards(x, y, torch.eye(WIDTH)).reward, plain.reward)


def test_alignment_and_diversity_add_up_to_a_cfm_loss() -> None:
    """That of the mapped features, which is why their difference is its gradient direction."""
    x, y, moment = unit(2, 4, 3, WIDTH), unit(2, 3, WIDTH, seed=1), skewed_moment()
    rewards = corpus_rewards(x, y, moment)
    whitening = CorpusWhitening.from_second_moment(moment, 0.1)
    mapped = feature_matching_rewards(whitening.apply(x), whitening.apply(y), use_whitening=False)
    loss = 1 - rewards.alignment.mean(dim=1) + rewards.diversity.mean(dim=1) / 2
    torch.testing.assert_close(loss, mapped.cfm_loss)
    # The one that is logged stays that of the features as they are.
    plain = feature_matching_rewards(x, y, use_whitening=False)
    assert torch.equal(rewards.cfm_loss, plain.cfm_loss)


def test_rewards_need_the_corpus() -> None:
    with pytest.raises(ValueError, match="needs corpus_whitening"):
        feature_matching_rewards(unit(1, 2, 1, 4), unit(1, 1, 4), whitening_space="corpus")


# ---- Measuring ------------------------------------------------------------------------------


def make_trainer(folder: Path, data: Any = None, **settings: Any) -> EBFTTrainer:
    rows = texts(21, 9, 30, 14, 5) if data is None else data
    return EBFTTrainer(
        tiny_llama(), config(folder, **({"max_steps": 2} | CORPUS | settings)), train_dataset=rows
    )


def moment_by_plain_forwards(trainer: EBFTTrainer, rows: list[dict[str, Any]]) -> Any:
    """Second moment of the last token of every window, document by document."""
    features = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            states = trainer.model(ids, output_hidden_states=True).hidden_states
        layers = [int(fraction * 2) for fraction in trainer.ebft.feature_layers]
        anchors = range(4, len(row["input_ids"]) - 3 + 1, 4)  # context 4, G 3, stride 4
        for end in anchors:
            parts = [states[i][0, end + 2].double().numpy() for i in layers]
            features.append(
                np.concatenate([part / np.linalg.norm(part) for part in parts])
                / math.sqrt(len(parts))
            )
    matrix = np.stack(features)
    return matrix.T @ matrix / len(matrix)


def test_whitening_is_measured_on_the_windows_of_training_rows(tmp_path: Path) -> None:
    rows = texts(21, 9, 30, 14, 5)  # the last has no room for a block
    trainer = make_trainer(tmp_path, rows, corpus_whitening_documents=99)
    whitening = trainer.corpus_whitening()
    assert whitening is not None
    expected = CorpusWhitening.from_second_moment(
        torch.from_numpy(moment_by_plain_forwards(trainer, rows)), 0.1
    )
    torch.testing.assert_close(whitening.matrix, expected.matrix, rtol=1e-4, atol=1e-5)


def test_padded_and_masked_batches_count_the_same_windows(tmp_path: Path) -> None:
    """Rows of one batch or of many, masked in part: only blocks that exist are counted."""
    rows = texts(21, 9, 30, 14)
    for row in rows:
        row["labels"] = [-100] * 4 + row["input_ids"][4:]
    one = make_trainer(tmp_path, rows, per_device_eval_batch_size=1).corpus_whitening()
    four = make_trainer(tmp_path, rows, per_device_eval_batch_size=4).corpus_whitening()
    assert one is not None and four is not None
    torch.testing.assert_close(one.matrix, four.matrix, rtol=1e-4, atol=1e-5)


def test_whitening_is_measured_once_and_does_not_change_random_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    measure = hf_ebft.trainer.measure_corpus_whitening
    monkeypatch.setattr(
        hf_ebft.trainer,
        "measure_corpus_whitening",
        lambda *args, **kwargs: calls.append(1) or measure(*args, **kwargs),
    )
    trainer = make_trainer(tmp_path)
    before = torch.get_rng_state()
    trainer.corpus_whitening()
    assert torch.equal(torch.get_rng_state(), before)
    trainer.train()
    assert len(calls) == 1


@pytest.mark.parametrize("settings", [{"whitening_space": "feature"}, {"use_whitening": False}])
def test_nothing_is_measured_if_whitening_is_off(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, **settings)
    trainer.get_test_dataloader = None  # type: ignore[method-assign,assignment]
    assert trainer.corpus_whitening() is None
    trainer.train()


def test_training_rewards_are_whitened_by_the_corpus(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    batch = batch_of(texts(21, 30))
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    features = trainer.feature_network.embed(outputs.rollouts)
    expected = feature_matching_rewards(
        features.generated,
        features.ground_truth,
        whitening_space="corpus",
        corpus_whitening=trainer.corpus_whitening(),
    )
    exists = outputs.rollouts.exists[:, None].expand_as(expected.reward)
    torch.testing.assert_close(outputs.rewards.reward[exists], expected.reward[exists])
    # With rollouts that differ, whitening by group would leave no diversity at all.
    assert outputs.rewards.diversity[exists].abs().mean() > 1e-2


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, **saving)
    whole.train()
    resumed = make_trainer(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_tensors(weights_of(resumed.model), weights_of(whole.model), relative=0)
    assert logged(resumed, "ebft/diversity") == logged(whole, "ebft/diversity")


def test_evaluation_uses_the_corpus_whitening(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    arguments = (trainer.model, trainer.feature_network, texts(21, 30), trainer.ebft)
    figures = evaluate_documents(*arguments, corpus_whitening=trainer.corpus_whitening())
    assert np.isfinite(figures.values["diversity"]).all()
    assert not np.allclose(figures.values["diversity"], figures.values["dot_diversity"])
    with pytest.raises(ValueError, match="needs corpus_whitening"):
        evaluate_documents(*arguments)


def test_rows_are_chosen_by_seed_without_repeats() -> None:
    rows = list(range(50))
    assert choose_rows(rows, 10, corpus_rows(1)) == choose_rows(rows, 10, corpus_rows(1))
    assert choose_rows(rows, 10, corpus_rows(1)) != choose_rows(rows, 10, corpus_rows(2))
    assert len(set(choose_rows(rows, 10, corpus_rows(1)))) == 10
    assert choose_rows(rows, 99, corpus_rows(1)) == rows
    assert choose_rows(iter(rows), 3, corpus_rows(1)) == [0, 1, 2]


def test_corpus_whitening_without_training_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset is None"):
        EBFTTrainer(tiny_llama(), config(tmp_path, **CORPUS), eval_dataset=texts(20))


def test_text_without_blocks_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, texts(5, 6))
    with pytest.raises(ValueError, match=r"context_length \+ generate_max_len = 7 unmasked tokens"):
        trainer.corpus_whitening()
