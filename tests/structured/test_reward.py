"""The reward function by itself: columns, groups, values, metrics, and what it refuses."""

import copy

import numpy as np
import pytest
import torch

from hf_ebft.structured import FeatureMatchingReward
from hf_ebft.structured.groups import fingerprints, group_size
from tests.support.tiny import tiny_llama
from tests.support.tiny_structured import plain_advantages, plain_feature, policy, tokenizer


def ids(text, finished=True):
    tokens = tokenizer()
    return [*tokens(text)["input_ids"], *([tokens.eos_token_id] if finished else [])]


COMPLETIONS = ["1", "2 + 2", "x", "return", "1", "pass", "yield x", "1"]


def call(reward, *, truths=("4", "pass"), completions=COMPLETIONS, **columns):
    """Two prompts, four completions each."""
    arguments = {
        "prompts": ["def f():"] * 4 + ["while 1:"] * 4,
        "completions": completions,
        "completion_ids": [ids(text) for text in completions],
        "ground_truth": [truths[0]] * 4 + [truths[1]] * 4,
    }
    return reward(**(arguments | columns))


def expected(model, *, truths=("4", "pass"), completions=COMPLETIONS, **settings):
    values = []
    for group, (prompt, truth) in enumerate(zip(("def f():", "while 1:"), truths, strict=True)):
        before = tuple(ids(prompt, finished=False))
        own = completions[4 * group : 4 * group + 4]
        features = [plain_feature(model, before, tuple(ids(text))) for text in own]
        true = plain_feature(model, before, tuple(ids(truth)))
        values += plain_advantages(features, true, **({"whiten": True} | settings))
    return values


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("estimator", ["rloo", "group_norm"])
def test_value_is_the_papers_advantage(whiten, estimator):
    """Duplicates in the second group included."""
    reward = FeatureMatchingReward(
        policy(), tokenizer(), use_whitening=whiten, advantage_estimator=estimator
    )
    wanted = expected(policy(), whiten=whiten, estimator=estimator)
    np.testing.assert_allclose(call(reward), wanted, rtol=1e-4, atol=2e-5)
    assert np.sum(call(reward)[:4]) == pytest.approx(0, abs=1e-5)


def test_leave_one_out_trainers_get_what_their_baseline_turns_into_the_advantage():
    reward = FeatureMatchingReward(policy(), tokenizer(), trainer_baseline="leave_one_out")
    values = np.array(call(reward)).reshape(2, 4)
    others = (values.sum(axis=1, keepdims=True) - values) / 3
    wanted = expected(policy())
    np.testing.assert_allclose((values - others).ravel(), wanted, rtol=1e-4, atol=2e-5)


def test_model_is_copied_as_it_is_and_a_network_is_taken():
    model = policy().train()
    reward = FeatureMatchingReward(model, tokenizer())
    before = call(reward)
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())
    for weight in model.parameters():
        weight.data.add_(1.0)
    assert call(reward) == before
    again = FeatureMatchingReward(reward.network, tokenizer())
    assert again.network is reward.network
    with pytest.raises(ValueError, match=r"embed_method would have no effect, .* already built"):
        FeatureMatchingReward(reward.network, tokenizer(), embed_method="concat")


def test_name_is_loaded_with_its_tokenizer(tmp_path):
    policy().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    by_name = FeatureMatchingReward(str(tmp_path))
    np.testing.assert_allclose(call(by_name), expected(policy()), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("column", ["ground_truth", "answer", "solution"])
def test_ground_truth_is_found_in_its_column(column):
    chosen = {"ground_truth_column": column} if column == "solution" else {}
    reward = FeatureMatchingReward(policy(), tokenizer(), **chosen)
    truths = ["4"] * 4 + ["pass"] * 4
    values = reward(
        ["def f():"] * 4 + ["while 1:"] * 4,
        COMPLETIONS,
        [ids(text) for text in COMPLETIONS],
        trainer_state=None,
        **{column: truths},
    )
    np.testing.assert_allclose(values, expected(policy()), rtol=1e-4, atol=2e-5)


def test_column_that_is_missing_or_withheld_by_trl_is_explained():
    reward = FeatureMatchingReward(policy(), tokenizer())
    with pytest.raises(ValueError, match=r"None of the columns .*TRL does not pass .*rename it"):
        reward(["a"] * 4, ["b"] * 4, [[1]] * 4, text=["c"] * 4)
    with pytest.raises(ValueError, match="may all hold the ground truth"):
        call(reward, answer=["c"] * 8)
    named = FeatureMatchingReward(policy(), tokenizer(), ground_truth_column="completion")
    with pytest.raises(ValueError, match=r"no column 'completion'.*rename it"):
        call(named)


def test_metrics_are_means_over_completions():
    seen = {}
    reward = FeatureMatchingReward(policy(), tokenizer())
    call(reward, log_metric=lambda name, value: seen.update({name: value}))
    scores = reward.score(
        ["def f():"] * 4 + ["while 1:"] * 4,
        [ids(text) for text in COMPLETIONS],
        ["4"] * 4 + ["pass"] * 4,
    )
    assert seen["ebft/duplicate_rollouts"] == pytest.approx(1 / 8)
    assert seen["ebft/alignment"] == pytest.approx(float(scores.rewards.alignment.mean()))
    assert seen["ebft/mean_reward"] == pytest.approx(float(scores.rewards.reward.mean()))
    assert seen["ebft/advantages_std"] == pytest.approx(np.std(expected(policy())), rel=1e-4)
    lengths = [len(ids("4")), len(ids("pass"))]
    assert seen["ebft/ground_truth_length"] == pytest.approx(np.mean(lengths))
    features = [
        plain_feature(policy(), tuple(ids("def f():", False)), tuple(ids(text)))
        for text in COMPLETIONS[:4]
    ]
    truth = plain_feature(policy(), tuple(ids("def f():", False)), tuple(ids("4")))
    pairs = [
        (features[i] - truth) @ (features[j] - truth) for i in range(4) for j in range(4) if i != j
    ]
    assert float(scores.rewards.cfm_loss[0, 0]) == pytest.approx(np.mean(pairs), abs=2e-5)


def test_equal_completions_of_all_groups_give_zero_advantages():
    seen = {}
    reward = FeatureMatchingReward(policy(), tokenizer())
    values = call(
        reward,
        completions=["x"] * 8,
        log_metric=lambda name, value: seen.update({name: value}),
    )
    assert values == pytest.approx([0.0] * 8, abs=1e-6)
    assert seen["ebft/zero_advantage_groups"] == 1.0
    assert seen["ebft/duplicate_rollouts"] == 0.75


@pytest.mark.parametrize("thinking", [False, True])
def test_equal_completions_have_equal_features_whatever_a_process_rounds(thinking):
    """Kernels of two processes can round differently; whitening took that for a direction."""
    completions = ["x", "x", "return", "pass", "x", "y", "z", "4"]
    if thinking:  # what is left out tells nothing apart
        completions = [f"<think>{n}</think>\n\n{text}" for n, text in enumerate(completions)]
    reward = FeatureMatchingReward(policy(), tokenizer())
    embed = reward.network.embed

    def embed_and_round(sequences):
        generator = torch.Generator().manual_seed(0)
        found = embed(sequences)
        return found + 1e-4 * torch.randn(found.shape, generator=generator)

    reward.network.embed = embed_and_round
    scores = reward.score(
        ["def f():"] * 8,
        [ids(text) for text in completions],
        ["4"] * 8,
        embed_thinking=[not thinking] * 8,
    )
    # Of three equal completions each has two copies, and whitened copies have dot product 1/3.
    copies = scores.rewards.diversity[0, [0, 1, 4], 0]
    torch.testing.assert_close(copies, torch.full((3,), 2 / 7 * 2 / 3), rtol=0, atol=1e-4)
    assert scores.rewards.alignment[0, [0, 1, 4], 0].unique().numel() == 1


def test_thinking_is_kept_out_of_the_features_where_a_row_asks_for_it():
    thoughtful = [
        f"<think>hm {number}</think>\n\n{text}" for number, text in enumerate(COMPLETIONS)
    ]
    reward = FeatureMatchingReward(policy(), tokenizer())
    with_thinking = call(reward, completions=thoughtful, embed_thinking=[True] * 8)
    without = call(reward, completions=thoughtful, embed_thinking=[False] * 8)
    np.testing.assert_allclose(without, expected(policy()), rtol=1e-3, atol=1e-4)
    assert np.abs(np.subtract(with_thinking, without)).max() > 0.01


def test_completion_that_never_answers_counts_as_the_worst():
    seen = {}
    completions = ["<think>hm", *COMPLETIONS[1:]]
    reward = FeatureMatchingReward(policy(), tokenizer(), use_whitening=False)
    call(
        reward,
        completions=completions,
        embed_thinking=[False] * 8,
        log_metric=lambda name, value: seen.update({name: value}),
    )
    assert seen["ebft/without_answer"] == 1 / 8
    scores = reward.score(
        ["def f():"] * 4 + ["while 1:"] * 4,
        [ids(text) for text in completions],
        ["4"] * 4 + ["pass"] * 4,
        embed_thinking=[False] * 8,
    )
    assert scores.rewards.alignment[0, 0, 0] == -2
    assert scores.rewards.diversity[0, 0, 0] == 2
    assert scores.rewards.reward[0, 0, 0] == -4 <= scores.rewards.reward[0].min()


def test_rollouts_after_other_prompts_are_refused():
    reward = FeatureMatchingReward(policy(), tokenizer())
    with pytest.raises(ValueError, match=r"not the one of .* that the ground truth continues"):
        call(reward, rollout_prompt_ids=[[1, 2]] * 8)


def test_mask_of_another_text_is_refused():
    """A dataset's own completion_mask was taken for that of the rollout."""
    reward = FeatureMatchingReward(policy(), tokenizer(), embed_method="completion_mean")
    masks = [[1] * len(ids(text)) for text in COMPLETIONS]
    np.testing.assert_allclose(call(reward, completion_mask=masks), call(reward))
    with pytest.raises(ValueError, match=r"has 9 entries for a completion of \d tokens"):
        call(reward, completion_mask=[[1] * 9, *masks[1:]])


def test_size_of_groups():
    device = torch.device("cpu")

    def prints(letters):
        return fingerprints(list(letters), device)

    assert group_size(prints("aaabbb"), ()) == 3
    assert group_size(prints("aaabbb"), (3, None)) == 3
    assert group_size(prints("aaaaaabbb"), (3, None)) == 3  # a row twice in the data
    assert group_size(prints("aabb"), (4, 2)) == 2  # evaluation
    with pytest.raises(ValueError, match="runs of 1, 2 equal rows, so the size"):
        group_size(prints("aab"), (None, None))
    with pytest.raises(ValueError, match="2 equal rows, which do not divide into groups of 4"):
        group_size(prints("aabb"), (4,))
    assert group_size(prints("abab"), ()) == 1


def test_fingerprints_tell_values_apart_and_are_the_same_everywhere():
    """Python's own hash differs from process to process."""
    device = torch.device("cpu")
    one, other = fingerprints([(1, 2), (1, 3)], device).tolist()
    assert one != other
    assert fingerprints([(1, 2)], device).tolist() == [one] == [-2891141572932026482]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trainer_baseline": "mean"}, "trainer_baseline='mean' is unknown"),
        ({"num_generations": 2}, "num_generations=2 with diversity_coef"),
        ({"num_generations": 1}, "leaves advantage_estimator"),
        ({"embed_method": "max"}, "embed_method='max' is unknown"),
        ({"feature_placement": "sharded"}, "needs EBFTGRPOTrainer"),
        ({"feature_model_name_or_path": "x"}, "feature_quantization need EBFTGRPOTrainer"),
        ({"feature_batch_tokens": 0}, "feature_batch_tokens=0"),
        ({"advantage_estimator": "reinforce"}, "subtract a baseline"),
        ({"kl_coef": 0.1}, "`beta`"),
        ({"ce_coef": 0.1}, "a reward cannot"),
        ({"ce_coef_schedule": "linear", "ce_coef_final": 0.1}, "a reward cannot"),
        ({"ground_truth_column": "prompt"}, "cannot hold the ground truth"),
        ({"alignment_coef": 0.0, "diversity_coef": 0.0}, "nothing to learn"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureMatchingReward(policy(), tokenizer(), **arguments)


def test_unknown_options_and_missing_tokenizers_are_refused():
    with pytest.raises(TypeError, match="alignment_coeff"):
        FeatureMatchingReward(policy(), tokenizer(), alignment_coeff=1.0)
    with pytest.raises(ValueError, match="pass processing_class"):
        FeatureMatchingReward(tiny_llama())


def test_group_sizes_found_in_a_batch_are_checked():
    reward = FeatureMatchingReward(policy(), tokenizer())
    pair = {
        "prompts": ["a", "a", "b", "b"],
        "completions": ["c"] * 4,
        "completion_ids": [ids(text) for text in "cdef"],
        "ground_truth": ["g"] * 4,
    }
    with pytest.raises(ValueError, match="num_generations=2 with diversity_coef"):
        reward(**pair)
    assert FeatureMatchingReward(policy(), tokenizer(), diversity_coef=0.0)(**pair)
    single = pair | {"prompts": ["a", "b", "c", "d"]}
    with pytest.raises(ValueError, match="num_generations=1 gives each prompt one completion"):
        reward(**single)


def test_dtype_and_device_of_the_copy():
    reward = FeatureMatchingReward(
        policy(), tokenizer(), feature_dtype="bfloat16", feature_placement="cpu"
    )
    assert reward.network.model.dtype == torch.bfloat16
    assert copy.deepcopy(policy()).dtype == torch.float32
