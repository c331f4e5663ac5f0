"""Conditional feature-matching (CFM) loss, alignment and diversity of features, for `evaluate`."""

from typing import Any

import datasets
import evaluate
import torch

from hf_ebft.evaluation.text_features import mean_group_metrics

_CITATION = """\
@article{ebft2026,
  title = {Matching Features, Not Tokens: Energy-Based Fine-Tuning of Language Models},
  author = {Jelassi et al.},
  journal = {arXiv:2603.12248},
  year = {2026}
}"""

_DESCRIPTION = """\
How far the mean feature of sampled continuations is from that of the true one:
||E[phi(rollout)] - phi(ground truth)||^2, estimated without bias from n >= 2 rollouts of a prefix,
with the two terms that its gradient consists of."""

_INPUTS = """
Args:
    predictions: for each prefix, the features of its n rollouts, n lists of D numbers.
    references: for each prefix, the feature of its ground truth, D numbers.
    use_whitening: whiten each group by its own rollouts for alignment, diversity and reward.
        Default False. The CFM loss is never whitened.
    whitening_space: 'feature' or 'sample'.
    alignment_coef, diversity_coef: of the reward.

Returns:
    cfm_loss, energy_score, alignment, diversity, reward: means over prefixes. reward_best: mean
    of the best reward of each prefix."""


class CFM(evaluate.Metric):
    """See `_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
                    "references": datasets.Sequence(datasets.Value("float32")),
                }
            ),
        )

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        groups = (
            (torch.tensor(group, dtype=torch.float32), torch.tensor(truth, dtype=torch.float32))
            for group, truth in zip(predictions, references, strict=True)
        )
        return mean_group_metrics(groups, **options)
