"""Thinking left out of the features: empty blocks of templates, and unfinished thinking."""

import itertools

import numpy as np
import pytest
import torch

from hf_ebft.data import answer_start
from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.rewards import feature_matching_rewards
from hf_ebft.structured import FeatureMatchingReward
from hf_ebft.structured.encoding import ExampleEncoder
from hf_ebft.structured.unfinished import rank_unfinished_last
from tests.support.tiny_structured import policy, tokenizer

EMPTY = "<think>\n\n</think>\n\n"


def template(before_answer: str, after_prompt: str) -> str:
    """A chat template that writes a text before every answer and one at the end of the prompt."""
    return (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        f"{{% if m['role'] == 'assistant' %}}{{{{ {before_answer!r} }}}}{{% endif %}}"
        "{{ m['content'] }}<|end|>{{ '\n' }}{% endfor %}"
        f"{{% if add_generation_prompt %}}<|assistant|>{{{{ {after_prompt!r} }}}}{{% endif %}}"
    )


# Templates of reasoning models, each with what a policy writes before its answer.
TEMPLATES = {
    # An empty block before the answer, and nothing in the prompt.
    "qwen3": (template(EMPTY, ""), "<think>\nhm\n</think>\n\n"),
    # The prompt opens the block, the answer holds an empty one.
    "qwen3.5": (template(EMPTY, "<think>\n"), "hm, well\n</think>\n\n"),
    # On a line of its own.
    "glm4": (template("\n<think></think>\n", ""), "\n<think>hm</think>\n"),
    # Thinking switched off: the prompt holds the empty block, and answers come at once.
    "closed": (template(EMPTY, EMPTY), ""),
}


def ids(text):
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def reward_of(layout, seed=0, **settings):
    return FeatureMatchingReward(
        policy(seed=seed),
        tokenizer(),
        chat_template_kwargs={"chat_template": layout},
        eos_token_ids=ids("<|end|>"),
        **settings,
    )


@pytest.mark.parametrize(("layout", "thought"), TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("method", ["last_token", "completion_mean"])
def test_right_answer_has_the_highest_alignment(layout, thought, whiten, method):
    """The empty block that the template writes into the truth was embedded with it."""
    for seed in range(3):
        reward = reward_of(layout, seed, use_whitening=whiten, embed_method=method)
        prompt = [{"role": "user", "content": "two and two"}]
        answers = ["4", "5", "none", "it is x"]
        scores = reward.score(
            [prompt] * 4,
            [ids(thought + answer + "<|end|>") for answer in answers],
            [[{"role": "assistant", "content": "4"}]] * 4,
            embed_thinking=[False] * 4,
        )
        alignment = scores.rewards.alignment[0, :, 0]
        assert alignment[0].item() == pytest.approx(2.0, abs=1e-5)
        assert alignment[1:].max() < alignment[0]


def test_cross_entropy_leaves_out_the_empty_block():
    layout, _ = TEMPLATES["qwen3"]
    encoder = ExampleEncoder(
        tokenizer(),
        eos_token_ids=ids("<|end|>"),
        chat_template_kwargs={"chat_template": layout},
    )
    prompt = [{"role": "user", "content": "two and two"}]
    kept, without = encoder.encode([prompt] * 2, ["4 or so"] * 2, [True, False])
    assert kept.truth_ids == without.truth_ids == tuple(ids(EMPTY + "4 or so<|end|>"))
    assert all(kept.is_target) and kept.answer_start == 0
    counted = [
        token for token, own in zip(without.truth_ids, without.is_target, strict=True) if own
    ]
    assert tokenizer().decode(counted) == "4 or so<|end|>"
    assert tokenizer().decode(without.truth_ids[without.answer_start :]) == "4 or so<|end|>"


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("<think>hm", "no answer after its thinking"),
        ("<think>hm</think>\n\n", "no answer after its thinking"),
        (
            [
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "c"},
            ],
            "ground truth of several turns",
        ),
    ],
)
def test_ground_truth_whose_answer_cannot_be_told_is_refused(truth, message):
    prompt = "why?" if isinstance(truth, str) else [{"role": "user", "content": "why?"}]
    with pytest.raises(ValueError, match=message):
        ExampleEncoder(tokenizer()).encode([prompt], [truth], [False])


@pytest.mark.parametrize("value", ["false", "", float("nan"), 2])
def test_embed_thinking_that_is_not_true_or_false_is_refused(value):
    """A text "false" is true to Python: thinking would stay in ground truths alone."""
    with pytest.raises(ValueError, match=r"has embed_thinking=.*make it true or false"):
        ExampleEncoder(tokenizer()).encode(["a"], ["b"], [value])


def test_tag_in_a_users_message_opens_no_thinking():
    """Every completion of such a prompt counted as unfinished."""
    prompt = ids("<|user|>what is <think> for?<|end|>\n<|assistant|>")
    completion = ids("to think<|end|>")
    assert answer_start(prompt, completion, tokenizer()) == 0
    opened = ids("<|user|>why?<|end|>\n<|assistant|><think>\n")
    assert answer_start(opened, completion, tokenizer()) == len(completion)


# ---- Completions that are still thinking at their end -------------------------------------------


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("estimator", ["rloo", "group_norm"])
def test_unfinished_thinking_is_never_better_than_an_answer(whiten, estimator):
    """It had features of zero, hence reward 0, which is better than a bad answer."""
    for seed in range(5):
        reward = FeatureMatchingReward(
            policy(seed=seed), tokenizer(), use_whitening=whiten, advantage_estimator=estimator
        )
        completions = ["<think>hm", "none at all", "4", "<think>hm</think>\n\n5"]
        arguments = {
            "completions": completions,
            "completion_ids": [
                [*ids(text), tokenizer().eos_token_id] if "4" in text or "5" in text else ids(text)
                for text in completions
            ],
            "embed_thinking": [False] * 4,
        }
        values = reward(["two and two"] * 4, ground_truth=["4"] * 4, **arguments)
        assert values[0] < min(values[1:]) - 1e-3
        assert sum(values) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("alignment", "diversity"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_unfinished_are_last_whatever_the_answers_are(whiten, alignment, diversity):
    """Answers as bad as can be: opposite to the ground truth, and copies of each other."""
    torch.manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(1, 1, 16), dim=-1)
    bad = -truth[:, None] + 0.01 * torch.randn(1, 5, 1, 16)
    answers = torch.nn.functional.normalize(bad, dim=-1)
    has_answer = torch.tensor([True, False, True, False, True])[None, :, None]
    rewards = rank_unfinished_last(
        feature_matching_rewards(
            answers * has_answer[..., None],
            truth,
            alignment_coef=alignment,
            diversity_coef=diversity,
            use_whitening=whiten,
            whitening_space="feature",
        ),
        has_answer,
    )
    for values in (
        rewards.reward,
        *(compute_advantages(rewards, e) for e in ("rloo", "group_norm")),
    ):
        assert values[~has_answer].max() <= values[has_answer].min()
    # The pairs of the docstring, one by one.
    n = 5
    x = answers[0, :, 0].double() * has_answer[0].double()
    if not whiten:
        for j in range(n):
            pairs = [
                float(x[j] @ x[other]) if has_answer[0, j, 0] and has_answer[0, other, 0] else 1.0
                for other in range(n)
                if other != j
            ]
            expected = 2 * np.mean(pairs)
            assert float(rewards.diversity[0, j, 0]) == pytest.approx(expected, abs=1e-5)


def test_group_without_any_answer_has_no_advantage():
    rewards = feature_matching_rewards(
        torch.zeros(1, 4, 1, 8),
        torch.ones(1, 1, 8),
        alignment_coef=1.0,
        diversity_coef=1.0,
        use_whitening=True,
        whitening_space="feature",
    )
    ranked = rank_unfinished_last(rewards, torch.zeros(1, 4, 1, dtype=torch.bool))
    for estimator in ("rloo", "group_norm"):
        assert torch.equal(compute_advantages(ranked, estimator), torch.zeros(1, 4, 1))


def test_baseline_stays_independent_of_the_completion():
    """Changing completion j, to unfinished too, leaves its baseline as it is (paper, eq. 94)."""
    torch.manual_seed(1)
    truth = torch.nn.functional.normalize(torch.randn(1, 1, 8), dim=-1)
    others = torch.nn.functional.normalize(torch.randn(1, 4, 1, 8), dim=-1)
    others_answer = torch.tensor([True, False, True, True])
    baselines = []
    for own, has_answer in itertools.product(torch.eye(8)[:2], (True, False)):
        answered = torch.cat([torch.tensor([has_answer]), others_answer])[None, :, None]
        features = torch.cat([own[None, None, None], others], dim=1) * answered[..., None]
        rewards = rank_unfinished_last(
            feature_matching_rewards(
                features,
                truth,
                alignment_coef=1.0,
                diversity_coef=1.0,
                use_whitening=False,
                whitening_space="feature",
            ),
            answered,
        )
        advantage = compute_advantages(rewards, "rloo")
        baselines.append(float((rewards.reward - advantage)[0, 0, 0]))
    assert baselines == pytest.approx([baselines[0]] * 4, abs=1e-6)
