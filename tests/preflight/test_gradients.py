"""Products of document gradients against gradients made one by one, by other code."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from hf_ebft import EBFTTrainer
from hf_ebft.preflight.budget import Deadline
from hf_ebft.preflight.documents import choose_batches
from hf_ebft.preflight.gradients import measure_products
from hf_ebft.preflight.signal import signal_of
from hf_ebft.preflight.stand_in import stand_in
from tests.support.tiny import GivenRollouts, config, gradient_of, texts, tiny_llama

LENGTHS = (14, 18, 11, 20, 16)


def make_trainer(folder: Path, *, peft: bool = False) -> EBFTTrainer:
    # Weights of the other terms, a chunk that splits rollouts and accumulation must not matter.
    settings = {
        "ce_coef": 0.5,
        "kl_coef": 0.2,
        "rl_coef": 3.0,
        "gradient_accumulation_steps": 3,
        "training_chunk_size": 20,
        "use_whitening": False,
    }
    trainer = EBFTTrainer(
        model=tiny_llama(),
        args=config(folder, **settings),
        train_dataset=texts(*LENGTHS),
        peft_config=LoraConfig(r=2, target_modules="all-linear") if peft else None,
    )
    if peft:  # at its start an adapter has no gradient in one of its two halves
        with torch.no_grad():
            for weight in trainer.model.parameters():
                if weight.requires_grad:
                    weight.normal_(std=0.1)
    return trainer


def plain_gradients(trainer: EBFTTrainer, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, P) of both kinds: the trainer's loss with one term alone, and transformers' own loss."""
    model = trainer.model
    alone = EBFTTrainer(
        model=model,
        args=config(folder, use_whitening=False),
        feature_network=trainer.feature_network.model
        if not trainer.feature_network.shared
        else None,
    )
    alone.feature_network = trainer.feature_network
    policy, text = [], []
    for row in texts(*LENGTHS):
        ids = torch.tensor([row["input_ids"]])
        model.zero_grad()
        alone.compute_loss(model, {"input_ids": ids}).backward()
        policy.append(torch.cat([g.flatten() for g in gradient_of(model).values()]))
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        text.append(torch.cat([g.flatten() for g in gradient_of(model).values()]))
    model.zero_grad()
    return torch.stack(policy), torch.stack(text)


@pytest.mark.parametrize("peft", [False, True])
def test_products_are_those_of_single_documents(tmp_path: Path, peft: bool) -> None:
    trainer = make_trainer(tmp_path, peft=peft)
    policy, text = plain_gradients(trainer, tmp_path)
    with stand_in(trainer) as own:
        found = measure_products(own, choose_batches(own, len(LENGTHS)), Deadline())
    assert found.size == found.n_weights == policy.shape[1]
    for actual, expected in (
        (found.ebft, policy @ policy.T),
        (found.cross_entropy, text @ text.T),
        (found.cross, policy @ text.T),
    ):
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual.float(), expected, rtol=0, atol=2e-5 * scale)


def test_signal_is_that_of_the_mean_gradients(tmp_path: Path) -> None:
    """|G|^2 and tr(Sigma) by the textbook: covariance with n - 1, mean squared less its noise."""
    trainer = make_trainer(tmp_path)
    policy, text = plain_gradients(trainer, tmp_path)
    with stand_in(trainer) as own:
        signal = signal_of(measure_products(own, choose_batches(own, len(LENGTHS)), Deadline()))
    for found, gradients in ((signal.ebft, policy), (signal.cross_entropy, text)):
        noise = float(gradients.double().var(dim=0).sum())
        squared = float(gradients.double().mean(dim=0).square().sum()) - noise / len(LENGTHS)
        assert found.noise == pytest.approx(noise, rel=1e-4)
        assert found.signal == pytest.approx(squared, rel=1e-3, abs=1e-4 * noise)


def test_gradients_that_do_not_fit_are_folded(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    policy, _ = plain_gradients(trainer, tmp_path)
    numbers = 1024
    with stand_in(trainer) as own:
        batches = choose_batches(own, len(LENGTHS))
        most = 2 * 4 * len(batches) * numbers
        found = measure_products(own, batches, Deadline(), most_bytes=most)
    assert found.size == numbers < found.n_weights
    norms = policy.norm(dim=1)
    error = (found.ebft.float() - policy @ policy.T) / (norms[:, None] * norms)
    assert float(error.abs().max()) < 5 * (2 / numbers) ** 0.5
    assert float(error.abs().max()) > 0


def test_no_row_is_begun_after_the_deadline(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with stand_in(trainer) as own:
        found = measure_products(own, choose_batches(own, 5), Deadline(moment=0.0))
    assert len(found.ebft) == 4, "the fewest that an interval needs"


def test_rollouts_of_a_subclass_are_used(tmp_path: Path) -> None:
    """The same rollouts for every row: rows of equal text have equal gradients then."""
    row = texts(16)[0]
    trainer = GivenRollouts(
        model=tiny_llama(), args=config(tmp_path, use_whitening=False), train_dataset=[row] * 4
    )
    with stand_in(trainer) as own, torch.no_grad():
        batches = choose_batches(own, 4)
        trainer.given = own.given = own.sample_rollouts(own.model, batches[0])
    with stand_in(trainer) as own:
        found = measure_products(own, choose_batches(own, 4), Deadline())
    products = found.ebft
    torch.testing.assert_close(products, products[:1, :1].expand(4, 4), rtol=1e-5, atol=0)
