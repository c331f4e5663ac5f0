"""`advantage_estimator="fitted"` over a run: what it learns from, when, what checkpoints keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from hf_ebft import EBFTTrainer, Rollouts
from hf_ebft.config import EBFTSettings
from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.objective.features import normalize_layers
from hf_ebft.packed.sampling import make_generator, sample_rollouts
from hf_ebft.training import fitted_baseline
from hf_ebft.training.fitted_baseline import FILE, FittedBaseline
from tests.support.tiny import (
    PrefixRollouts,
    assert_same_tensors,
    config,
    ragged_layout,
    texts,
    tiny_llama,
    weights_of,
)

FITTED = {"advantage_estimator": "fitted", "use_whitening": False}


def make(folder: Path, cls: type[EBFTTrainer] = EBFTTrainer, **settings: Any) -> EBFTTrainer:
    lora = settings.pop("peft_config", None)
    values = {"max_steps": 4} | FITTED | settings
    return cls(
        tiny_llama(),
        config(folder, **values),
        train_dataset=texts(24, 9, 30, 5, 24, 17, 28, 20),
        eval_dataset=texts(20, 26, seed=3),
        peft_config=lora,
    )


def fitted(trainer: EBFTTrainer) -> FittedBaseline:
    assert trainer.fitted is not None
    return trainer.fitted


def test_the_first_step_has_plain_rewards_and_later_ones_do_not(tmp_path: Path) -> None:
    """Nothing is fitted before the first step, and nothing to the step's own rollouts."""
    runs = {}
    for steps in (1, 2):
        for estimator in ("fitted", "reinforce"):
            trainer = make(tmp_path, advantage_estimator=estimator, max_steps=steps)
            trainer.train()
            runs[estimator, steps] = weights_of(trainer.model)
    assert_same_tensors(runs["fitted", 1], runs["reinforce", 1], relative=1e-4)
    with pytest.raises(AssertionError):
        assert_same_tensors(runs["fitted", 2], runs["reinforce", 2], relative=1e-4)


def test_regressions_are_not_fitted_to_the_batch_that_they_are_used_for(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    before = fitted(trainer).coefficients
    assert before is not None
    trainer.random_streams.restart()
    inputs = trainer.data_collator(texts(30, 30))
    for _ in range(2):
        trainer.compute_loss(trainer.model, inputs)
        assert fitted(trainer).coefficients is before


def test_regressions_reduce_advantages_of_other_rollouts(tmp_path: Path) -> None:
    """What they are for. Measured on other documents, with weights that stay."""
    trainer = make(tmp_path, learning_rate=0.0, max_steps=12, n_samples_per_prompt=8)
    trainer.train_dataset = texts(*[40] * 24, seed=1)
    trainer.train()
    _, outputs = trainer.compute_loss(
        trainer.model, trainer.data_collator(texts(*[40] * 12, seed=2)), return_outputs=True
    )
    scores = trainer.score_rollouts(outputs.rollouts)
    assert scores.token_advantages is not None
    own, reward = scores.token_advantages.square().mean(), scores.rewards.reward.square().mean()
    assert float(own / reward) < 0.7


@pytest.mark.parametrize("save_at", [2, 3])
def test_resuming_repeats_the_uninterrupted_run(
    save_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved right after a fit, and with rollouts that wait for the next one."""
    monkeypatch.setattr(fitted_baseline, "GROWTH", 2)  # fits after steps 1, 2, 4
    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": save_at}
    whole = make(tmp_path, **settings)
    whole.train()
    again = make(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{save_at}"))
    assert_same_tensors(weights_of(again.model), weights_of(whole.model), relative=0.0)


def test_a_checkpoint_without_regressions_is_not_resumed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(tmp_path, **settings, advantage_estimator="reinforce").train()
    with pytest.raises(ValueError, match="there are no regressions at"):
        make(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    make(tmp_path / "only", **settings, save_only_model=True).train()
    assert not (tmp_path / "only" / "checkpoint-1" / FILE).exists()


def test_regressions_for_another_rollout_length_are_not_resumed(tmp_path: Path) -> None:
    """One place would be taken for all of them by broadcasting, and nothing would be said."""
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(tmp_path, **settings, generate_max_len=1).train()
    with pytest.raises(ValueError, match="are for rollouts of 1 tokens"):
        make(tmp_path, **settings, generate_max_len=2).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


@pytest.mark.parametrize("settings", [{"rollout_batch_size": 1}, {"training_chunk_size": 6}])
def test_chunking_a_batch_does_not_change_the_result(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    whole, parts = make(tmp_path, PrefixRollouts), make(tmp_path, PrefixRollouts, **settings)
    for trainer in (whole, parts):
        trainer.train()
    assert_same_tensors(weights_of(parts.model), weights_of(whole.model), relative=1e-3)


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    whole = make(tmp_path, PrefixRollouts, per_device_train_batch_size=4)
    parts = make(tmp_path, PrefixRollouts, gradient_accumulation_steps=2)
    for trainer in (whole, parts):
        trainer.train()
    assert_same_tensors(weights_of(parts.model), weights_of(whole.model), relative=1e-3)


def test_adapters_with_a_shared_base_and_evaluation_between(tmp_path: Path) -> None:
    """Phi is the policy without its adapters; evaluation leaves no trace."""
    settings: dict[str, Any] = {"peft_config": LoraConfig(r=2, target_modules="all-linear")}
    torch.manual_seed(0)
    plain = make(tmp_path, **settings)
    torch.manual_seed(0)
    watched = make(tmp_path, **settings, eval_strategy="steps", eval_steps=1)
    for trainer in (plain, watched):
        assert trainer.feature_network.shared
        trainer.train()
    assert_same_tensors(weights_of(watched.model), weights_of(plain.model), relative=0.0)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_states_and_lone_tokens_equal_plain_forwards(chunk_size: int | None) -> None:
    layout = ragged_layout()
    phi = tiny_llama(vocabulary=11).eval()
    network = FeatureNetwork(
        phi,
        feature_layers=[0.0, 0.5],
        embed_method="last_token",
        normalization="per_layer",
        chunk_size=chunk_size,
    )
    basis = torch.randn(32, 5)

    def feature(text: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = phi(input_ids=text[None], output_hidden_states=True).hidden_states
        return normalize_layers([hidden[0][0, -1], hidden[1][0, -1]])

    generator = make_generator(torch.device("cpu"), 0)
    rollouts: Rollouts = sample_rollouts(
        phi, network.forward, layout, temperature=1, top_p=1, chunk_size=99, generator=generator
    )
    found, plain = network.embed_with_states(rollouts, basis), network.embed(rollouts)
    torch.testing.assert_close(found.generated, plain.generated)
    torch.testing.assert_close(found.ground_truth, plain.ground_truth)
    assert found.states is not None
    for row, block in layout.blocks.exists.nonzero().tolist():
        end = int(layout.blocks.column[row, block])
        start = end - int(layout.blocks.position[row, block])
        prefix = layout.documents.input_ids[row, start:end]
        for sample, t in ((0, 0), (1, 0), (0, 1), (1, 2)):
            text = torch.cat([prefix, rollouts.tokens[row, sample, block, :t]])
            torch.testing.assert_close(
                found.states[row, sample, block, t], feature(text) @ basis, rtol=0, atol=1e-5
            )
    alone = network.token_features(13)
    for token in range(11):
        torch.testing.assert_close(alone[token], feature(torch.tensor([token])), rtol=0, atol=1e-5)
    assert not alone[11:].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_whitening": True}, "set use_whitening=False"),
        ({"embed_method": "mean_pooling"}, "set embed_method='last_token'"),
        ({"embed_method": "concat"}, "set embed_method='last_token'"),
        ({"n_samples_per_prompt": 1, "diversity_coef": 0.0}, "no other rollout to compare with"),
    ],
)
def test_unsupported_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EBFTSettings(**(FITTED | settings))
