"""Paired comparison of two policies on held-out text."""

from hf_ebft.evaluation.bootstrap import PairedDifference, paired_bootstrap
from hf_ebft.evaluation.figures import FIGURES, DocumentFigures, evaluate_documents
from hf_ebft.evaluation.samples import Continuation, sample_continuations
from hf_ebft.evaluation.summary import compare, format_samples, format_table

__all__ = [
    "FIGURES",
    "Continuation",
    "DocumentFigures",
    "PairedDifference",
    "compare",
    "evaluate_documents",
    "format_samples",
    "format_table",
    "paired_bootstrap",
    "sample_continuations",
]
