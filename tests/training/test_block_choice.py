"""Blocks that are left out at random: expectations over every choice, by enumeration."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_ebft import EBFTTrainer
from hf_ebft.config import EBFTSettings
from hf_ebft.objective.losses import per_rollout_token_mean
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.sampling import make_generator
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training import block_choice
from hf_ebft.training.block_choice import choose_blocks, keep_probabilities
from hf_ebft.training.metrics import rollout_metrics
from tests.support.tiny import config, logged, ragged_layout, texts, tiny_llama, weights_of

VOCABULARY = 11


def values_by_column(layout: PackedLayout) -> Tensor:
    """(B, n, K, G) that are a function of where a block is, whatever its index."""
    row = torch.arange(layout.rollout_shape[0])[:, None]
    seed = (1.0 + layout.blocks.column + 31 * row)[:, None, :, None].expand(layout.rollout_shape)
    sample = torch.arange(layout.n_samples)[None, :, None, None]
    step = torch.arange(layout.length)
    return torch.sin(seed * 1.7 + 2.3 * sample + 0.9 * step)


def test_the_mean_over_every_choice_is_that_of_all_blocks() -> None:
    layout = ragged_layout()
    blocks = layout.blocks
    probability = torch.rand(blocks.exists.shape) * 0.8 + 0.1
    expected = per_rollout_token_mean(values_by_column(layout), layout)
    places = blocks.exists.nonzero().tolist()
    total, sum_of_chances = torch.zeros(()), 0.0
    for choice in itertools.product((False, True), repeat=len(places)):
        kept, chance = torch.zeros_like(blocks.exists), 1.0
        for (row, block), is_kept in zip(places, choice, strict=True):
            kept[row, block] = is_kept
            p = float(probability[row, block])
            chance *= p if is_kept else 1 - p
        chosen = PackedLayout(layout.documents, blocks.thinned(kept, probability), 2, 3)
        assert int(chosen.blocks.exists.sum()) == sum(choice)
        total += chance * per_rollout_token_mean(values_by_column(chosen), chosen)
        sum_of_chances += chance
    assert sum_of_chances == pytest.approx(1.0)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)


def test_probabilities_have_the_share_as_mean_and_grow_with_the_root_of_the_loss() -> None:
    torch.manual_seed(0)
    loss, exists = 5 * torch.rand(6, 9) ** 3, torch.rand(6, 9) < 0.8
    for share in (0.1, 0.5, 0.9):
        p = keep_probabilities(loss, exists, share)
        assert float(p[exists].mean()) == pytest.approx(share, rel=1e-3)
        assert not p[~exists].any()
        assert float(p[exists].min()) >= block_choice.LEAST * share - 1e-6
        inside = exists & (p < 0.999) & (p > block_choice.LEAST * share * 1.001)
        ratio = p[inside] / loss[inside].sqrt()
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
    assert not keep_probabilities(loss, torch.zeros_like(exists), 0.5).any()
    certain = keep_probabilities(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.5)
    assert bool((certain > 0).all())


def test_the_loss_of_a_window_is_that_of_a_plain_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = ragged_layout(vocabulary=VOCABULARY)
    policy = tiny_llama(vocabulary=VOCABULARY, attention_dropout=0.5)
    seen: list[Tensor] = []

    def recorded(loss: Tensor, exists: Tensor, share: float) -> Tensor:
        seen.append(loss)
        return keep_probabilities(loss, exists, share)

    monkeypatch.setattr(block_choice, "keep_probabilities", recorded)
    generator = make_generator(torch.device("cpu"), 0)
    forward = PackedForward.for_model(policy)
    chosen = choose_blocks(policy, forward, layout, 0.5, generator=generator, chunk_size=7)
    assert policy.training
    assert chosen.documents is layout.documents
    policy.eval()
    blocks = layout.blocks
    for row, block in blocks.exists.nonzero().tolist():
        end = int(blocks.column[row, block])
        text = layout.documents.input_ids[row, end - int(blocks.position[row, block]) : end + 3]
        with torch.no_grad():
            log_probs = policy(input_ids=text[None]).logits[0].log_softmax(dim=-1)
        expected = -sum(log_probs[t - 1, text[t]] for t in range(len(text) - 3, len(text)))
        torch.testing.assert_close(seen[0][row, block], expected, rtol=0, atol=1e-4)


def make(folder: Path, **settings: Any) -> EBFTTrainer:
    data = texts(24, 9, 30, 5, 24, 17, 28, 20)
    values = {"max_steps": 2} | settings
    return EBFTTrainer(tiny_llama(), config(folder, **values), train_dataset=data)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rollout_batch_size": 1, "pad_to_multiple_of": 8},
        {"training_chunk_size": 6, "ce_coef": 0.1},
        {"advantage_estimator": "fitted", "use_whitening": False},
    ],
)
def test_training_samples_fewer_blocks(settings: dict[str, Any], tmp_path: Path) -> None:
    runs = {}
    for share in (1.0, 0.4):
        trainer = make(tmp_path, block_share=share, logging_steps=2, **settings)
        trainer.train()
        runs[share] = trainer
    all_blocks, some = (logged(runs[s], "ebft/blocks_per_document")[0] for s in (1.0, 0.4))
    assert some < 0.75 * all_blocks
    without = [logged(runs[s], "ebft/documents_without_blocks")[0] for s in (1.0, 0.4)]
    assert without[0] == pytest.approx(without[1])
    weights = weights_of(runs[0.4].model)
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())


def test_evaluation_uses_all_blocks(tmp_path: Path) -> None:
    found = {}
    for share in (1.0, 0.3):
        trainer = make(tmp_path, block_share=share)
        trainer.eval_dataset = texts(30, 26)
        found[share] = trainer.evaluate()
    for name in ("eval_ebft/cfm_loss", "eval_ebft/blocks_per_document", "eval_loss"):
        assert found[1.0][name] == found[0.3][name]


def test_metrics_weight_blocks_like_the_loss() -> None:
    """Duplicates in one block of two, kept with probabilities 1 and a half."""
    layout = ragged_layout()
    kept = layout.blocks.exists & (torch.arange(4) < 2) & (torch.arange(3)[:, None] == 0)
    probability = torch.tensor([[1.0, 0.5, 1.0, 1.0]]).expand(3, 4)
    chosen = PackedLayout(layout.documents, layout.blocks.thinned(kept, probability), 2, 3)
    tokens = torch.zeros(chosen.rollout_shape, dtype=torch.long)
    tokens[0, 0, 0] = 1  # the first block's rollouts differ, the second's are equal
    found = rollout_metrics(tokens, chosen)["duplicate_rollouts"]
    assert float(found.total / found.count) == pytest.approx(2 / 3 / 2)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="block_share="):
        EBFTSettings(block_share=share)
