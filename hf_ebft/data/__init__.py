"""Datasets and collators."""

from hf_ebft.data.collator import EBFTDataCollator

__all__ = ["EBFTDataCollator"]
