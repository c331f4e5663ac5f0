"""Raw text, tokenized rows and batches."""

from hf_ebft.data.collator import EBFTDataCollator
from hf_ebft.data.sources import RawDataset, hold_out, load_text_dataset
from hf_ebft.data.tokenization import (
    TokenizationCounts,
    TokenizedRows,
    tokenize_and_cut,
    tokenize_prompt_completion,
)

__all__ = [
    "EBFTDataCollator",
    "RawDataset",
    "TokenizationCounts",
    "TokenizedRows",
    "hold_out",
    "load_text_dataset",
    "tokenize_and_cut",
    "tokenize_prompt_completion",
]
