"""Metrics of completions: against enumeration, by hand, as modules of `evaluate`, in a run."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_ebft import EBFTTrainer
from hf_ebft.evaluation.callbacks import CompletionMetricsCallback
from hf_ebft.evaluation.completions import (
    CompletionMetrics,
    corpus_bleu,
    exact_match,
    mean_pass_at_k,
    pass_at_k,
)
from hf_ebft.evaluation.modules import MODULES, module_path
from hf_ebft.evaluation.text_features import embed_continuations
from hf_ebft.objective.rewards import feature_matching_rewards
from tests.support.plain_forwards import last_token_embedding, plain_pass
from tests.support.tiny import (
    config,
    logged,
    source_text,
    texts,
    tiny_llama,
    tiny_tokenizer,
    weights_of,
)

# ---- pass@k ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_equals_counting_every_draw(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        expected = sum(map(any, draws)) / len(draws)
        assert pass_at_k(n, correct, k) == pytest.approx(expected)


def test_pass_at_k_is_unbiased() -> None:
    """Over all outcomes of n = 5 independent completions: 1 - (1 - p)^k exactly."""
    p, n, k = 0.3, 5, 2
    mean = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1)
    )
    assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("n", "correct", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_impossible_counts_are_refused(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=rf"pass@{k} with {correct} of {n}"):
        pass_at_k(n, correct, k)


def test_problems_count_alike() -> None:
    assert mean_pass_at_k([[True, True], [False] * 7], 1) == 0.5


# ---- Texts ----------------------------------------------------------------------------------


def test_exact_match_forgives_white_space_at_the_ends() -> None:
    assert exact_match(["a b", " c\n", "d"], ["a b", "c", "D"]) == pytest.approx(2 / 3)


def test_bleu_by_hand() -> None:
    """1-grams 5 of 6 (`the` is clipped to what the reference has), 2-grams 3 of 5, length equal."""
    pytest.importorskip("sacrebleu")
    prediction, reference = "the cat sat on the mat", "the cat sat on a mat"
    expected = 100 * math.sqrt(5 / 6 * 3 / 5)
    assert corpus_bleu([prediction], [reference], max_order=2) == pytest.approx(expected)
    short = corpus_bleu(["the cat"], ["the cat sat on a mat"], max_order=2)
    assert short == pytest.approx(100 * math.exp(1 - 6 / 2))
    assert corpus_bleu([reference], [reference]) == pytest.approx(100.0)
    assert corpus_bleu(["nothing like it here"], [reference]) == 0.0


def test_bleu_pools_counts_over_the_corpus() -> None:
    """Not a mean over sentences: 4 of 6 words and 2 of 4 pairs match."""
    pytest.importorskip("sacrebleu")
    found = corpus_bleu(["a b c", "x y z"], ["a b c", "x q r"], max_order=2)
    assert found == pytest.approx(100 * math.sqrt(4 / 6 * 2 / 4))


def test_completions_of_a_prompt_share_its_ground_truth() -> None:
    seen: list[Any] = []

    def several(predictions: list[str], references: list[str]) -> dict[str, Any]:
        seen.append((predictions, references))
        return {"words": 2, "share": np.float64(0.5), "detail": [1, 2]}

    metrics = CompletionMetrics(
        {"exact": exact_match, "own": several}, checker=lambda text, truth: text == truth, k=(1, 2)
    )
    found = metrics.compute([["a", "b"], ["x", "c"]], ["a", "c"])
    assert found == {
        "exact": 0.5,
        "own_words": 2.0,
        "own_share": 0.5,
        "pass@1": 0.5,
        "pass@2": 1.0,
    }
    assert seen == [(["a", "b", "x", "c"], ["a", "a", "c", "c"])]


@pytest.mark.parametrize(
    ("completions", "truths", "message"),
    [
        ([["a"]], ["a", "b"], "1 groups of completions and 2 ground truths"),
        ([], [], "at least one"),
        (["text"], ["a"], "list of at least one completion"),
        ([[]], ["a"], "list of at least one completion"),
    ],
)
def test_groups_that_do_not_fit_are_refused(completions: Any, truths: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompletionMetrics({"exact": exact_match}).compute(completions, truths)


def test_metrics_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to compute"):
        CompletionMetrics()
    with pytest.raises(ValueError, match=r"k=\[0\]"):
        CompletionMetrics({"exact": exact_match}, k=(0,))
    with pytest.raises(ValueError, match="gave no number"):
        CompletionMetrics({"x": lambda p, r: {"all": p}}).compute([["a"]], ["a"])


# ---- Modules of evaluate ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`evaluate.load` on the shipped folders, with its caches in a temporary one."""
    evaluate = pytest.importorskip("evaluate")
    from evaluate import config as settings

    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.syspath_prepend(str(folder / "modules"))
        yield lambda name: evaluate.load(module_path(name), cache_dir=str(folder / "cache"))


def test_cfm_module_equals_the_rewards(load: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, generator=generator) for shape in ((3, 4, 6), (3, 6)))
    x, y = (torch.nn.functional.normalize(z, dim=-1) for z in (x, y))
    expected = feature_matching_rewards(x.transpose(0, 1)[None], y[None], use_whitening=False)
    found = load("cfm").compute(predictions=x.tolist(), references=y.tolist())
    assert found["cfm_loss"] == pytest.approx(float(expected.cfm_loss.mean()), rel=1e-5)
    assert found["alignment"] == pytest.approx(float(expected.alignment.mean()), rel=1e-5)
    energy_score = float(expected.energy_score.mean())
    assert found["energy_score"] == pytest.approx(energy_score, rel=1e-5)
    assert found["reward_best"] == pytest.approx(float(expected.reward.amax(1).mean()), rel=1e-5)
    white = load("cfm").compute(
        predictions=x.tolist(), references=y.tolist(), use_whitening=True, whitening_space="sample"
    )
    assert white["diversity"] == pytest.approx(0.0, abs=1e-5)
    assert white["cfm_loss"] == found["cfm_loss"]


def test_pass_at_k_module(load: Any) -> None:
    correct = [[True, False, False], [False, False, False]]
    found = load("pass_at_k").compute(predictions=correct, k=[1, 2])
    assert found == pytest.approx({"pass@1": 1 / 6, "pass@2": 1 / 3})


def test_cfm_of_texts(load: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_llama(vocabulary=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = load("cfm_text").compute(
        predictions=[["return 1", "x = 2 + y"], ["a", "b"]],
        references=["return x", "a"],
        prefixes=["def f(x):\n    ", ""],
        model_name_or_path=str(tmp_path),
        feature_layers=[0.5, 1.0],
    )
    model = tiny_llama(vocabulary=len(tokenizer)).eval()
    losses = []
    for prefix, group, truth in (
        ("def f(x):\n    ", ["return 1", "x = 2 + y"], "return x"),
        ("", ["a", "b"], "a"),
    ):
        ids = [tokenizer(prefix)["input_ids"] + tokenizer(t)["input_ids"] for t in [*group, truth]]
        states = [model(torch.tensor([i]), output_hidden_states=True).hidden_states for i in ids]
        a, b, y = (last_token_embedding(list(state), [1, 2])[0].detach() for state in states)
        losses.append(float((a - y) @ (b - y)))
    assert found["cfm_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_every_module_is_where_its_path_says() -> None:
    for name in MODULES:
        assert (Path(module_path(name)) / f"{name}.py").is_file()
    with pytest.raises(ValueError, match=r"no module 'bleu'.*'cfm', 'cfm_text', 'pass_at_k'"):
        module_path("bleu")


@pytest.mark.parametrize("embed_method", ["last_token", "mean_pooling", "concat"])
def test_continuations_are_embedded_as_in_training(embed_method: Any) -> None:
    model, prefix, own = tiny_llama().eval(), [3, 1, 4, 1], torch.tensor([[5, 9, 2, 6, 5]])
    hidden = plain_pass(model, prefix, own, hidden=True).hidden
    units = [
        torch.nn.functional.normalize(hidden[layer][0].float(), dim=-1) / math.sqrt(2)
        for layer in (1, 2)
    ]
    tokens = torch.cat(units, dim=-1)  # (5, D)
    expected = {
        "last_token": tokens[-1],
        "mean_pooling": tokens.mean(0),
        "concat": tokens[[1, 2, 3]].flatten() / math.sqrt(3),
    }[embed_method]
    found = embed_continuations(
        model, prefix, own.tolist(), feature_layers=[0.5, 1.0], embed_method=embed_method
    )
    torch.testing.assert_close(found[0], expected)
    with pytest.raises(ValueError, match="empty continuation"):
        embed_continuations(model, prefix, [[1], []])


# ---- In a run ---------------------------------------------------------------------------------


def make_trainer(folder: Path, **settings: Any) -> EBFTTrainer:
    tokenizer = tiny_tokenizer(pad_token="<pad>")
    values = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    return EBFTTrainer(
        tiny_llama(vocabulary=len(tokenizer)),
        config(folder, **(values | settings)),
        train_dataset=texts(21, 18, 30, 14),
        eval_dataset=texts(12, 13),
        processing_class=tokenizer,
    )


PROMPTS = ["def f(", "import ", "class Text:\n    x", source_text()[0][:30]]


def watch(trainer: EBFTTrainer, **changed: Any) -> CompletionMetricsCallback:
    seen = CompletionMetrics(
        {"exact": exact_match}, checker=lambda text, truth: "e" in text, k=(1,)
    )
    callback = CompletionMetricsCallback(
        trainer, seen, PROMPTS, ["x"] * len(PROMPTS), **({"max_new_tokens": 4} | changed)
    )
    trainer.add_callback(callback)
    return callback


def test_completions_are_scored_at_each_evaluation(tmp_path: Path) -> None:
    trainer, plain = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b")
    callback = watch(trainer, n_samples=2, temperature=1.0, batch_size=3)
    for each in (trainer, plain):
        each.train()
    assert len(logged(trainer, "eval_completions/pass@1")) == 2
    assert all(len(group) == 2 for group in callback.completions)
    # Training goes on as if nobody had looked.
    for name, weight in weights_of(plain.model).items():
        assert torch.equal(weight, weights_of(trainer.model)[name])
    assert "eval_completions/exact" in trainer.evaluate()


def test_greedy_completions_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    """Left padding must not show."""
    trainer = make_trainer(tmp_path)
    together = watch(trainer, batch_size=4).generate()
    assert together == watch(trainer, batch_size=1).generate()
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    ids = tokenizer(PROMPTS[0])["input_ids"]
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert together[0] == [tokenizer.decode(ids[-4:], skip_special_tokens=True)]


def test_sampled_completions_repeat(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    callback = watch(trainer, n_samples=3, temperature=1.0)
    first = callback.generate()
    assert callback.generate() == first
    assert len({text for group in first for text in group}) > len(PROMPTS)
    assert watch(trainer, n_samples=3, temperature=1.0, seed=1).generate() != first


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_samples": 2}, "temperature=0.0 with n_samples=2"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        watch(make_trainer(tmp_path), **changed)
