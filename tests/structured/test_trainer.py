"""EBFT through TRL's trainers: the advantages and gradients in their losses, and their runs."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer

from hf_ebft.structured import EBFTGRPOTrainer, FeatureMatchingReward, MultiTurnRollouts
from hf_ebft.structured.reward import frozen_copy
from tests.support.tiny import logged, weights_of
from tests.support.tiny_structured import (
    OnlyCrossEntropy,
    RecordedEBFT,
    Recorder,
    assert_advantages,
    config,
    expected_advantages,
    plain_advantages,
    plain_feature,
    policy,
    rows,
    tokenizer,
    trl_settings,
)

# TRL's default; our own use of it is tested in test_structured_config.py.
pytestmark = pytest.mark.filterwarnings("ignore:.*rollout_func:UserWarning")


class RecordedGRPO(Recorder, GRPOTrainer):
    pass


class RecordedRLOO(Recorder, RLOOTrainer):
    pass


def make(folder, *, model=None, data=None, trainer_class=RecordedEBFT, trainer=None, **settings):
    return trainer_class(
        policy() if model is None else model,
        config(folder, **settings),
        train_dataset=rows() if data is None else data,
        processing_class=tokenizer(),
        **(trainer or {}),
    )


def generations(trainer, micro_batches):
    """The rows that TRL sampled together, over their micro-batches."""
    return [
        [row for batch in trainer.seen[start : start + micro_batches] for row in batch]
        for start in range(0, len(trainer.seen), micro_batches)
    ]


# ---- Advantages -------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("estimator", ["rloo", "group_norm"])
def test_advantages_in_the_loss_are_the_papers(tmp_path, whiten, estimator):
    trainer = make(tmp_path, use_whitening=whiten, advantage_estimator=estimator, loss_type="grpo")
    network = copy.deepcopy(trainer.feature_network.model)
    trainer.train()
    assert len(trainer.seen) == 2  # two prompts in each
    for seen in trainer.seen:
        expected = expected_advantages(
            network, seen, rows(), n_samples=4, whiten=whiten, estimator=estimator
        )
        assert_advantages(seen, expected)


@pytest.mark.parametrize("method", ["completion_mean", "mean_pooling", "concat"])
def test_embedding_methods_reach_the_loss(tmp_path, method):
    """`ce_coef` and `concat` were once accepted and ignored in structured mode."""
    trainer = make(tmp_path, embed_method=method, max_steps=1)
    network = copy.deepcopy(trainer.feature_network.model)
    trainer.train()
    expected = expected_advantages(network, trainer.seen[0], rows(), n_samples=4, method=method)
    assert_advantages(trainer.seen[0], expected)


def test_accumulation_and_several_passes_train_on_the_same_advantages(tmp_path):
    trainer = make(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        num_generations=3,
        num_iterations=2,
        max_steps=4,
    )
    network = copy.deepcopy(trainer.feature_network.model)
    trainer.train()
    assert len(trainer.seen) == 12
    sampled = generations(trainer, 3)
    for first, second in (sampled[0:2], sampled[2:4]):
        assert sorted(first) == sorted(second)
        assert_advantages(first, expected_advantages(network, first, rows(), n_samples=3))


@pytest.mark.parametrize("settings", [{}, {"num_generations": 8}])
def test_reward_gives_trls_own_grpo_trainer_the_same_advantages(tmp_path, settings):
    from trl import GRPOConfig

    model = policy()
    reward = FeatureMatchingReward(model, tokenizer())
    args = GRPOConfig(**(trl_settings(tmp_path) | {"scale_rewards": "none"} | settings))
    trainer = RecordedGRPO(
        model, reward, args=args, train_dataset=rows(), processing_class=tokenizer()
    )
    network = policy()
    trainer.train()
    for seen in trainer.seen:
        expected = expected_advantages(network, seen, rows(), n_samples=args.num_generations)
        assert_advantages(seen, expected)
    assert logged(trainer, "ebft/alignment")
    assert logged(trainer, "rewards/feature_matching/mean") == pytest.approx([0, 0], abs=1e-5)


def test_reward_gives_trls_rloo_trainer_the_same_advantages(tmp_path):
    """RLOO scales what sums to zero by n / (n - 1); the reward takes that off beforehand."""
    model = policy()
    reward = FeatureMatchingReward(model, tokenizer(), trainer_baseline="leave_one_out")
    args = RLOOConfig(**(trl_settings(tmp_path) | {"beta": 0.0}))
    trainer = RecordedRLOO(
        model, reward, args=args, train_dataset=rows(), processing_class=tokenizer()
    )
    trainer.train()
    assert trainer.seen
    for seen in trainer.seen:
        assert_advantages(seen, expected_advantages(policy(), seen, rows(), n_samples=4))


def test_rewards_of_ones_own_are_added(tmp_path):
    """GRPO's group mean is their baseline; the feature-matching part stays what it was."""

    def longer_is_better(completion_ids, **_):
        return [float(sum(ids) % 7) for ids in completion_ids]

    trainer = make(
        tmp_path,
        trainer={"reward_funcs": longer_is_better},
        reward_weights=[1.0, 0.5],
        max_steps=1,
    )
    trainer.train()
    seen = trainer.seen[0]
    expected = np.array(expected_advantages(policy(), seen, rows(), n_samples=4))
    own = np.array([sum(completion) % 7 for _, completion, _ in seen], dtype=float)
    prompts = [prompt for prompt, _, _ in seen]
    for prompt in set(prompts):
        group = [index for index, other in enumerate(prompts) if other == prompt]
        expected[group] += 0.5 * (own[group] - own[group].mean())
    np.testing.assert_allclose([a for _, _, a in seen], expected, rtol=2e-4, atol=2e-5)


def test_rollout_function_with_finished_completions_and_its_budget(tmp_path):
    """`last_token` of a finished completion is its end-of-sequence token, on both sides."""
    tokens = tokenizer()
    budgets = []

    def sample(prompts, trainer):
        budgets.append(trainer.completion_budget)
        completions = [
            [*tokens(f"): return {index}")["input_ids"], tokens.eos_token_id]
            for index in range(len(prompts))
        ]
        return {
            "prompt_ids": [tokens(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": completions,
            "logprobs": [[0.0] * len(ids) for ids in completions],
        }

    trainer = make(
        tmp_path,
        trainer={"rollout_func": sample},
        adaptive_max_tokens=True,
        gt_length_multiplier=2.0,
        max_completion_length=1000,
        max_steps=1,
    )
    trainer.train()
    seen = trainer.seen[0]
    assert {completion[-1] for _, completion, _ in seen} == {tokens.eos_token_id}
    assert_advantages(seen, expected_advantages(policy(), seen, rows(), n_samples=4))
    prompts = {prompt for prompt, _, _ in seen}
    lengths = [
        len(tokens(row["ground_truth"])["input_ids"]) + 1
        for row in rows()
        if tuple(tokens(row["prompt"])["input_ids"]) in prompts
    ]
    assert budgets == [2 * max(lengths)]


# ---- The frozen network -----------------------------------------------------------------------


def test_network_stays_the_policy_that_training_started_from(tmp_path):
    trainer = make(tmp_path, max_steps=3, learning_rate=0.1)
    before = weights_of(policy())
    trainer.train()
    network = weights_of(trainer.feature_network.model)
    for name, weight in before.items():
        assert torch.equal(network[name], weight), name
    assert not torch.equal(weights_of(trainer.model)[name], before[name])


def test_copy_of_a_policy_that_trl_has_patched_runs_its_own_weights(tmp_path):
    """TRL puts a closure over the policy's forward on the policy; a deep copy takes it along."""
    trainer = make(tmp_path)
    duplicate = frozen_copy(trainer.model).eval()
    ids = torch.tensor([[1, 2, 3]])
    before = duplicate(ids).logits
    for weight in trainer.model.parameters():
        weight.data.mul_(2)
    assert torch.equal(duplicate(ids).logits, before)
    assert torch.equal(trainer.feature_network.model.eval()(ids).logits, before)


@pytest.mark.parametrize("placement", ["auto", "same_device"])
def test_peft_policy_shares_its_base_or_has_a_copy(tmp_path, placement):
    trainer = make(
        tmp_path,
        trainer={"peft_config": LoraConfig(r=4, target_modules="all-linear")},
        feature_placement=placement,
    )
    assert trainer.feature_network.shared == (placement == "auto")
    trainer.train()
    for seen in trainer.seen:
        assert_advantages(seen, expected_advantages(policy(), seen, rows(), n_samples=4))
    assert any(
        bool(weight.abs().sum()) for name, weight in weights_of(trainer.model).items()
        if "lora_B" in name
    )  # fmt: skip


def test_kl_penalty_leaves_advantages_as_they_are(tmp_path):
    """`beta` is a term of the loss in GRPO, not of the reward."""
    trainer = make(
        tmp_path,
        trainer={"peft_config": LoraConfig(r=4, target_modules="all-linear")},
        beta=0.1,
    )
    trainer.train()
    for seen in trainer.seen:
        assert_advantages(seen, expected_advantages(policy(), seen, rows(), n_samples=4))
    assert logged(trainer, "kl")[1] > 0


def test_given_network_and_name_are_used(tmp_path):
    trainer = make(tmp_path, trainer={"feature_network": policy(seed=5)}, max_steps=1)
    trainer.train()
    expected = expected_advantages(policy(seed=5), trainer.seen[0], rows(), n_samples=4)
    assert_advantages(trainer.seen[0], expected)
    policy(seed=6).save_pretrained(tmp_path / "phi")
    named = make(tmp_path, feature_model_name_or_path=str(tmp_path / "phi"), max_steps=1)
    named.train()
    expected = expected_advantages(policy(seed=6), named.seen[0], rows(), n_samples=4)
    assert_advantages(named.seen[0], expected)


def test_policy_and_tokenizer_by_name(tmp_path):
    policy().save_pretrained(tmp_path / "policy")
    tokenizer().save_pretrained(tmp_path / "policy")
    trainer = RecordedEBFT(
        str(tmp_path / "policy"), config(tmp_path, max_steps=1), train_dataset=rows()
    )
    trainer.train()
    expected = expected_advantages(policy(), trainer.seen[0], rows(), n_samples=4)
    assert_advantages(trainer.seen[0], expected)


# ---- Cross-entropy ----------------------------------------------------------------------------


def plain_cross_entropy(model, data):
    """Mean over prompts of the mean over the ground truth's tokens, one prompt at a time."""
    tokens, losses = tokenizer(), []
    for row in data:
        prompt = tokens(row["prompt"])["input_ids"]
        truth = [*tokens(row["ground_truth"])["input_ids"], tokens.eos_token_id]
        logits = model(torch.tensor([prompt + truth])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(truth)))
    return torch.stack(losses).mean()


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append({name: weight.grad.clone() for name, weight in model.named_parameters()})


def gradients_of(folder, trainer_class=RecordedEBFT, **settings):
    """A run that changes no weight, and the gradients of its optimizer steps."""
    kept = Gradients()
    values = {"max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.0}
    trainer = make(
        folder,
        trainer_class=trainer_class,
        trainer={"callbacks": [kept]},
        **(values | settings),
    )
    trainer.train()
    return trainer, kept.steps


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 32},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 16},
        {"per_device_train_batch_size": 32, "num_iterations": 2, "max_steps": 2},
        {"per_device_train_batch_size": 32, "temperature": 0.5},
        {"per_device_train_batch_size": 32, "gradient_checkpointing": True},
    ],
    ids=[
        "one batch",
        "4 micro-batches",
        "half a group",
        "2 passes",
        "temperature",
        "checkpointing",
    ],
)
def test_cross_entropy_gradient_is_that_of_the_mean_over_prompts(tmp_path, settings):
    """A prompt counts once whatever n is, and accumulation divides nothing twice."""
    trainer, steps = gradients_of(tmp_path, OnlyCrossEntropy, ce_coef=0.3, **settings)
    reference = policy()
    loss = plain_cross_entropy(reference, rows())
    (0.3 * loss).backward()
    assert len(steps) == settings.get("max_steps", 1)
    for gradient in steps:
        for name, weight in reference.named_parameters():
            scale = float(weight.grad.abs().max())
            torch.testing.assert_close(gradient[name], weight.grad, rtol=0, atol=2e-5 * scale)
    assert logged(trainer, "ebft/ce_loss")[0] == pytest.approx(loss.item(), rel=1e-5)


def test_more_micro_batches_than_accumulation_weigh_every_prompt_alike(tmp_path):
    """Two optimizer steps share a generation batch: together they have each prompt once."""
    _, (first, second) = gradients_of(
        tmp_path,
        OnlyCrossEntropy,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        steps_per_generation=8,
        ce_coef=1.0,
        max_steps=2,
    )
    reference = policy()
    plain_cross_entropy(reference, rows()).backward()
    for name, weight in reference.named_parameters():
        mean = (first[name] + second[name]) / 2
        torch.testing.assert_close(mean, weight.grad, rtol=0, atol=2e-5 * weight.grad.abs().max())


def test_policy_gradient_and_cross_entropy_are_summed(tmp_path):
    """The loss's gradient is TRL's plus ce_coef times the cross-entropy's."""
    _, (without,) = gradients_of(tmp_path, ce_coef=0.0)
    trainer, (with_term,) = gradients_of(tmp_path, ce_coef=0.5)
    seen = {prompt for prompt, _, _ in trainer.seen[0]}
    data = [r for r in rows() if tuple(tokenizer()(r["prompt"])["input_ids"]) in seen]
    reference = policy()
    (0.5 * plain_cross_entropy(reference, data)).backward()
    for name, weight in reference.named_parameters():
        difference = with_term[name] - without[name]
        scale = float(with_term[name].abs().max())
        torch.testing.assert_close(difference, weight.grad, rtol=0, atol=2e-5 * scale)


# ---- Runs -------------------------------------------------------------------------------------


def evaluating(folder, **settings):
    return RecordedEBFT(
        policy(),
        config(folder, **({"per_device_eval_batch_size": 4, "ce_coef": 0.1} | settings)),
        train_dataset=rows(),
        eval_dataset=rows(3),
        processing_class=tokenizer(),
    )


def test_evaluation_logs_rollouts_and_cross_entropy(tmp_path):
    trainer = evaluating(tmp_path)
    metrics = trainer.evaluate()
    for name in ("alignment", "diversity", "cfm_loss", "mean_reward", "advantages_std"):
        assert np.isfinite(metrics[f"eval_ebft/{name}"])
    with torch.no_grad():
        loss = plain_cross_entropy(policy(), rows(3))
    assert metrics["eval_ebft/ce_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["eval_ebft/ground_truths_over_budget"] == 1.0


def test_evaluation_repeats_itself_and_does_not_disturb_training(tmp_path):
    # Building a trainer seeds torch, so each is built right before it trains.
    plain = evaluating(tmp_path, max_steps=3)
    plain.train()
    watched = evaluating(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1)
    watched.train()
    before, after = weights_of(plain.model), weights_of(watched.model)
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
    first, second = (watched.evaluate()["eval_ebft/alignment"] for _ in range(2))
    assert first == second


def test_evaluation_takes_a_group_size_of_its_own(tmp_path):
    trainer = evaluating(tmp_path, num_generations_eval=2)
    score, shapes = trainer.reward.score, []

    def score_and_record(*args, **kwargs):
        scores = score(*args, **kwargs)
        shapes.append(tuple(scores.advantages.shape))
        return scores

    trainer.reward.score = score_and_record
    assert np.isfinite(trainer.evaluate()["eval_ebft/cfm_loss"])
    # 3 prompts in batches of 4 completions, 2 of each prompt.
    assert shapes == [(2, 2, 1), (1, 2, 1)]


def test_a_model_without_trainable_weights_is_refused(tmp_path):
    """TRL trained for hours and left the weights as they were."""
    frozen = policy().requires_grad_(False)
    trainer = make(tmp_path, model=frozen)
    with pytest.raises(ValueError, match="No weight of the model is trainable"):
        trainer.train()


def test_an_unset_learning_rate_follows_what_is_trained(tmp_path):
    lora = {"peft_config": LoraConfig(r=2, target_modules="all-linear")}
    assert make(tmp_path, learning_rate=None).args.learning_rate == 1e-6
    assert make(tmp_path, learning_rate=None, trainer=lora).args.learning_rate == 1e-5
    assert make(tmp_path, learning_rate=3e-4, trainer=lora).args.learning_rate == 3e-4


def test_resuming_repeats_the_uninterrupted_run(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ce_coef": 0.1}
    whole = make(tmp_path, **settings)
    whole.train()
    again = make(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.seen == whole.seen[2:]
    expected = weights_of(whole.model)
    for name, weight in weights_of(again.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    kept = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert not any("feature" in name for name in kept)


def test_completions_table_has_the_ground_truth_beside_them(tmp_path):
    import pandas

    trainer = make(tmp_path, log_completions=True, num_completions_to_print=1, max_steps=1)
    trainer.train()
    (path,) = (tmp_path / "completions").iterdir()
    table = pandas.read_parquet(path)
    truths = {row["prompt"]: row["ground_truth"] for row in rows()}
    assert list(table["ground_truth"]) == [truths[prompt] for prompt in table["prompt"]]
    assert {"alignment", "diversity", "feature_matching", "advantage"} <= set(table.columns)


def test_adaptive_budget_cuts_completions(tmp_path):
    trainer = make(
        tmp_path, adaptive_max_tokens=True, gt_length_multiplier=0.25, max_completion_length=50
    )
    trainer.train()
    tokens = tokenizer()
    lengths = {
        tuple(tokens(r["prompt"])["input_ids"]): len(tokens(r["ground_truth"])["input_ids"]) + 1
        for r in rows()
    }
    for seen in trainer.seen:
        longest = max(lengths[prompt] for prompt, _, _ in seen)
        assert max(len(completion) for _, completion, _ in seen) == -(-longest // 4)


def test_chats_train(tmp_path):
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"say {n}"}] for n in range(4)],
            "completion": [[{"role": "assistant", "content": f"it is {n}"}] for n in range(4)],
        }
    )
    trainer = make(tmp_path, data=data, ce_coef=0.1)
    trainer.train()
    tokens = tokenizer()
    found, expected = [], []
    for number in range(4):
        prompt = tuple(tokens(f"<|user|>say {number}<|end|>\n<|assistant|>")["input_ids"])
        truth = (*tokens(f"it is {number}<|end|>\n")["input_ids"], tokens.eos_token_id)
        group = [row for row in trainer.seen[0] if row[0] == prompt]
        if not group:  # the batch has two of the four prompts
            continue
        features = [plain_feature(policy(), prompt, completion) for _, completion, _ in group]
        true = plain_feature(policy(), prompt, truth)
        found += [advantage for _, _, advantage in group]
        expected += plain_advantages(features, true, whiten=True)
    assert len(found) == len(trainer.seen[0]) == 8
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    assert np.isfinite(logged(trainer, "ebft/ce_loss")).all()


def test_chats_of_several_turns_train(tmp_path):
    """Replies are generated on top of generated ones; the ground truth is a list of replies."""
    prompt = [{"role": "user", "content": "count"}, {"role": "user", "content": "more"}]
    data = Dataset.from_dict(
        {"prompt": [prompt] * 4, "ground_truth": [["one", f"two{n}"] for n in range(4)]}
    )
    trainer = make(
        tmp_path, data=data, ce_coef=0.1, trainer={"rollout_func": MultiTurnRollouts()}, max_steps=1
    )
    trainer.train()
    prompt_ids, completion_ids, _ = trainer.seen[0][0]
    assert tokenizer().decode(prompt_ids) == "<|user|>count<|end|>\n<|assistant|>"
    assert "<|user|>more<|end|>\n<|assistant|>" in tokenizer().decode(completion_ids)
    assert np.isfinite(logged(trainer, "ebft/cfm_loss")).all()


def test_stream_of_rows_trains(tmp_path):
    trainer = make(tmp_path, data=rows().to_iterable_dataset())
    trainer.train()
    seen = trainer.seen[0]
    assert_advantages(seen, expected_advantages(policy(), seen, rows(), n_samples=4))


# ---- What cannot work -------------------------------------------------------------------------


def test_what_cannot_work_is_refused_when_the_trainer_is_built(tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset.*no column 'solution'"):
        make(tmp_path, ground_truth_column="solution")
    with pytest.raises(ValueError, match="may all hold the ground truth"):
        make(tmp_path, data=rows().add_column("answer", ["a"] * 8))
    with pytest.raises(ValueError, match="None of the columns"):
        make(tmp_path, data=rows().rename_column("ground_truth", "text"))
    with pytest.raises(ValueError, match="no column 'prompt'"):
        make(tmp_path, data=rows().rename_column("prompt", "question"))
    with pytest.raises(ValueError, match="there is a column of that name already"):
        both = rows().add_column("completion", ["a"] * 8)
        make(tmp_path, data=both, ground_truth_column="completion")
    with pytest.raises(ValueError, match="tools"):
        make(tmp_path, trainer={"tools": [len]})
    with pytest.raises(ValueError, match="embeds 61 token ids"):
        from tests.support.tiny import tiny_llama

        make(tmp_path, trainer={"feature_network": tiny_llama()})
    from trl import GRPOConfig

    with pytest.raises(TypeError, match="needs an EBFTGRPOConfig"):
        EBFTGRPOTrainer(policy(), GRPOConfig(**trl_settings(tmp_path)), train_dataset=rows())


def test_sampling_that_would_round_the_weights_is_refused(tmp_path):
    """TRL's continuous batching casts the policy, and a base shared with it, in place."""
    with pytest.raises(ValueError, match=r"the policy from torch\.float32 to torch\.bfloat16"):
        make(tmp_path, bf16=True, use_transformers_continuous_batching=True)
    make(tmp_path, use_transformers_continuous_batching=True)


@pytest.mark.slow
def test_continuous_batching_trains_on_the_papers_advantages(tmp_path):
    trainer = make(tmp_path, max_steps=1, use_transformers_continuous_batching=True)
    trainer.train()
    assert_advantages(
        trainer.seen[0], expected_advantages(policy(), trainer.seen[0], rows(), n_samples=4)
    )


def test_row_without_ground_truth_is_refused_with_its_prompt(tmp_path):
    data = Dataset.from_dict({"prompt": ["one", "two"], "ground_truth": [None, None]})
    trainer = make(tmp_path, data=data.to_iterable_dataset())  # else it is refused before
    with pytest.raises(ValueError, match=r"'(one|two)' is None.*Filter out"):
        trainer.train()


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_frozen_adapter_weights_do_not_move(tmp_path, beta):
    """PEFT makes adapters trainable when they are switched, as TRL does for `beta`."""
    model = get_peft_model(policy(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = EBFTGRPOTrainer(
        model,
        args=config(tmp_path, beta=beta, ce_coef=0.1),
        train_dataset=rows(),
        processing_class=tokenizer(),
    )
    trainer.train()
    moved = {name for name in before if not torch.equal(model.get_parameter(name), before[name])}
    assert moved == {name for name in before if "lora_B" in name}
    # A gradient that moves nothing would still count in the norm that gradients are clipped to.
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable == moved
