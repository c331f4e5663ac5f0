"""Faults that implementations of strided EBFT have had, one test each.

The numbered ones were found by running another implementation; none of them is in this one, and
each docstring says what would go wrong. Faults that need several processes are guarded in
tests/distributed. Faults that scripts of users found in this implementation are guarded beside the
code that had them: `GUARDED` names them all.

Dimension letters: B documents, n samples, K blocks, G rollout tokens, D feature width.
"""

import ast
import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from hf_ebft import EBFTTrainer
from hf_ebft.objective.advantages import rloo_baseline
from hf_ebft.objective.rewards import feature_matching_rewards
from hf_ebft.objective.whitening import whiten
from hf_ebft.training.outputs import EBFTOutput
from tests.support.plain_forwards import plain_log_probs
from tests.support.tiny import (
    PrefixRollouts,
    assert_same_tensors,
    batch_of,
    config,
    gradient_of,
    gradients,
    logged,
    texts,
    tiny_llama,
)


def step_of(
    folder: Path, batch: dict[str, Tensor], model: nn.Module | None = None, **settings: Any
) -> tuple[EBFTTrainer, Tensor, EBFTOutput]:
    """A trainer, the loss of a batch, and what it was made of."""
    trainer = PrefixRollouts(model or tiny_llama(), config(folder, **settings))
    loss, output = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    return trainer, loss, output


def rollout_log_probs(
    model: nn.Module, output: EBFTOutput, temperature: float
) -> dict[tuple[int, int, int], Tensor]:
    """(row, sample, block) -> (G,), each from a plain forward pass over prefix + own tokens."""
    layout = output.rollouts.layout
    result = {}
    for row, block in output.rollouts.exists.nonzero().tolist():
        prefix = layout.documents.input_ids[row, : int(layout.blocks.column[row, block])].tolist()
        for sample in range(layout.n_samples):
            own = output.rollouts.tokens[row, sample, block].tolist()
            result[row, sample, block] = plain_log_probs(model, prefix, own, temperature).float()
    return result


# ---- The gradient ---------------------------------------------------------------------------


def test_fault_1_each_token_is_scored_by_its_own_predictor(tmp_path: Path) -> None:
    """A shift by one place over the packed row reads a neighbour's logits.

    Tokens laid out by steps have other rollouts' tokens before them; the gradient then had a cosine
    of 0.02 with the right one.
    """
    trainer, _, output = step_of(tmp_path, batch_of(texts(20, 13)))
    for (row, sample, block), expected in rollout_log_probs(trainer.model, output, 0.8).items():
        actual = output.log_probs[row, sample, block]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_fault_2_each_token_gets_the_advantage_of_its_own_block(tmp_path: Path) -> None:
    """Advantages repeated in block order do not belong to tokens that lie in step order.

    Here n, K and G all differ, so that any mix-up changes the gradient, which is built from plain
    forward passes.
    """
    trainer, loss, output = step_of(tmp_path, batch_of(texts(20, 13)))
    layout, exists = output.rollouts.layout, output.rollouts.exists
    assert layout.rollout_shape == (2, 3, 4, 3)
    assert exists.sum(dim=1).tolist() == [4, 2]
    assert len(set(output.advantages.flatten().tolist())) > 12
    loss.backward()
    actual = gradient_of(trainer.model)

    trainer.model.zero_grad()
    terms = []
    for (row, sample, block), log_probs in rollout_log_probs(trainer.model, output, 0.8).items():
        share = 1 / (2 * 3 * int(exists[row].sum()))
        terms.append(-output.advantages[row, sample, block] * log_probs.mean() * share)
    expected_loss = torch.stack(terms).sum()
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-6)
    assert_same_tensors(actual, gradient_of(trainer.model), relative=1e-4)


class CountForwards(nn.Module):
    """Stands for DDP: forward passes have to go through it for gradients to be synchronised."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0
        self.inside = False
        module.register_forward_pre_hook(self._check)

    def _check(self, *_: Any) -> None:
        assert self.inside, "the policy was called past its wrapper"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Let a call through."""
        self.calls += 1
        self.inside = True
        try:
            return self.module(*args, **kwargs)
        finally:
            self.inside = False


@pytest.mark.parametrize("peft", [False, True])
def test_faults_3_and_4_the_policy_is_only_called_through_its_wrapper(
    tmp_path: Path, peft: bool
) -> None:
    """A loss computed by a backbone inside the wrapper leaves ranks with gradients of their own.

    The number of calls is the same whatever the documents are, or collective calls would not match.
    """
    trainer = EBFTTrainer(
        tiny_llama(),
        config(tmp_path, ce_coef=0.1, kl_coef=0.1, feature_placement="same_device"),
        peft_config=LoraConfig(target_modules=["q_proj"]) if peft else None,
    )
    wrapper = CountForwards(trainer.model)
    for lengths in ((20, 30), (3, 2), (9, 40)):
        wrapper.calls = 0
        trainer.compute_loss(wrapper, batch_of(texts(*lengths)))
        # G passes of sampling, one with gradient.
        assert wrapper.calls == trainer.ebft.generate_max_len + 1


def test_fault_5_accumulation_is_scaled_when_labels_are_present(tmp_path: Path) -> None:
    """With labels, Trainer takes a loss for scaled already: the norm was four-fold."""
    norms = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        args = config(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=1e9,
        )
        rows = [row | {"labels": row["input_ids"]} for row in texts(20, 20, 20, 20)]
        trainer = PrefixRollouts(tiny_llama(), args, train_dataset=rows)
        trainer.train()
        norms.append((logged(trainer, "grad_norm")[0], logged(trainer, "loss")[0]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


# ---- Memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ce_coef", [0.0, 0.1])
def test_fault_6_the_head_runs_only_where_something_is_predicted(
    tmp_path: Path, ce_coef: float
) -> None:
    """Logits of the whole packed row are the largest tensor of a step, and mostly unused."""
    model = tiny_llama()
    trainer = PrefixRollouts(model, config(tmp_path, ce_coef=ce_coef))
    head_inputs: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: head_inputs.append(args[0].shape[1]))
    batch = batch_of(texts(40, 40))
    _, output = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    layout = output.rollouts.layout
    _, samples, blocks, length = layout.rollout_shape
    *decoding, training = head_inputs
    in_document = layout.document_width - 1 if ce_coef else blocks
    assert training == in_document + samples * blocks * (length - 1)
    assert training < layout.row_width
    # Sampling: the ends of the prefixes once, then one token of every rollout at a time.
    assert decoding == [blocks] + [samples * blocks] * (length - 1)


def test_fault_7_no_float32_logits_are_kept_for_backward(tmp_path: Path) -> None:
    """Computing log-probabilities in chunks saves nothing if autograd keeps every chunk."""
    vocabulary = 8000
    kept: list[tuple[torch.dtype, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor.dtype, tensor.numel()))
        return tensor

    model = tiny_llama(vocabulary=vocabulary, tie_word_embeddings=False).bfloat16()
    trainer = EBFTTrainer(model, config(tmp_path, ce_coef=0.1, log_prob_chunk_size=8))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.compute_loss(model, batch_of(texts(30, 30)))
    assert kept
    assert max(size for dtype, size in kept if dtype == torch.float32) < vocabulary


# ---- What a batch holds ---------------------------------------------------------------------


def test_fault_8_a_peft_model_can_be_evaluated(tmp_path: Path) -> None:
    """evaluate() crashed on adapters. Fresh ones change nothing: the base's figures are right."""
    rows = texts(20, 25, 30)
    args = config(tmp_path)
    plain = EBFTTrainer(tiny_llama(), args, eval_dataset=rows)
    adapted = EBFTTrainer(
        tiny_llama(),
        args,
        eval_dataset=rows,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
    )
    expected, actual = plain.evaluate(), adapted.evaluate()
    for name in ("eval_loss", "eval_ebft/cfm_loss", "eval_ebft/alignment", "eval_ebft/diversity"):
        assert actual[name] == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.parametrize("ce_coef", [0.0, 0.5])
def test_fault_9_a_batch_without_any_block_trains(
    tmp_path: Path, ce_coef: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A constant zero as loss has no gradient: backward() raised, and other ranks waited for ever.

    Every weight has to take part in the backward pass, with a gradient of zero from the rewards.
    """
    args = config(tmp_path, max_steps=2, ce_coef=ce_coef)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(6, 4, 5, 2))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("No document of a micro-batch has room for a block") == 1
    assert logged(trainer, "ebft/documents_without_blocks") == [1.0, 1.0]
    assert logged(trainer, "ebft/blocks_per_document") == [0.0, 0.0]
    assert logged(trainer, "ebft/rl_loss") == [0.0, 0.0]

    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch_of(texts(6, 4)))
    assert torch.isfinite(loss)
    loss.backward()
    for name, weight in trainer.model.named_parameters():
        assert weight.grad is not None, name
        assert bool(torch.isfinite(weight.grad).all())
        assert bool(weight.grad.any()) == (ce_coef > 0), name


def test_fault_10_a_long_prompt_moves_no_other_rows_anchors(tmp_path: Path) -> None:
    """The longest prompt of the batch decided where every row's blocks start."""
    rows: list[dict[str, Any]] = texts(30, 30)
    for row, prompt in zip(rows, (5, 20), strict=True):
        row["labels"] = [-100] * prompt + row["input_ids"][prompt:]
    _, _, output = step_of(tmp_path, batch_of(rows))
    blocks = output.rollouts.layout.blocks
    starts = [blocks.position[row][blocks.exists[row]].tolist() for row in range(2)]
    # Stride 4, three tokens in a window, and at most 30 - 3 tokens before the last one.
    assert starts == [list(range(5, 28, 4)), list(range(20, 28, 4))]


@pytest.mark.parametrize("side", ["right", "left"])
def test_fault_11_padding_is_no_text(tmp_path: Path, side: str) -> None:
    """Pads were given anchors, rewards and labels. Here they change neither loss nor gradient."""
    trainer = PrefixRollouts(tiny_llama(), config(tmp_path, ce_coef=0.3))
    (row,) = texts(15)
    expected_loss, expected = gradients(trainer, batch_of([row]))
    ids = torch.tensor([row["input_ids"]])
    for width in (17, 40):
        padding = torch.full((1, width - 15), 7)
        parts = (ids, padding) if side == "right" else (padding, ids)
        marks = [torch.full_like(part, int(part is ids)) for part in parts]
        inputs = {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(marks, 1)}
        _, output = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
        assert output.rollouts.layout.blocks.position.tolist() == [[4, 8, 12]]
        loss, actual = gradients(trainer, inputs)
        torch.testing.assert_close(loss, expected_loss)
        assert_same_tensors(actual, expected, relative=1e-5)


# ---- Sampling -------------------------------------------------------------------------------


def test_fault_12_sampling_sees_no_dropout(tmp_path: Path) -> None:
    """Sampled in training mode, rollouts come from another model than the one that is scored."""
    model = tiny_llama(attention_dropout=0.5)
    modes: list[bool] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    trainer = EBFTTrainer(model, config(tmp_path, max_steps=1), train_dataset=texts(20, 20))
    modes.clear()
    trainer.train()
    # The feature network is a copy, hook and all; it runs between sampling and training.
    sampling = trainer.ebft.generate_max_len
    assert modes == [False] * sampling + [False] + [True]


def test_fault_13_rollouts_are_scored_at_the_temperature_they_were_sampled_at(
    tmp_path: Path,
) -> None:
    """Sampled at 0.6 and scored at 1, the gradient is that of no objective."""
    batch = batch_of(texts(20))
    for temperature in (0.6, 1.0, 1.7):
        trainer, _, output = step_of(tmp_path, batch, temperature=temperature, ce_coef=0.1)
        plain = rollout_log_probs(trainer.model, output, temperature)
        for (row, sample, block), expected in plain.items():
            actual = output.log_probs[row, sample, block]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        # The document's cross-entropy stays at temperature 1.
        expected_ce = trainer.model(**batch, labels=batch["input_ids"]).loss
        torch.testing.assert_close(output.ce_loss, expected_ce)


def test_fault_15_sampling_feeds_the_document_once_and_then_single_tokens(tmp_path: Path) -> None:
    """Without a cache, every sampling step ran the whole row again."""
    model = tiny_llama()
    fed: list[tuple[int, int]] = []
    trainer = EBFTTrainer(model, config(tmp_path, generate_max_len=5))
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: fed.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    rollouts = trainer.sample_rollouts(model, batch_of(texts(40, 30)))
    rows, samples, blocks, length = rollouts.tokens.shape
    assert (rows, samples, length) == (2, 3, 5)
    assert fed == [(2, 40)] + [(2, samples * blocks)] * (length - 1)


# ---- Whitening and baseline -----------------------------------------------------------------


class CountOperations(TorchDispatchMode):
    """Counts operations and remembers the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("space", ["feature", "sample"])
def test_fault_14_whitening_takes_all_blocks_at_once(space: str) -> None:
    """A D x D decomposition for each block in turn took 0.74 s a block at D = 6144."""
    width, counts = 512, []
    for blocks in (2, 40):
        generated, truth = torch.randn(1, blocks, 4, width), torch.randn(1, blocks, width)
        with CountOperations() as counted:
            whiten(generated, truth, space=space)
        counts.append(counted.operations)
        assert counted.largest < 2 * generated.numel() < width * width
    assert counts[0] == counts[1]


def test_fault_24_the_baseline_of_a_rollout_does_not_contain_it() -> None:
    """Each other diversity has the rollout in it, so their plain mean is no baseline.

    Another rollout j must leave b_j as it is, and change the others' baselines.
    """
    generated, truth = torch.randn(2, 5, 3, 8), torch.randn(2, 3, 8)
    changed = generated.clone()
    changed[:, 2] = torch.randn(2, 3, 8)
    before, after = (
        rloo_baseline(feature_matching_rewards(x, truth, use_whitening=False))
        for x in (generated, changed)
    )
    torch.testing.assert_close(after[:, 2], before[:, 2])
    others = [0, 1, 3, 4]
    assert (after[:, others] - before[:, others]).abs().min() > 1e-4


# ---- Logging --------------------------------------------------------------------------------


def test_fault_16_metrics_are_logged_when_the_trainer_logs(tmp_path: Path) -> None:
    """They were logged for every micro-batch, beside the loss instead of with it."""
    args = config(tmp_path, max_steps=4, logging_steps=2, gradient_accumulation_steps=3)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(*[20] * 8))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "ebft/mean_reward" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert all("loss" in entry for entry in entries)


@pytest.mark.parametrize("logging_steps", [0, 1])
def test_fault_16_a_run_may_log_nothing(tmp_path: Path, logging_steps: int) -> None:
    """logging_steps=0 was a division by zero."""
    args = config(tmp_path, max_steps=2, logging_steps=logging_steps, logging_strategy="no")
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(20, 20))
    trainer.train()
    assert logged(trainer, "ebft/mean_reward") == []
    assert "train_loss" in trainer.state.log_history[-1]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3]),
        ({"logging_steps": 0.5}, [2, 4]),
        ({"logging_strategy": "epoch"}, [2, 4]),
    ],
    ids=str,
)
def test_fault_16_every_way_of_logging_works(
    tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    args = config(tmp_path, max_steps=4, **settings)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(20, 20, 20, 20))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "ebft/mean_reward" in entry]
    assert [entry["step"] for entry in entries] == steps


# ---- Devices and options --------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_fault_18_several_visible_devices_make_no_data_parallel(
    tmp_path: Path, plain: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """DataParallel cuts masks and caches along their first dimension, and replicates the policy."""
    args: TrainingArguments = config(tmp_path, max_steps=1)
    if plain:
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], max_steps=1, save_strategy="no"
        )
    _ = args.device  # counts the devices
    args._n_gpu = 2
    wrapped = Trainer(tiny_llama(), copy.copy(args))
    assert isinstance(wrapped._wrap_model(wrapped.model), nn.DataParallel)

    with caplog.at_level(logging.WARNING):
        trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(40, 40))
    assert "2 devices are visible to one process" in caplog.text
    assert "accelerate launch" in caplog.text
    assert args.n_gpu == 1
    assert trainer._wrap_model(trainer.model) is trainer.model
    trainer.train()
    assert not isinstance(trainer.model_wrapped, nn.DataParallel)


BASELINE: dict[str, Any] = {
    "ce_coef": 0.1,
    "kl_coef": 0.1,
    "use_whitening": False,
    "n_samples_per_prompt": 4,
    "generate_max_len": 4,
}
# Whitening alone makes the choice of its space and tolerance visible.
WHITENED = {"use_whitening": True}
CHANGES: list[dict[str, Any]] = [
    {"feature_layers": [0.5]},
    {"feature_layers": [0.0, 1.0]},
    {"feature_normalization": "joint"},
    {"use_whitening": True},
    {"whitening_space": "sample"} | WHITENED,
    {"whitening_tolerance": 0.9} | WHITENED,
    {"alignment_coef": 0.5},
    {"diversity_coef": 0.5},
    {"advantage_estimator": "group_norm"},
    {"advantage_estimator": "reinforce"},
    {"ce_coef": 0.2},
    {"kl_coef": 0.2},
    {"kl_estimator": "k1"},
    {"kl_estimator": "k2"},
    {"stride": 5},
    {"context_length": 5},
    {"generate_max_len": 3},
    {"embed_method": "mean_pooling"},
    {"embed_method": "concat"},
    {"n_samples_per_prompt": 3},
    {"temperature": 1.1},
    {"min_completion_prefix": 3},
    {"document_masking": False},
    {"rl_coef": 0.5},
]


def loss_with(folder: Path, settings: dict[str, Any], model: nn.Module) -> tuple[Tensor, Any]:
    rows: list[dict[str, Any]] = texts(24, 30)
    for row in rows:
        width = len(row["input_ids"])
        row["labels"] = [-100] * 6 + row["input_ids"][6:]
        row["document_ids"] = [0] * (width // 2) + [1] * (width - width // 2)
    # Features of another network, or every alignment would be that of the policy with itself.
    trainer = PrefixRollouts(
        model, config(folder, **(BASELINE | settings)), feature_network=tiny_llama(seed=5)
    )
    return gradients(trainer, batch_of(rows))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_fault_19_no_option_is_accepted_and_ignored(tmp_path: Path, change: dict[str, Any]) -> None:
    """`concat` was accepted in strided mode, `ce_coef` in structured mode; neither did anything.

    Everything that should change the gradient does; what else there is changes where and how things
    are computed, and has tests that it changes nothing else.
    """
    model = tiny_llama()
    reference = WHITENED if change.keys() > WHITENED.keys() else {}
    _, before = loss_with(tmp_path, reference, model)
    _, after = loss_with(tmp_path, change, model)
    name = "model.layers.0.self_attn.q_proj.weight"
    difference = (after[name] - before[name]).norm() / before[name].norm()
    assert difference > 1e-3


def test_fault_19_top_p_reaches_the_sampler(tmp_path: Path) -> None:
    """With a nucleus of next to nothing every rollout is the greedy one."""
    batch = batch_of(texts(30))
    greedy = EBFTTrainer(tiny_llama(), config(tmp_path, top_p=1e-6)).sample_rollouts
    trainer = EBFTTrainer(tiny_llama(), config(tmp_path))
    narrow, wide = (
        greedy(trainer.model, batch).tokens,
        trainer.sample_rollouts(trainer.model, batch).tokens,
    )
    assert torch.equal(narrow, narrow[:, :1].expand_as(narrow))
    assert not torch.equal(wide, wide[:, :1].expand_as(wide))


def test_fault_19_an_option_that_only_saves_memory_changes_nothing(tmp_path: Path) -> None:
    model = tiny_llama()
    loss, expected = loss_with(tmp_path, {}, model)
    for change in ({"log_prob_chunk_size": 3}, {"verify_packing": True}):
        again, actual = loss_with(tmp_path, change, model)
        torch.testing.assert_close(again, loss)
        assert_same_tensors(actual, expected, relative=1e-5)


def test_fault_19_evaluation_without_rollouts(tmp_path: Path) -> None:
    trainer = EBFTTrainer(
        tiny_llama(), config(tmp_path, eval_rollouts=False), eval_dataset=texts(20)
    )
    metrics = trainer.evaluate()
    assert "eval_loss" in metrics
    assert not any("ebft/" in name for name in metrics)


# ---- Costs that were not asked for ----------------------------------------------------------


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_feature_networks_head_runs_for_a_kl_penalty_only(
    tmp_path: Path, kl_coef: float
) -> None:
    """Nor does any layer above the highest feature layer."""
    model = tiny_llama(num_hidden_layers=4)
    trainer = EBFTTrainer(model, config(tmp_path, kl_coef=kl_coef, feature_layers=[0.25, 0.5]))
    calls: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    phi = trainer.feature_network.model
    assert phi is not model
    phi.lm_head.register_forward_hook(count("head"))
    for index, layer in enumerate(phi.model.layers, start=1):
        layer.register_forward_hook(count(f"layer {index}"))
    _, output = trainer.compute_loss(model, batch_of(texts(20, 30)), return_outputs=True)
    assert (output.kl is None) == (kl_coef == 0)
    expected = {"layer 1": 1, "layer 2": 1}
    if kl_coef > 0:
        expected |= {"layer 3": 1, "layer 4": 1, "head": 1}
    assert calls == expected


def test_the_kl_penalty_is_taken_to_the_feature_network(tmp_path: Path) -> None:
    """Against log-probabilities of plain forward passes of both networks."""
    policy, phi = tiny_llama(), tiny_llama(seed=3)
    trainer = PrefixRollouts(
        policy, config(tmp_path, kl_coef=0.5, kl_estimator="k3"), feature_network=phi
    )
    loss, output = trainer.compute_loss(policy, batch_of(texts(20)), return_outputs=True)
    ours = rollout_log_probs(policy, output, 0.8)
    theirs = rollout_log_probs(phi, output, 0.8)
    ratios = torch.stack([theirs[place] - ours[place] for place in ours])
    expected = (ratios.exp() - 1 - ratios).mean()
    torch.testing.assert_close(output.kl, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, output.rl_loss + 0.5 * output.kl)


def test_the_kl_to_oneself_is_zero_at_the_start(tmp_path: Path) -> None:
    trainer, _, output = step_of(tmp_path, batch_of(texts(20, 30)), kl_coef=1.0)
    assert output.kl is not None
    assert abs(output.kl.item()) < 1e-6
    assert dataclasses.is_dataclass(output)
    assert trainer.feature_network.model is not trainer.model


# ---- Faults of our own ----------------------------------------------------------------------

# What went wrong, and which tests fail when it does so again.
GUARDED = {
    "building a trainer made frozen adapters trainable": [
        "feature_network/test_shared_base.py::test_building_a_trainer_keeps_what_is_trainable",
        "feature_network/test_shared_base.py::test_frozen_adapters_are_not_trained",
    ],
    "a probe left a trace": [
        "feature_network/test_shared_base.py::test_probes_restore_the_state_of_the_policy",
    ],
    "evaluate() before train() left DDP out and crashed FSDP2": [
        "distributed/test_ddp.py::test_evaluation_before_training_leaves_no_trace",
        "distributed/test_fsdp2.py::test_evaluation_before_training_leaves_no_trace",
        "distributed/test_structured_ddp.py::test_evaluation_before_training_leaves_no_trace",
    ],
    "curves of a run that was measured first went to ./runs": [
        "training/test_before_training.py::test_curves_are_written_to_output_dir_also_after_an_evaluation",
    ],
    "only the first process was compared with the vLLM server": [
        "structured/vllm/test_distributed.py::test_a_policy_that_differs_on_one_process_stops_all",
    ],
    "thinking was cut from rollouts and not from ground truths": [
        "structured/test_thinking.py::test_right_answer_has_the_highest_alignment",
    ],
    "unfinished thinking was better than a bad answer": [
        "structured/test_thinking.py::test_unfinished_thinking_is_never_better_than_an_answer",
    ],
    "the last end token of a ground truth was taken for its end": [
        "structured/test_encoding.py::test_first_end_token_is_the_end",
        "structured/test_encoding.py::test_ground_truth_that_goes_on_after_an_end_token_is_refused",
    ],
    "equal rollouts had unequal features in bfloat16": [
        "feature_network/test_network.py::"
        "test_equal_rollouts_have_equal_features_whatever_is_rounded",
        "structured/test_reward.py::"
        "test_equal_completions_have_equal_features_whatever_a_process_rounds",
    ],
    "features and cross-entropy of a sequence depended on its batch": [
        "structured/test_positions.py::test_feature_is_that_of_the_sequence_alone_or_refused",
        "structured/test_positions.py::test_log_probs_in_the_loss_are_those_of_the_sequence_alone",
    ],
    "adapters that react to what a row holds passed the self-test": [
        "packed/test_adapters.py::test_kinds_of_lora_that_cannot_be_exact_are_refused",
        "packed/test_adapters.py::test_self_test_reads_the_tokens_that_an_adapter_reacts_to",
    ],
    "models that are wrong on ragged rows passed the self-test": [
        "packed/test_refused_models.py::test_self_test_reads_ragged_rows",
    ],
    "masks and inputs of a batch were ignored by the loss": [
        "trainer/test_ignored_inputs.py::test_masks_of_trl_count_as_labels",
        "trainer/test_ignored_inputs.py::test_an_input_that_only_evaluation_would_use_is_refused",
        "trainer/test_ignored_inputs.py::test_options_of_sft_are_refused",
        "structured/test_datasets.py::test_columns_that_cannot_be_honoured_are_refused",
    ],
    "noise in training other than nn.Dropout had no effect in chunks": [
        "packed/test_deferred.py::test_noise_on_embeddings_is_that_of_the_whole_row",
        "packed/test_deferred.py::test_every_kind_of_dropout_is_seen",
    ],
    "a hyperparameter search minimised alignment": [
        "training/test_search.py::test_the_objective_is_the_evaluation_loss",
    ],
    "a vLLM server sampled another trainer's weights": [
        "structured/vllm/test_served_policy.py::"
        "test_weights_replaced_after_the_handshake_are_noticed",
    ],
    "an adapter that never took effect went unnoticed in bfloat16": [
        "structured/vllm/test_served_policy.py::"
        "test_an_adapter_without_any_effect_is_noticed_within_a_coarse_tolerance",
    ],
    "the report showed an earlier run of the same folder": [
        "report/test_page.py::test_a_second_run_in_the_folder_of_a_longer_one_is_shown",
    ],
    "a trainer built from its own checkpoint took that for phi": [
        "training/test_same_features.py::"
        "test_a_trainer_built_from_its_own_checkpoint_does_not_resume",
    ],
    "rows with chats ended in another token than their template's": [
        "data/test_special_tokens.py::test_a_chat_ends_as_its_template_ends_a_reply",
    ],
    "rendered prompts got a second BOS": [
        "data/test_special_tokens.py::test_a_rendered_prompt_has_one_bos",
        "structured/test_datasets.py::test_rendered_prompt_gets_one_bos",
    ],
    "later replies of a chat had no block, and nothing said so": [
        "rows/test_anchors.py::test_replies_that_no_block_reaches_are_counted",
    ],
    "evaluation sets of structured mode overwrote each other": [
        "structured/test_evaluation.py::test_each_set_has_metrics_of_its_own",
        "structured/test_evaluation.py::test_best_model_is_found_by_the_metric_of_one_set",
    ],
    "too little data trained for 0 steps": [
        "structured/test_datasets.py::test_fewer_prompts_than_one_generation_batch_are_refused",
        "structured/test_datasets.py::test_data_that_holds_no_rows_is_refused",
    ],
    "generation_kwargs were overwritten": [
        "structured/test_trl_fields.py::"
        "test_generation_kwargs_that_would_be_overwritten_are_refused",
    ],
    "bad rows failed somewhere below, unnamed": [
        "structured/test_datasets.py::test_empty_prompt_is_named_before_anything_is_sampled",
        "structured/test_datasets.py::test_ids_beyond_the_embedding_are_named",
        "structured/test_datasets.py::test_lone_surrogate_in_a_stream_is_named",
        "structured/test_datasets.py::test_list_of_rows_trains_like_a_dataset",
        "structured/test_evaluation.py::test_batch_that_holds_no_whole_groups_is_refused",
        "structured/test_positions.py::"
        "test_rows_beyond_a_models_positions_are_refused_before_sampling",
        "rows/test_documents.py::test_unknown_token_ids_are_named_with_their_row",
    ],
    "adapters on 4-bit weights lost the gradient through them on some CPUs": [
        "training/test_quantized.py::"
        "test_gradients_after_sampling_are_those_of_the_dequantized_model",
    ],
    "target modules of LoRA as a regular expression matched nothing": [
        "commands/test_train.py::test_adapters_by_name_or_by_regular_expression",
        "conversion/test_axolotl.py::test_modules_stay_a_list_or_a_regular_expression",
    ],
    "models and adapters were refused for an untrue reason, or crashed": [
        "packed/test_adapters.py::test_adaption_prompt_trains_against_a_copy",
        "packed/test_refused_models.py::test_models_without_a_head_are_refused_for_that",
    ],
    "a vLLM server or its folder lost, slow or frozen cost the run": [
        "structured/vllm/test_served_policy.py::test_a_deleted_folder_stops_no_run",
        "structured/vllm/test_served_policy.py::"
        "test_a_load_without_an_answer_leaves_no_adapter_behind",
        "structured/vllm/test_workers.py::test_control_c_ends_a_run_whose_server_has_frozen",
        "structured/vllm/test_leftovers.py::test_a_run_clears_away_what_killed_trainers_left",
        "structured/vllm/test_rollouts.py::test_an_adapter_of_the_embedding_is_sampled_from",
        "structured/vllm/test_served_policy.py::test_a_server_with_a_larger_vocabulary_is_refused",
    ],
    "what failed after training cost the model or the report": [
        "watching/test_model_card.py::test_a_tree_that_is_not_installed_has_a_card",
        "commands/test_train.py::test_a_step_that_fails_after_training_does_not_stop_the_others",
    ],
    "the script did not resume by true, or failed before it said its mode": [
        "commands/test_train.py::test_a_run_resumes_from_the_newest_checkpoint",
        "commands/test_train.py::test_the_mode_is_printed_before_its_options_are_refused",
    ],
    "tests failed to collect without the extras": [
        "test_packaging.py::test_tests_are_collected_without_the_extras",
    ],
    "the converter dropped keys, overwrote its source and wrote impossible values": [
        "conversion/test_axolotl.py::test_every_option_of_grpo_is_carried_or_has_a_reason",
        "conversion/test_axolotl.py::test_transforms_of_chats",
        "commands/test_convert.py::test_the_source_is_not_overwritten",
        "conversion/test_axolotl.py::test_values_that_cannot_work_are_refused",
    ],
    "DeepSpeed and split sequences were taken and not honoured": [
        "training/test_parallelism.py::test_deepspeed_is_refused",
        "training/test_parallelism.py::test_rows_and_tensors_are_not_split",
    ],
    "settings of TRL's trainers changed the advantages in silence": [
        "structured/test_baselines.py::test_setting_that_changes_the_advantages_is_named_once",
    ],
}


@pytest.mark.parametrize("fault", GUARDED)
def test_the_guards_of_a_fault_exist(fault: str) -> None:
    for guard in GUARDED[fault]:
        path, _, name = guard.partition("::")
        tree = ast.parse((Path(__file__).parent / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
