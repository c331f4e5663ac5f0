"""Evaluation of policies: measurements with intervals, comparison of models, samples."""

from hf_ebft.evaluation.bootstrap import (
    Interval,
    PairedDifference,
    mean_bootstrap,
    paired_bootstrap,
)
from hf_ebft.evaluation.completions import (
    CompletionMetrics,
    corpus_bleu,
    exact_match,
    pass_at_k,
)
from hf_ebft.evaluation.documents import DOCUMENT_METRICS, DocumentMeasurements, evaluate_documents
from hf_ebft.evaluation.models import ModelMeasurements, measure_model
from hf_ebft.evaluation.samples import (
    Continuation,
    RolloutGroup,
    sample_continuations,
    sample_groups,
)
from hf_ebft.evaluation.summary import compare, format_samples, format_table
from hf_ebft.evaluation.table import ModelComparison, compare_models

__all__ = [
    "DOCUMENT_METRICS",
    "CompletionMetrics",
    "Continuation",
    "DocumentMeasurements",
    "Interval",
    "ModelComparison",
    "ModelMeasurements",
    "PairedDifference",
    "RolloutGroup",
    "compare",
    "compare_models",
    "corpus_bleu",
    "evaluate_documents",
    "exact_match",
    "format_samples",
    "format_table",
    "mean_bootstrap",
    "measure_model",
    "paired_bootstrap",
    "pass_at_k",
    "sample_continuations",
    "sample_groups",
]
