"""Raw text, prompts with ground truths, tokenized rows and batches."""

from hf_ebft.data.collator import EBFTDataCollator
from hf_ebft.data.mixing import mix
from hf_ebft.data.sources import (
    RawDataset,
    Table,
    hold_out,
    load_table,
    load_text_dataset,
    open_stream,
)
from hf_ebft.data.special_tokens import encode_text
from hf_ebft.data.thinking import answer_start, join_thinking, split_thinking
from hf_ebft.data.tokenization import (
    TokenizationCounts,
    TokenizedRows,
    prompt_completion,
    raw_text,
    render_prompt,
    tokenize_and_cut,
    tokenize_prompt_completion,
)
from hf_ebft.data.transforms import (
    LANGUAGES,
    TRANSFORMS,
    TRANSLATION_PROMPT,
    BadRowError,
    NoRowsError,
    chat,
    question_answer,
    reasoning,
    transform_rows,
    translation,
)

__all__ = [
    "LANGUAGES",
    "TRANSFORMS",
    "TRANSLATION_PROMPT",
    "BadRowError",
    "EBFTDataCollator",
    "NoRowsError",
    "RawDataset",
    "Table",
    "TokenizationCounts",
    "TokenizedRows",
    "answer_start",
    "chat",
    "encode_text",
    "hold_out",
    "join_thinking",
    "load_table",
    "load_text_dataset",
    "mix",
    "open_stream",
    "prompt_completion",
    "question_answer",
    "raw_text",
    "reasoning",
    "render_prompt",
    "split_thinking",
    "tokenize_and_cut",
    "tokenize_prompt_completion",
    "transform_rows",
    "translation",
]
