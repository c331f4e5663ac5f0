"""pass@k from what is known to be right, for `evaluate`."""

from typing import Any

import datasets
import evaluate

from hf_ebft.evaluation.completions import mean_pass_at_k

_CITATION = """\
@article{chen2021evaluating,
  title = {Evaluating Large Language Models Trained on Code},
  author = {Chen, Mark and others},
  journal = {arXiv:2107.03374},
  year = {2021}
}"""

_DESCRIPTION = """\
Probability that at least one of k completions is right, estimated without bias from n >= k
completions of each problem. Nothing is executed here: what is right is the caller's judgement."""

_INPUTS = """
Args:
    predictions: for each problem, n times 1 (right) or 0.
    k: list of sizes, each at most n. Default [1].

Returns:
    pass@k for each k: means over problems."""


class PassAtK(evaluate.Metric):
    """See `_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("bool"))}),
        )

    def _compute(self, predictions: Any, *, k: Any = (1,)) -> dict[str, float]:
        return {f"pass@{size}": mean_pass_at_k(predictions, size) for size in k}
