"""The CFM loss of texts: continuations, the true ones, and a model that reads them."""

from typing import Any

import datasets
import evaluate
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ebft.evaluation.text_features import embed_continuations, mean_group_metrics

_CITATION = """\
@article{ebft2026,
  title = {Matching Features, Not Tokens: Energy-Based Fine-Tuning of Language Models},
  author = {Jelassi et al.},
  journal = {arXiv:2603.12248},
  year = {2026}
}"""

_DESCRIPTION = """\
The conditional feature-matching loss of continuations that any system wrote: a frozen language
model reads prefix and continuation, and its hidden states are the features."""

_INPUTS = """
Args:
    predictions: for each prefix, its n sampled continuations (texts).
    references: for each prefix, the true continuation.
    prefixes: the prefixes; may be empty texts.
    model_name_or_path: the feature network, the same for all systems that are compared.
    feature_layers, embed_method, normalization: as in training.
    use_whitening, whitening_space, alignment_coef, diversity_coef: see the module `cfm`.

Returns:
    cfm_loss, energy_score, alignment, diversity, reward: means over prefixes. reward_best: mean
    of the best reward of each prefix."""

FEATURE_OPTIONS = ("feature_layers", "embed_method", "normalization")


class CFMText(evaluate.Metric):
    """See `_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("string")),
                    "references": datasets.Value("string"),
                    "prefixes": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        prefixes: Any,
        *,
        model_name_or_path: str,
        **options: Any,
    ) -> dict[str, float]:
        how = {name: options.pop(name) for name in FEATURE_OPTIONS if name in options}
        tokenizer: Any = AutoTokenizer.from_pretrained(model_name_or_path)
        model: Any = AutoModelForCausalLM.from_pretrained(model_name_or_path)

        def features(prefix: str, texts: list[str]) -> torch.Tensor:
            start = tokenizer(prefix)["input_ids"] if prefix else []
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            return embed_continuations(model, start, ids, **how)

        embedded = (
            features(prefix, [*group, truth])
            for group, truth, prefix in zip(predictions, references, prefixes, strict=True)
        )
        return mean_group_metrics(((both[:-1], both[-1]) for both in embedded), **options)
