"""Gradients made chunk by chunk in the backward pass: the same ones, for less memory.

The oracle is one pass over the whole row, which other tests hold against plain forward passes
(test_exactness.py, which also runs the deferred passes on many architectures).

Dimension letters: B rows of the batch, n samples, K blocks, G rollout length, S document tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from hf_ebft import EBFTTrainer, Rollouts
from hf_ebft.packed.deferred import TrainingPass, can_defer
from hf_ebft.packed.forward import PackedForward, is_random_in_training
from hf_ebft.packed.sampling import make_generator, sample_with_record
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training.outputs import Scores
from tests.support.tiny import (
    GivenRollouts,
    PrefixRollouts,
    assert_same_tensors,
    batch_of,
    config,
    gradient_of,
    gradients,
    logged,
    texts,
    tiny_llama,
    weights_of,
)

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from memory import peak_bytes

# More rollout tokens than any batch here has.
WHOLE = 10_000
# Sums in another order.
ROUNDING = 5e-6


def ragged() -> dict[str, Tensor]:
    """Documents of 20, 14, 5 (no block) and 9 tokens."""
    return batch_of(texts(20, 14, 5, 9))


def packed_documents() -> dict[str, Tensor]:
    rows = texts(22, 17)
    for row, ends in zip(rows, (9, 12), strict=True):
        row["document_ids"] = [int(column >= ends) for column in range(len(row["input_ids"]))]
    return batch_of(rows)


def labelled() -> dict[str, Tensor]:
    rows = texts(20, 18)
    for row in rows:
        row["labels"] = [-100] * 6 + row["input_ids"][6:]
    return batch_of(rows)


BATCHES = {"ragged": ragged, "packed documents": packed_documents, "labelled": labelled}
SETTINGS: dict[str, dict[str, Any]] = {
    "policy gradient": {},
    "cross-entropy": {"ce_coef": 0.3},
    "kl k1": {"kl_coef": 0.2, "kl_estimator": "k1"},
    "kl k2": {"kl_coef": 0.2, "kl_estimator": "k2"},
    "kl k3, cross-entropy": {"kl_coef": 0.2, "kl_estimator": "k3", "ce_coef": 0.1},
    "truncated": {"top_p": 0.7},
    "one token": {"generate_max_len": 1},
    "in parts": {"rollout_batch_size": 1},
}


@pytest.fixture
def documents_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers make the pass over the documents again in the backward pass, as on a GPU."""
    again = functools.partial(TrainingPass, makes_documents_again=True)
    monkeypatch.setattr("hf_ebft.training.steps.TrainingPass", again)


@pytest.mark.parametrize("trainer_class", [EBFTTrainer, PrefixRollouts])
@pytest.mark.parametrize(
    "settings", [{}, {"ce_coef": 0.3}, {"rollout_batch_size": 1, "kl_coef": 0.2}]
)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("in_training_step", [False, True])
@pytest.mark.usefixtures("documents_again")
def test_documents_made_again_give_the_gradient_of_the_whole_row(
    batch: Any,
    settings: dict[str, Any],
    trainer_class: type[EBFTTrainer],
    in_training_step: bool,
    tmp_path: Path,
) -> None:
    def run(chunk: int) -> dict[str, Tensor]:
        args = config(tmp_path, training_chunk_size=chunk, **settings)
        trainer = trainer_class(tiny_llama(), args)
        if not in_training_step:
            return gradients(trainer, batch())[1]
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(trainer.model, batch())
        return gradient_of(trainer.model)

    assert_same_tensors(run(13), run(WHOLE), relative=ROUNDING)


@pytest.mark.parametrize("trainable", ["lora", "head", "last layer", "embeddings", "values"])
@pytest.mark.usefixtures("documents_again")
def test_whatever_is_trained_gets_its_gradient_from_documents_made_again(
    trainable: str, tmp_path: Path
) -> None:
    test_whatever_is_trained_gets_its_gradient(trainable, tmp_path)


@pytest.mark.usefixtures("documents_again")
def test_documents_made_again_are_computed_twice_and_kept_never(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = EBFTTrainer(model, config(tmp_path, training_chunk_size=6, ce_coef=0.1))
    counts = CountTokens(trainer.model)
    loss, outputs = trainer.compute_loss(trainer.model, ragged(), return_outputs=True)
    documents = outputs.rollouts.layout.documents.input_ids.numel()
    rollouts = outputs.rollouts.tokens[..., 1:].numel()
    assert (counts.without, counts.with_gradient) == (documents + rollouts, 0)
    loss.backward()
    assert (counts.without, counts.with_gradient) == (documents + rollouts, documents + rollouts)


def test_activations_of_documents_and_chunks_never_exist_together() -> None:
    """Where the documents' pass is made again: with half of the row in the documents, half of the
    peak.
    """
    model = tiny_llama(hidden_size=16, intermediate_size=512).train()
    forward = PackedForward.for_model(model, "split")
    documents = Documents.from_inputs(batch_of(texts(96)))
    blocks = find_blocks(documents, stride=8, context_length=3, generate_max_len=4)
    layout = PackedLayout(documents, blocks, n_samples=6, length=4)
    options: dict[str, Any] = {"temperature": 1.0, "with_document": False, "chunk_size": 100}

    def peak(again: bool) -> int:
        training_pass = TrainingPass(
            forward,
            training_chunk_size=110,
            adds_to_grad=True,
            makes_documents_again=again,
            **options,
        )

        def step() -> None:
            targets = training_pass.targets_in_sampling(model, layout)
            assert targets is not None and targets.with_gradient != again
            rollouts, record = sample_with_record(
                model,
                forward,
                layout,
                temperature=1.0,
                top_p=1.0,
                chunk_size=100,
                generator=make_generator(torch.device("cpu"), 0),
                targets=targets,
            )
            training_pass.log_probs(model, rollouts, record).rollout.sum().backward()

        step()
        return peak_bytes(step, torch.device("cpu"))

    assert peak(True) < 0.65 * peak(False)


@pytest.mark.parametrize("trainer_class", [EBFTTrainer, PrefixRollouts])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_loss_and_gradient_are_those_of_the_whole_row(
    batch: Any, settings: dict[str, Any], trainer_class: type[EBFTTrainer], tmp_path: Path
) -> None:
    """For tokens that the policy sampled, and for tokens that came otherwise."""

    def run(chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
        args = config(tmp_path, training_chunk_size=chunk, **settings)
        return gradients(trainer_class(tiny_llama(), args), batch())

    expected_loss, expected = run(WHOLE)
    for chunk in (1, 13):
        loss, found = run(chunk)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        assert_same_tensors(found, expected, relative=ROUNDING)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("settings", [{}, {"ce_coef": 0.3}, {"rollout_batch_size": 1}])
def test_gradients_of_a_training_step_are_those_of_the_whole_row(
    settings: dict[str, Any], hooked: bool, tmp_path: Path
) -> None:
    """Chunks add them to `.grad` themselves, beside what is there, unless a hook waits for it."""

    def run(chunk: int) -> tuple[dict[str, Tensor], list[int]]:
        args = config(tmp_path, training_chunk_size=chunk, **settings)
        trainer = EBFTTrainer(tiny_llama(), args)
        calls: list[int] = []
        head = trainer.model.lm_head.weight
        if hooked:
            head.register_post_accumulate_grad_hook(lambda weight: calls.append(1))
        trainer.current_gradient_accumulation_steps = 2
        for step in range(2):
            trainer.state.global_step = step
            trainer.training_step(trainer.model, ragged())
        return gradient_of(trainer.model), calls

    expected, expected_calls = run(WHOLE)
    found, calls = run(9)
    assert_same_tensors(found, expected, relative=ROUNDING)
    assert calls == expected_calls and bool(calls) == hooked


def test_hooks_on_gradients_see_the_whole_gradient(tmp_path: Path) -> None:
    """Run for every chunk and for their sum, one that doubles would make four times of it."""

    def run(chunk: int) -> dict[str, Tensor]:
        trainer = EBFTTrainer(tiny_llama(), config(tmp_path, training_chunk_size=chunk))
        for weight in trainer.model.parameters():
            weight.register_hook(lambda gradient: 2 * gradient.clamp(-0.01, 0.01))
        return gradients(trainer, ragged())[1]

    # Features are rounded otherwise in chunks, before they become rewards.
    assert_same_tensors(run(9), run(WHOLE), relative=1e-4)


@pytest.mark.parametrize("in_training_step", [False, True])
def test_memory_for_gradients_of_weights(in_training_step: bool) -> None:
    """A model much larger than its batch: a training step holds no second gradient of it."""
    model = tiny_llama(hidden_size=256, intermediate_size=4096).train()
    forward = PackedForward.for_model(model, "split")
    layout = PackedLayout(
        documents := Documents.from_inputs(batch_of(texts(16))),
        find_blocks(documents, stride=4, context_length=3, generate_max_len=4),
        n_samples=2,
        length=4,
    )
    rollouts = Rollouts(torch.full(layout.rollout_shape, 3), layout.blocks.exists, layout)
    training_pass = TrainingPass(
        forward,
        temperature=1.0,
        with_document=False,
        chunk_size=100,
        training_chunk_size=1,
        adds_to_grad=in_training_step,
    )
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)

    def step() -> None:
        training_pass.log_probs(model, rollouts).rollout.sum().backward()

    step()
    weights = sum(weight.nbytes for weight in model.parameters())
    held = peak_bytes(step, torch.device("cpu")) / weights
    assert held < 0.5 if in_training_step else held > 1.5, held


@pytest.mark.parametrize(
    "trainable", ["lora", "shared", "head", "first layer", "last layer", "embeddings", "values"]
)
def test_whatever_is_trained_gets_its_gradient(trainable: str, tmp_path: Path) -> None:
    """Where the documents' keys and values need no gradient, and where only they do."""
    names = {
        "head": "lm_head",
        "first layer": "layers.0.",
        "last layer": "layers.1.",
        "embeddings": "embed_tokens",
        "values": "v_proj",
    }

    def run(chunk: int) -> dict[str, Tensor]:
        args = config(tmp_path, training_chunk_size=chunk)
        if trainable in ("lora", "shared"):
            torch.manual_seed(0)  # for the adapters
            # Adapters that start at zero leave the base to serve as feature network, which switches
            # them off and on between sampling and training.
            adapters = LoraConfig(
                r=2, target_modules="all-linear", init_lora_weights=trainable == "shared"
            )
            trainer = EBFTTrainer(tiny_llama(), args, peft_config=adapters)
            assert trainer.feature_network.shared == (trainable == "shared")
        else:
            model = tiny_llama()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(names[trainable] in name)
            trainer = EBFTTrainer(model, args)
        return gradients(trainer, ragged())[1]

    expected = run(WHOLE)
    assert any(float(gradient.abs().max()) > 1e-4 for gradient in expected.values())
    assert_same_tensors(run(9), expected, relative=ROUNDING)


def test_gradients_can_be_asked_for_as_values(tmp_path: Path) -> None:
    """`torch.autograd.grad` gets all of it, and nothing is left in `.grad` behind its back."""
    trainer = EBFTTrainer(tiny_llama(), config(tmp_path, training_chunk_size=6, ce_coef=0.1))
    _, expected = gradients(trainer, ragged())
    trainer.random_streams.restart()  # the same rollouts again
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, ragged())
    assert isinstance(loss, Tensor)
    names, weights = zip(*trainer.model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights)
    assert all(weight.grad is None for weight in weights)
    assert_same_tensors(dict(zip(names, found, strict=True)), expected, relative=0)


class CountTokens:
    """Counts the tokens that go through a model's first layer, with gradient and without."""

    def __init__(self, model: nn.Module) -> None:
        self.with_gradient = self.without = 0
        layer = next(m for name, m in model.named_modules() if name.endswith("layers.0"))
        layer.register_forward_hook(self._count)

    def _count(self, _module: nn.Module, _args: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        tokens = state.shape[:2].numel()
        if torch.is_grad_enabled():
            self.with_gradient += tokens
        else:
            self.without += tokens


@pytest.mark.parametrize(
    ("kind", "passes"),
    [("sampled", (0, 1)), ("given", (1, 2)), ("dropout", (1, 1))],
)
@pytest.mark.parametrize("ce_coef", [0.0, 0.1])
def test_every_token_is_computed_once_with_gradient(
    kind: str, passes: tuple[int, int], ce_coef: float, tmp_path: Path
) -> None:
    """What the policy sampled is computed no other time than in sampling, and the documents once
    for both, unless dropout makes the two passes differ.
    """
    cls = PrefixRollouts if kind == "given" else EBFTTrainer
    model = tiny_llama(attention_dropout=0.1 if kind == "dropout" else 0.0)
    trainer = cls(model, config(tmp_path, training_chunk_size=6, ce_coef=ce_coef))
    counts = CountTokens(trainer.model)
    loss, outputs = trainer.compute_loss(trainer.model, ragged(), return_outputs=True)
    documents = outputs.rollouts.layout.documents.input_ids.numel()
    rollouts = outputs.rollouts.tokens[..., 1:].numel()
    once_more, of_rollouts = passes
    # A given token is sampled, replaced, and scored for its value.
    kept = 2 if kind == "given" else 1
    assert counts.with_gradient == documents * (kept if once_more == 1 and kind == "given" else 1)
    assert counts.without == documents * (1 if kind == "dropout" else 0) + rollouts * of_rollouts
    loss.backward()
    assert counts.with_gradient == documents * (2 if kind == "given" else 1) + rollouts


def test_log_probs_of_sampling_are_those_of_the_policy_that_sampled(tmp_path: Path) -> None:
    """Not of tokens put in their place, of another model, or of weights trained since."""
    trainer = EBFTTrainer(tiny_llama(), config(tmp_path, top_p=0.8, temperature=0.7))
    batch = trainer._prepare_inputs(ragged())
    rollouts, record = trainer._sample_with_record(trainer.model, batch)
    assert record is not None and record.describes(rollouts, trainer.model, 0.7)
    known = record.log_probs
    trainer.ebft.training_chunk_size = WHOLE

    same = GivenRollouts(trainer.model, config(tmp_path, top_p=0.8, temperature=0.7))
    same.given = rollouts
    _, outputs = same.compute_loss(same.model, batch, return_outputs=True)
    exists = rollouts.exists[:, None, :, None].expand(known.shape)
    torch.testing.assert_close(known[exists], outputs.log_probs.detach()[exists])

    others = (rollouts.tokens + 1) % 7
    assert not record.describes(rollouts.with_tokens(others), trainer.model, 0.7)
    replaced = dataclasses.replace(rollouts, tokens=others)
    assert not record.describes(replaced, trainer.model, 0.7)
    same_tokens = rollouts.with_tokens(rollouts.tokens.clone())
    assert record.describes(same_tokens, trainer.model, 0.7)
    elsewhere = dataclasses.replace(rollouts, layout=dataclasses.replace(rollouts.layout))
    assert not record.describes(elsewhere, trainer.model, 0.7)
    assert not record.describes(rollouts, tiny_llama(), 0.7)
    assert not record.describes(rollouts, trainer.model, 1.0)
    rollouts.tokens[0, 0, 0, 0] += 1
    assert not record.describes(rollouts, trainer.model, 0.7)
    rollouts.tokens[0, 0, 0, 0] -= 1
    assert record.describes(rollouts, trainer.model, 0.7)
    optimizer = torch.optim.AdamW(trainer.model.parameters())
    outputs.log_probs.sum().backward()
    optimizer.step()
    assert not record.describes(rollouts, trainer.model, 0.7)


WAYS_TO_GIVE_TOKENS: dict[str, Callable[[Rollouts, Tensor], Rollouts]] = {
    "with_tokens": lambda rollouts, tokens: rollouts.with_tokens(tokens),
    "replace": lambda rollouts, tokens: dataclasses.replace(rollouts, tokens=tokens),
    "in place": lambda rollouts, tokens: (rollouts.tokens.copy_(tokens), rollouts)[1],
    "anew": lambda rollouts, tokens: Rollouts(tokens, rollouts.exists, rollouts.layout),
}


@pytest.mark.parametrize("way", WAYS_TO_GIVE_TOKENS.values(), ids=WAYS_TO_GIVE_TOKENS)
def test_given_tokens_are_trained_on_whatever_sampling_has_computed(
    way: Callable[[Rollouts, Tensor], Rollouts], tmp_path: Path
) -> None:
    """However a subclass puts its tokens in the place of the sampled ones."""

    class Given(EBFTTrainer):
        def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
            rollouts = super().sample_rollouts(model, inputs)
            return way(rollouts, (rollouts.tokens + 1) % 7)

    expected_loss, expected = gradients(
        Given(tiny_llama(), config(tmp_path, training_chunk_size=WHOLE)), ragged()
    )
    loss, found = gradients(Given(tiny_llama(), config(tmp_path, training_chunk_size=6)), ragged())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert_same_tensors(found, expected, relative=ROUNDING)


def test_tokens_changed_before_the_backward_pass_change_nothing(tmp_path: Path) -> None:
    """A callback may write into the rollouts that it is told of."""
    for cls in (EBFTTrainer, PrefixRollouts):
        trainer = cls(tiny_llama(), config(tmp_path, training_chunk_size=6))
        _, expected = gradients(trainer, ragged())
        trainer.random_streams.restart()  # the same rollouts again
        trainer.model.zero_grad()
        loss, outputs = trainer.compute_loss(trainer.model, ragged(), return_outputs=True)
        outputs.rollouts.tokens.zero_()
        loss.backward()
        assert_same_tensors(gradient_of(trainer.model), expected, relative=0)


def test_rollouts_of_other_weights_are_scored_by_the_trained_ones(tmp_path: Path) -> None:
    """A subclass may sample with averaged weights, put into the model for that time."""

    class Averaged(EBFTTrainer):
        def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
            head = model.lm_head.weight
            own = head.detach().clone()
            with torch.no_grad():
                head.mul_(0.5)
                rollouts = super().sample_rollouts(model, inputs)
                head.copy_(own)
            return rollouts

    def run(chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
        args = config(tmp_path, training_chunk_size=chunk)
        return gradients(Averaged(tiny_llama(), args), ragged())

    (loss, found), (expected_loss, expected) = run(6), run(WHOLE)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert_same_tensors(found, expected, relative=ROUNDING)


def test_rollouts_outside_of_a_loss_keep_no_graph(tmp_path: Path) -> None:
    """Evaluation, callbacks and users sample, too, and nobody would train on what was kept."""
    trainer = EBFTTrainer(tiny_llama(), config(tmp_path, training_chunk_size=6))
    counts = CountTokens(trainer.model)
    trainer.sample_rollouts(trainer.model, trainer._prepare_inputs(ragged()))
    assert counts.with_gradient == 0
    loss = trainer.compute_loss(trainer.model, ragged())
    assert isinstance(loss, Tensor) and trainer._record is None


def test_old_rollouts_are_scored_by_the_policy_as_it_is_now(tmp_path: Path) -> None:
    """A subclass may train on the same rollouts twice."""

    def second_loss(chunk: int) -> Tensor:
        trainer = GivenRollouts(tiny_llama(), config(tmp_path, training_chunk_size=chunk))
        gradients(trainer, ragged())
        torch.optim.SGD(trainer.model.parameters(), lr=0.5).step()
        _, outputs = trainer.compute_loss(trainer.model, ragged(), return_outputs=True)
        exists = outputs.rollouts.exists[:, None, :, None].expand(outputs.log_probs.shape)
        return outputs.log_probs.detach()[exists]

    torch.testing.assert_close(second_loss(6), second_loss(WHOLE), rtol=1e-5, atol=1e-5)


def test_the_same_rollouts_can_be_trained_on_twice(tmp_path: Path) -> None:
    """The pass over the documents that sampling made serves the first time only."""

    trainer = GivenRollouts(tiny_llama(), config(tmp_path, training_chunk_size=6))
    first, second = (gradients(trainer, ragged()) for _ in range(2))
    torch.testing.assert_close(first[0], second[0])
    assert_same_tensors(second[1], first[1], relative=ROUNDING)


def test_weights_changed_before_the_backward_pass_are_an_error(tmp_path: Path) -> None:
    """The gradient would be that of another policy than the loss was computed with."""
    trainer = EBFTTrainer(tiny_llama(), config(tmp_path, training_chunk_size=6))
    loss = trainer.compute_loss(trainer.model, ragged())
    assert isinstance(loss, Tensor)
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_dropout_acts_on_documents_and_chunks(tmp_path: Path) -> None:
    """The gradient of a training pass with dropout, whose mean is that of the whole row."""

    def mean_gradient(chunk: int, dropout: float, repeats: int) -> Tensor:
        model = tiny_llama(attention_dropout=dropout)
        args = config(tmp_path, training_chunk_size=chunk, packed_attention="sdpa")
        trainer = PrefixRollouts(model, args)
        found = [gradients(trainer, ragged())[1]["lm_head.weight"] for _ in range(repeats)]
        return torch.stack(found)

    dropped = mean_gradient(9, 0.3, 60)
    assert not torch.equal(dropped[0], dropped[1])
    whole = mean_gradient(WHOLE, 0.3, 60)
    error = (dropped.std(0).square() / 60 + whole.std(0).square() / 60).sqrt().norm()
    assert (dropped.mean(0) - whole.mean(0)).norm() < 2 * error
    assert (dropped.mean(0) - mean_gradient(WHOLE, 0.0, 1)[0]).norm() > 3 * error


@pytest.mark.parametrize("way", ["no gradient", "checkpointing"])
def test_what_cannot_wait_is_done_at_once(way: str, tmp_path: Path) -> None:
    args = config(tmp_path, training_chunk_size=6)
    trainer = PrefixRollouts(tiny_llama(), args)
    assert can_defer(trainer.model, trainer._forward)
    if way == "checkpointing":
        trainer.model.gradient_checkpointing_enable()
        assert not can_defer(trainer.model, trainer._forward)
        expected = gradients(PrefixRollouts(tiny_llama(), config(tmp_path)), ragged())[1]
        found = gradients(trainer, ragged())[1]
        assert_same_tensors(found, expected, relative=ROUNDING)
    else:
        with torch.no_grad():
            assert not can_defer(trainer.model, trainer._forward)
            loss = trainer.compute_loss(trainer.model, ragged())
        assert isinstance(loss, Tensor) and not loss.requires_grad


def test_bfloat16_differs_by_its_rounding_alone(tmp_path: Path) -> None:
    def run(chunk: int) -> dict[str, Tensor]:
        model = tiny_llama().to(torch.bfloat16)
        args = config(tmp_path, training_chunk_size=chunk, feature_dtype="bfloat16")
        return gradients(PrefixRollouts(model, args), ragged())[1]

    assert_same_tensors(run(6), run(WHOLE), relative=0.05)


def test_memory_does_not_grow_with_the_number_of_rollouts(tmp_path: Path) -> None:
    """Four times the samples: the whole row needs about four times the memory, chunks do not."""

    def peak(n_samples: int, chunk: int) -> int:
        model = tiny_llama(hidden_size=32, intermediate_size=256, num_hidden_layers=4)
        args = config(tmp_path, n_samples_per_prompt=n_samples, training_chunk_size=chunk)
        trainer = EBFTTrainer(model, args)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        rollouts = trainer.sample_rollouts(trainer.model, batch_of(texts(64)))

        def step() -> None:
            trainer.sample_rollouts = lambda model, inputs: rollouts  # type: ignore[method-assign]
            trainer.score_rollouts = (
                lambda rollouts: Scores(  # type: ignore[method-assign]
                    _no_rewards(rollouts), torch.ones(rollouts.tokens.shape[:3]), None
                )
            )
            loss = trainer.compute_loss(trainer.model, batch_of(texts(64)))
            assert isinstance(loss, Tensor)
            loss.backward()

        step()
        return peak_bytes(step, torch.device("cpu"))

    assert peak(32, WHOLE) > 2.5 * peak(8, WHOLE)
    assert peak(32, 256) < 1.3 * peak(8, 256)
    assert peak(32, 256) < 0.4 * peak(32, WHOLE)


def _no_rewards(rollouts: Rollouts) -> Any:
    from hf_ebft.objective.rewards import Rewards

    zeros = torch.zeros(rollouts.tokens.shape[:3])
    fields = {field.name: zeros for field in dataclasses.fields(Rewards)}
    of_groups = ("cfm_loss", "energy_score", "excess_over_spread")
    return Rewards(**fields | dict.fromkeys(of_groups, zeros[:, 0]))


def test_training_continues_a_run_alike(tmp_path: Path) -> None:
    """Whole runs with accumulation agree, weights and log."""

    def run(chunk: int) -> tuple[dict[str, Tensor], list[float]]:
        args = config(
            tmp_path, training_chunk_size=chunk, max_steps=3, gradient_accumulation_steps=2
        )
        trainer = PrefixRollouts(tiny_llama(), args, train_dataset=texts(20, 14, 17, 9))
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "ebft/entropy" in entry]
        weights = {name: w.detach().clone() for name, w in trainer.model.named_parameters()}
        return weights, [entry[key] for entry in history for key in ("ebft/entropy", "loss")]

    weights, log = run(5)
    expected, expected_log = run(WHOLE)
    assert_same_tensors(weights, expected, relative=2e-3)  # after steps of AdamW
    assert log == pytest.approx(expected_log, rel=1e-3, abs=1e-4)
    assert gradient_of(tiny_llama()).keys() == expected.keys()


# ---- Randomness of training mode --------------------------------------------------------------


class FunctionalDropout(nn.Module):
    """Drops by a function, at a rate that no configuration knows."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropout_rate = rate

    def forward(self, states: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        return nn.functional.dropout(states, self.dropout_rate, self.training)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout, FunctionalDropout])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_every_kind_of_dropout_is_seen(kind: type[nn.Module], rate: float, tmp_path: Path) -> None:
    """Where there is any, the pass over the documents in sampling cannot serve the gradient."""
    model = tiny_llama()
    model.model.norm = nn.Sequential(model.model.norm, kind(rate))  # type: ignore[assignment]
    assert is_random_in_training(model) == (rate > 0)


def test_noise_on_embeddings_is_that_of_the_whole_row(tmp_path: Path) -> None:
    """NEFTune's noise depends on how many tokens a pass has; chunks got more than one pass, and the
    documents' loss got none."""

    def trained(chunk: int) -> EBFTTrainer:
        args = config(
            tmp_path, max_steps=1, training_chunk_size=chunk, ce_coef=0.1, neftune_noise_alpha=5.0
        )
        trainer = PrefixRollouts(tiny_llama(), args, train_dataset=texts(30, 21, 17))
        trainer.train()
        return trainer

    whole, chunks = trained(WHOLE), trained(9)
    for name in ("ebft/ce_loss", "ebft/rl_loss", "grad_norm"):
        assert logged(chunks, name) == pytest.approx(logged(whole, name), rel=1e-5), name
    assert_same_tensors(weights_of(chunks.model), weights_of(whole.model), relative=1e-4)
