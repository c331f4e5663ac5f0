"""Looking at policies: figures with intervals, several models side by side, samples, metrics."""

from hf_ebft.evaluation.bootstrap import (
    Interval,
    PairedDifference,
    mean_bootstrap,
    paired_bootstrap,
)
from hf_ebft.evaluation.figures import FIGURES, DocumentFigures, evaluate_documents
from hf_ebft.evaluation.models import ModelFigures, measure_model
from hf_ebft.evaluation.samples import Continuation, sample_continuations
from hf_ebft.evaluation.summary import compare, format_samples, format_table
from hf_ebft.evaluation.table import ModelComparison, compare_models

__all__ = [
    "FIGURES",
    "Continuation",
    "DocumentFigures",
    "Interval",
    "ModelComparison",
    "ModelFigures",
    "PairedDifference",
    "compare",
    "compare_models",
    "evaluate_documents",
    "format_samples",
    "format_table",
    "mean_bootstrap",
    "measure_model",
    "paired_bootstrap",
    "sample_continuations",
]
