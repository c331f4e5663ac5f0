"""Metrics of whole completions: exact match, BLEU, pass@k, and any metric of `evaluate`.

Nothing here needs a trainer or a model: completions and ground truths are texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

#: (predictions, references) -> a number, or several by name.
MetricFunction = Callable[[list[str], list[str]], float | Mapping[str, float]]
#: (completion, ground truth) -> whether the completion is correct.
Checker = Callable[[str, str], bool]


class ComputesMetrics(Protocol):
    """The type of objects that `evaluate.load` and `evaluate.combine` return."""

    def compute(self, *, predictions: Any, references: Any) -> dict[str, Any] | None:
        """Metrics by name."""
        ...


class CompletionMetrics:
    """Several metrics of n completions for each prompt, in one call.

    For example, for translation and for code:

        CompletionMetrics({"exact": exact_match, "bleu": corpus_bleu})
        CompletionMetrics({"chrf": evaluate.load("chrf")})
        CompletionMetrics(checker=passes_its_tests, k=(1, 10))

    Args:
        metrics: name -> a function of (predictions, references), or a module of `evaluate`. Each
            gets all n completions of every prompt, each with the prompt's ground truth, so that a
            mean over examples is a mean over samples. Results that are not plain numbers (lists,
            texts) are left out.
        checker: decides whether a completion with its ground truth is correct, for `pass@k`. It
            runs in this process: a checker that executes code must isolate it itself.
        k: sizes for `pass@k`, each at most n.

    Raises:
        ValueError: nothing to compute, or a k below 1.
    """

    def __init__(
        self,
        metrics: Mapping[str, MetricFunction | ComputesMetrics] | None = None,
        *,
        checker: Checker | None = None,
        k: Sequence[int] = (1,),
    ) -> None:
        self.metrics = dict(metrics or {})
        self.checker = checker
        self.k = tuple(k)
        if not self.metrics and checker is None:
            raise ValueError(
                "There is nothing to compute: pass metrics, such as {'exact': exact_match}, or a "
                "checker."
            )
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k={list(k)} must hold whole numbers of at least 1, such as [1, 4].")

    def compute(
        self, completions: Sequence[Sequence[str]], ground_truths: Sequence[str]
    ) -> dict[str, float]:
        """Compute all metrics.

        Args:
            completions: for each prompt, its n completions.
            ground_truths: one for each prompt.

        Returns:
            Numbers by name: a metric's own name for a single number, `name_key` for several;
            `pass@k` for each k.

        Raises:
            ValueError: there are no prompts, lengths differ, a prompt has no completions, or fewer
                than a k.
        """
        if not completions or len(completions) != len(ground_truths):
            raise ValueError(
                f"{len(completions)} groups of completions and {len(ground_truths)} ground truths: "
                "there must be one group for each ground truth, and at least one."
            )
        if any(isinstance(group, str) or not group for group in completions):
            raise ValueError(
                "Each prompt needs a list of at least one completion; write [text] for one."
            )
        predictions = [text for group in completions for text in group]
        references = [
            truth for group, truth in zip(completions, ground_truths, strict=True) for _ in group
        ]
        found: dict[str, float] = {}
        for name, metric in self.metrics.items():
            found |= _numbers(name, _apply(metric, predictions, references))
        if self.checker is not None:
            checker = self.checker
            correct = [
                [bool(checker(text, truth)) for text in group]
                for group, truth in zip(completions, ground_truths, strict=True)
            ]
            found |= {f"pass@{k}": mean_pass_at_k(correct, k) for k in self.k}
        return found


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference, ignoring white space at the ends."""
    _check_pairs(predictions, references)
    hits = [p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)]
    return sum(hits) / len(hits)


def corpus_bleu(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    tokenize: str = "13a",
    max_order: int = 4,
) -> float:
    """BLEU of a corpus (Papineni et al., 2002) as sacreBLEU computes it, from 0 to 100.

    Args:
        predictions, references: texts, one reference each.
        tokenize: sacreBLEU's tokenizer: "13a" as in published results, "none" for white space,
            "zh", "ja-mecab", "flores200" and others for languages without spaces.
        max_order: longest n-gram.

    Raises:
        ImportError: sacrebleu is not installed.
        ValueError: the numbers of references and predictions differ, or are 0.
    """
    _check_pairs(predictions, references)
    try:
        from sacrebleu.metrics import BLEU  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError("corpus_bleu needs sacreBLEU: pip install sacrebleu.") from error
    bleu = BLEU(tokenize=tokenize, max_ngram_order=max_order)
    return float(bleu.corpus_score(list(predictions), [list(references)]).score)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of n completions, drawn without replacement, contain a correct one.

    1 - C(n - c, k) / C(n, k) is an unbiased estimate of the probability that k new completions
    contain a correct one (Chen et al., "Evaluating large language models trained on code", 2021).

    Args:
        n: number of completions of the problem.
        correct: c, the number of correct ones.
        k: number of draws.

    Raises:
        ValueError: the numbers do not fit each other.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} with {correct} of {n} right cannot be estimated: it needs 0 <= right <= n "
            "and 1 <= k <= n; sample at least k completions for each prompt."
        )
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def mean_pass_at_k(correct: Iterable[Sequence[bool]], k: int) -> float:
    """Mean of `pass_at_k` over problems.

    Args:
        correct: for each problem, whether each of its completions is correct.
        k: number of draws.
    """
    estimates = [pass_at_k(len(group), sum(map(bool, group)), k) for group in correct]
    if not estimates:
        raise ValueError(f"pass@{k} needs at least one problem.")
    return sum(estimates) / len(estimates)


def _apply(
    metric: MetricFunction | ComputesMetrics, predictions: list[str], references: list[str]
) -> Any:
    if hasattr(metric, "compute"):
        return metric.compute(predictions=predictions, references=references)
    return metric(predictions, references)


def _numbers(name: str, result: Any) -> dict[str, float]:
    """A number under the metric's name, or the numbers of a mapping under name_key."""
    if not isinstance(result, Mapping):
        return {name: float(result)}
    numbers = {
        key: float(value)
        for key, value in result.items()
        if isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    }
    if not numbers:
        raise ValueError(f"The metric {name!r} gave no number, only {sorted(result)}.")
    if len(numbers) == 1:
        return {name: next(iter(numbers.values()))}
    return {f"{name}_{key}": value for key, value in numbers.items()}


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: there must be "
            "equally many, and at least one."
        )
