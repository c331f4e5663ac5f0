"""Tokenizes raw text into rows of token ids, and counts everything that is cut or left out.

A *document* is a text as it was read. It is cut into *pieces* of at most `sequence_len` tokens. A
*row* is one piece or, with packing, several.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hf_ebft.data.special_tokens import Endings, added_bos, endings_of, without_bos
from hf_ebft.data.transforms import BadRowError, NoRowsError
from hf_ebft.data.unicode import fault_of, require_unicode
from hf_ebft.rows.documents import DOCUMENT_COLUMNS, IGNORE_INDEX

logger = logging.getLogger(__name__)

# Number of texts per call of the tokenizer: enough for its threads, few enough to stop early.
BATCH = 256


@dataclass
class TokenizationCounts:
    """Numbers of texts that were read, cut and left out, and of rows.

    Attributes:
        documents: number of texts, or prompt/completion pairs, that were read.
        empty: number of these without tokens (of pairs, without completion tokens).
        cut: number of these that were longer than a row. A text continues in the next row; a
            completion is cut off.
        short: number of pieces (or pairs) without room for a block.
        short_tokens: number of their tokens.
        kept_short: whether short pieces were kept, to train on their cross-entropy only.
        rows: number of rows.
        tokens: number of tokens in the rows.
        stopped_early: whether reading stopped because there were `max_rows` rows.
    """

    documents: int = 0
    empty: int = 0
    cut: int = 0
    short: int = 0
    short_tokens: int = 0
    kept_short: bool = False
    rows: int = 0
    tokens: int = 0
    stopped_early: bool = False

    def __str__(self) -> str:
        parts = [f"{self.documents} documents -> {self.rows} rows, {self.tokens} tokens"]
        if self.cut:
            parts.append(f"{self.cut} documents longer than a row")
        if self.short:
            action = "kept for cross-entropy only" if self.kept_short else "dropped"
            parts.append(
                f"{self.short} pieces too short for a block {action} ({self.short_tokens} tokens)"
            )
        if self.empty:
            parts.append(f"{self.empty} empty documents skipped")
        if self.stopped_early:
            parts.append("stopped at the largest number of rows")
        return "; ".join(parts)


class TokenizedRows(Dataset[dict[str, Tensor]]):
    """Rows as a map-style dataset of int64 tensors of shape (tokens,).

    Attributes:
        sources: for each row, the index of the source document of each of its documents.
        counts: counts of the text that the rows were made from.
    """

    def __init__(
        self,
        rows: list[dict[str, NDArray[np.int32]]],
        sources: list[tuple[int, ...]],
        counts: TokenizationCounts,
    ) -> None:
        self._rows = rows
        self.sources = sources
        self.counts = counts

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # Stored in 4 bytes per token, returned in the 8 that embeddings and losses need.
        return {name: torch.from_numpy(ids).long() for name, ids in self._rows[index].items()}

    def spread(self, count: int, seed: int = 0) -> TokenizedRows:
        """At most `count` of the rows, from as many sources as possible and otherwise at random.

        Rows of one source resemble each other, so rows of many sources represent the text better.

        Args:
            count: number of rows, at least 1.
            seed: seed of the random choice.

        Raises:
            ValueError: `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"count={count} must be at least 1; leave it out to take all rows.")
        taken: Counter[int] = Counter()
        ranked: list[tuple[int, int, int]] = []
        for row in np.random.default_rng(seed).permutation(len(self)).tolist():
            # The rank is the number of earlier rows of the same source, so each source has one row
            # of rank 0.
            ranked.append((taken[self.sources[row][0]], len(ranked), row))
            taken[self.sources[row][0]] += 1
        chosen = sorted(row for _, _, row in sorted(ranked)[:count])
        return TokenizedRows(
            [self._rows[row] for row in chosen], [self.sources[row] for row in chosen], self.counts
        )


def tokenize_and_cut(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    sequence_len: int,
    min_length: int,
    pack: bool = False,
    keep_short: bool = False,
    max_rows: int | None = None,
) -> TokenizedRows:
    """Tokenize raw text and cut it into rows of at most `sequence_len` tokens.

    Every document ends with the tokenizer's EOS token, if it has one, and is cut when a row is
    full. A document that ends like a reply in the chat template keeps that end and gets no EOS.
    Each piece begins with the BOS token if the tokenizer adds one. Documents are read only until
    there are enough rows.

    Args:
        documents: raw texts.
        tokenizer: a transformers tokenizer.
        sequence_len: largest number of tokens of a row.
        min_length: number of tokens that one block needs, `context_length + generate_max_len`;
            shorter pieces are dropped.
        pack: pack pieces that do not fill a row into one row, with a `document_ids` column. A piece
            goes to the fullest row that has room for it.
        keep_short: keep pieces below `min_length`, to train on their cross-entropy only.
        max_rows: largest number of rows. Default: read everything.

    Raises:
        ValueError: the lengths do not fit each other, or there is no row.
    """
    rows = _cut(documents, tokenizer, sequence_len, min_length, pack, keep_short, max_rows)
    return _require_rows(rows)


def raw_text(
    batch: Mapping[str, Sequence[Any]],
    *,
    tokenizer: Any,
    text_column: str = "text",
    sequence_len: int = 512,
    min_length: int = 16,
    keep_short: bool = False,
) -> dict[str, list[list[int]]]:
    """`tokenize_and_cut` for `dataset.map`: rows of strided mode from columns of raw text.

        dataset.map(raw_text, batched=True, remove_columns=dataset.column_names,
                    fn_kwargs={"tokenizer": tokenizer})

    A long text gives several rows. The log says how much is left out.

    Args:
        batch: columns of several rows.
        tokenizer: a transformers tokenizer.
        text_column: the column with the texts.
        sequence_len: largest number of tokens of a row.
        min_length: number of tokens that one block needs, `context_length + generate_max_len`;
            shorter pieces are dropped.
        keep_short: keep pieces below `min_length`, to train on their cross-entropy only.

    Returns:
        `input_ids`, one list for each row.

    Raises:
        ValueError: the column does not exist, the call is not batched, or a value is not text.
    """
    if text_column not in batch:
        raise ValueError(f"There is no column {text_column!r}, only {', '.join(map(repr, batch))}.")
    texts = batch[text_column]
    if isinstance(texts, str):
        raise ValueError(
            "raw_text makes several rows of one text, so it needs a batch; call dataset.map with "
            "batched=True."
        )
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"Column {text_column!r} contains a {type(text).__name__} in row {number} of the "
                "batch, not text; choose another text_column, or convert its values to text first."
            )
        require_unicode(text, f"Column {text_column!r}, row {number} of the batch,")
    rows = _cut(texts, tokenizer, sequence_len, min_length, False, keep_short, None)
    if rows.counts.short or rows.counts.empty:
        logger.info("%s", rows.counts)
    return {"input_ids": [rows[number]["input_ids"].tolist() for number in range(len(rows))]}


def _cut(
    documents: Iterable[str],
    tokenizer: Any,
    sequence_len: int,
    min_length: int,
    pack: bool,
    keep_short: bool,
    max_rows: int | None,
) -> TokenizedRows:
    """`tokenize_and_cut`, without an error if there is no row."""
    _check_lengths(sequence_len, min_length, max_rows)
    counts = TokenizationCounts(kept_short=keep_short)
    prefix = added_bos(tokenizer)
    endings = endings_of(tokenizer)
    room = sequence_len - len(prefix)
    if room < 1:
        raise ValueError(
            f"sequence_len={sequence_len} has no room for text after the BOS token; raise it."
        )
    rows = _Rows(sequence_len, pack, max_rows)
    for source, (ids, end) in enumerate(_encode_documents(documents, tokenizer, endings)):
        counts.documents += 1
        ids = without_bos(ids, prefix)
        if not ids:
            counts.empty += 1
            continue
        ids = ids + end
        counts.cut += len(ids) > room
        for start in range(0, len(ids), room):
            piece = [*prefix, *without_bos(ids[start : start + room], prefix)]
            if len(piece) < min_length:
                counts.short += 1
                counts.short_tokens += len(piece)
                if not keep_short:
                    continue
            if not rows.add(piece, source):
                counts.stopped_early = True
                break
        if counts.stopped_early:
            break
    return _finish(rows.columns(), rows.sources, counts)


def tokenize_prompt_completion(
    pairs: Iterable[tuple[str, str]],
    tokenizer: Any,
    *,
    sequence_len: int,
    min_length: int,
    min_completion: int,
    keep_short: bool = False,
    max_rows: int | None = None,
) -> TokenizedRows:
    """Tokenize prompts with completions into rows whose `labels` are -100 on the prompt.

    The two texts are tokenized separately, so that no token spans the boundary. The prompt begins
    with the BOS token if the tokenizer adds one. The completion ends with EOS, or, after a prompt
    that the chat template has rendered, with the template's end of a reply. A completion that does
    not fit is cut, and then has no end.

    Args:
        pairs: prompts with their completions.
        tokenizer: a transformers tokenizer with an EOS token.
        sequence_len: largest number of tokens of a row.
        min_length: number of tokens that one block needs, `context_length + generate_max_len`.
        min_completion: number of completion tokens that one block needs, `min_completion_prefix +
            generate_max_len`. Examples with fewer, for example because the prompt fills the row,
            are dropped.
        keep_short: keep these examples (if they have any completion token), to train on their
            cross-entropy only.
        max_rows: largest number of rows. Default: read everything.

    Raises:
        ValueError: the lengths do not fit each other, the tokenizer has no EOS, or there is no row.
    """
    _check_lengths(sequence_len, max(min_length, min_completion), max_rows)
    _require_eos(tokenizer)
    counts = TokenizationCounts(kept_short=keep_short)
    prefix = added_bos(tokenizer)
    rows: list[dict[str, NDArray[np.int32]]] = []
    sources: list[tuple[int, ...]] = []
    endings = endings_of(tokenizer)
    for source, (prompt, completion, end) in enumerate(_encode_pairs(pairs, tokenizer, endings)):
        if max_rows is not None and len(rows) == max_rows:
            counts.stopped_early = True
            break
        counts.documents += 1
        if not completion:
            counts.empty += 1
            continue
        prompt = without_bos(prompt, prefix)
        whole = [*prefix, *prompt, *completion, *end]
        counts.cut += len(whole) > sequence_len
        input_ids = np.array(whole[:sequence_len], dtype=np.int32)
        completion_start = len(prefix) + len(prompt)
        n_completion = len(input_ids) - completion_start
        if len(input_ids) < min_length or n_completion < min_completion:
            counts.short += 1
            counts.short_tokens += len(input_ids)
            if not keep_short or n_completion < 1:
                continue
        labels = input_ids.copy()
        labels[:completion_start] = IGNORE_INDEX
        rows.append({"input_ids": input_ids, "labels": labels})
        sources.append((source,))
    return _require_rows(_finish(rows, sources, counts))


def prompt_completion(
    row: Mapping[str, Any],
    index: int | None = None,
    *,
    tokenizer: Any,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    sequence_len: int = 512,
    min_completion: int = 8,
) -> dict[str, list[int]]:
    """`tokenize_prompt_completion` for `dataset.map`, one row at a time.

    A prompt may also be a list of chat messages. The tokenizer's chat template renders them with a
    generation prompt, and the row ends with the template's end of a reply. `labels` are -100 on the
    prompt, so that strided mode has blocks in the completion only. A completion that does not fit
    is cut at its end.

    Args:
        row: one row.
        index: number of the row, for messages (`with_indices=True`).
        tokenizer: a transformers tokenizer with an EOS token.
        prompt_column: column with the prompt, text or messages.
        completion_column: column with the completion, text.
        sequence_len: largest number of tokens of a row.
        min_completion: number of completion tokens that one block needs, `min_completion_prefix +
            generate_max_len`.

    Returns:
        `input_ids` and `labels`.

    Raises:
        ValueError: a column is missing, or the tokenizer has no EOS or no chat template.
        BadRowError: a value is not text, or the completion is empty, or too little of it fits.
            `transform_rows` can leave out such rows.
    """
    _require_eos(tokenizer)
    where = "A row" if index is None else f"Row {index}"
    for column in (prompt_column, completion_column):
        if column not in row:
            raise ValueError(
                f"{where} has no column {column!r}; it has {', '.join(map(repr, row))}."
            )
    completion = row[completion_column]
    if not isinstance(completion, str) or not completion:
        raise BadRowError(f"{where}: column {completion_column!r} contains no text.")
    prompt = render_prompt(row[prompt_column], tokenizer, f"{where}: column {prompt_column!r}")
    for column, text in ((prompt_column, prompt), (completion_column, completion)):
        if (fault := fault_of(text)) is not None:
            raise BadRowError(f"{where}: column {column!r} {fault}")
    completion, end = endings_of(tokenizer).of_completion(
        prompt, completion, chat=not isinstance(row[prompt_column], str)
    )
    prompt_ids, completion_ids = _encode([prompt, completion], tokenizer)
    bos = added_bos(tokenizer)
    prompt_ids = [*bos, *without_bos(prompt_ids, bos)]
    start = len(prompt_ids)
    whole = [*prompt_ids, *completion_ids, *end]
    input_ids = whole[:sequence_len]
    n_completion = max(0, len(input_ids) - start)
    if n_completion < min_completion:
        raise BadRowError(
            f"{where}: {n_completion} of {len(whole) - start} completion tokens fit into "
            f"sequence_len={sequence_len} after {start} prompt tokens, fewer than the "
            f"{min_completion} that a block needs. Raise sequence_len, or leave the row out."
        )
    return {"input_ids": input_ids, "labels": [IGNORE_INDEX] * start + input_ids[start:]}


def render_prompt(prompt: Any, tokenizer: Any, where: str) -> str:
    """Render a prompt as text, without the BOS token that the tokenizer adds.

    Args:
        prompt: text, or chat messages.
        tokenizer: the tokenizer, whose chat template renders messages.
        where: name of the prompt, for errors.

    Raises:
        ValueError: the prompt is a list of messages, but there is no chat template.
        BadRowError: the prompt is neither text nor messages.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise BadRowError(f"{where} contains a {type(prompt).__name__}, not text or messages.")
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where} contains chat messages, but the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give the prompts as text."
        )
    text: str = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if added_bos(tokenizer) else text


class _Rows:
    """Rows under construction; with packing, each piece goes to the fullest row that has room."""

    def __init__(self, sequence_len: int, pack: bool, max_rows: int | None) -> None:
        self._sequence_len = sequence_len
        self._pack = pack
        self._max_rows = max_rows
        self._pieces: list[list[NDArray[np.int32]]] = []
        # space left -> rows with exactly that much of it
        self._by_space: list[list[int]] = [[] for _ in range(sequence_len + 1)]
        self.sources: list[tuple[int, ...]] = []

    def add(self, ids: list[int], source: int) -> bool:
        """Add a piece to a row; False if that would exceed the largest number of rows."""
        row = self._row_with_space(len(ids)) if self._pack else None
        if row is None:
            if self._max_rows is not None and len(self._pieces) == self._max_rows:
                return False
            row = len(self._pieces)
            self._pieces.append([])
            self.sources.append(())
        self._pieces[row].append(np.array(ids, dtype=np.int32))
        self.sources[row] += (source,)
        space = self._sequence_len - sum(map(len, self._pieces[row]))
        if self._pack and space:
            self._by_space[space].append(row)
        return True

    def _row_with_space(self, length: int) -> int | None:
        for rows in self._by_space[length:]:
            if rows:
                return rows.pop()
        return None

    def columns(self) -> list[dict[str, NDArray[np.int32]]]:
        """The rows, with `document_ids` if they are packed."""
        rows = []
        for pieces in self._pieces:
            row = {"input_ids": np.concatenate(pieces)}
            if self._pack:
                lengths = [len(piece) for piece in pieces]
                row[DOCUMENT_COLUMNS[0]] = np.repeat(
                    np.arange(len(pieces), dtype=np.int32), lengths
                )
            rows.append(row)
        return rows


def _check_lengths(sequence_len: int, needed: int, max_rows: int | None) -> None:
    if sequence_len < needed:
        raise ValueError(
            f"sequence_len={sequence_len} is shorter than the {needed} tokens that one block needs "
            "(context_length or min_completion_prefix, plus generate_max_len); raise sequence_len "
            "or lower these settings."
        )
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1; leave it out to take all rows.")


def _require_eos(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so completions would have no end; set "
            "tokenizer.eos_token."
        )


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    # verbose=False: no warning for texts longer than the model's context, which are cut later.
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids
    return ids


def _encode_documents(
    documents: Iterable[str], tokenizer: Any, endings: Endings
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of each document and of its end."""
    documents = (
        require_unicode(text, f"Document {number}") for number, text in enumerate(documents)
    )
    while batch := list(islice(documents, BATCH)):
        texts, ends = zip(*map(endings.of_document, batch), strict=True)
        yield from zip(_encode(texts, tokenizer), ends, strict=True)


def _encode_pairs(
    pairs: Iterable[tuple[str, str]], tokenizer: Any, endings: Endings
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Token ids of each prompt, of its completion and of the completion's end."""
    pairs = (
        (
            require_unicode(prompt, f"The prompt of pair {number}"),
            require_unicode(completion, f"The completion of pair {number}"),
        )
        for number, (prompt, completion) in enumerate(pairs)
    )
    while batch := list(islice(pairs, BATCH)):
        prompts = [prompt for prompt, _ in batch]
        completions, ends = zip(*(endings.of_completion(*pair) for pair in batch), strict=True)
        yield from zip(
            _encode(prompts, tokenizer), _encode(completions, tokenizer), ends, strict=True
        )


def _finish(
    rows: list[dict[str, NDArray[np.int32]]],
    sources: list[tuple[int, ...]],
    counts: TokenizationCounts,
) -> TokenizedRows:
    counts.rows = len(rows)
    counts.tokens = sum(len(row["input_ids"]) for row in rows)
    return TokenizedRows(rows, sources, counts)


def _require_rows(rows: TokenizedRows) -> TokenizedRows:
    if len(rows) == 0:
        raise NoRowsError(
            f"No row of text is left ({rows.counts}). Use longer texts, lower context_length, "
            "generate_max_len or min_completion_prefix, raise sequence_len if prompts fill it, or "
            "keep short pieces for their cross-entropy (keep_short)."
        )
    return rows
