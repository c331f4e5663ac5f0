"""Anchors against their definition, written as plain loops over the documents of a row.

Block k continues the first e_k = a_0 + k * stride tokens of its document, and there are
K = floor((S - G - a_0) / stride) + 1 of them, S the document's own length; a block whose window
doc[e_k : e_k + G] holds a masked label does not exist.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ebft.rows.anchors import Blocks, count_replies, find_blocks
from hf_ebft.rows.buckets import Buckets
from hf_ebft.rows.documents import IGNORE_INDEX, Documents

PAD = 99


@dataclass(frozen=True)
class Text:
    """One document: its length, and the tokens that labels mask (None: no labels at all)."""

    length: int
    masked: frozenset[int] | None = None

    def completion_start(self) -> int | None:
        """Index of the first unmasked token; None without labels, `length` if all are masked."""
        if self.masked is None:
            return None
        return next((i for i in range(self.length) if i not in self.masked), self.length)


def anchors_by_definition(
    text: Text,
    *,
    stride: int,
    context_length: int,
    generate_max_len: int,
    min_completion_prefix: int = 0,
    prompt_length: int | None = None,
) -> list[int]:
    """The e_k of one document."""
    start = text.completion_start() if prompt_length is None else prompt_length
    a_0 = context_length
    if start is not None:
        a_0 = max(context_length, start + min_completion_prefix)
    count = max(0, (text.length - generate_max_len - a_0) // stride + 1)
    masked = text.masked or frozenset()
    return [
        end
        for end in (a_0 + k * stride for k in range(count))
        if not masked.intersection(range(end, end + generate_max_len))
    ]


def batch_of(
    rows: list[list[Text]], *, pad_left: bool = False, prompt_lengths: list[int] | None = None
) -> dict[str, Any]:
    """The rows as a collator makes them: padded, with labels if any text has them."""
    width = max(sum(text.length for text in row) for row in rows)
    columns: dict[str, list[list[int]]] = {
        "input_ids": [],
        "attention_mask": [],
        "labels": [],
        "document_ids": [],
    }
    for row in rows:
        ids = [token for text in row for token in range(text.length)]
        labels = [
            IGNORE_INDEX if token in (text.masked or ()) else token
            for text in row
            for token in range(text.length)
        ]
        # Document ids are arbitrary numbers that only have to change.
        owners = [3 * index + 5 for index, text in enumerate(row) for _ in range(text.length)]
        padding = width - len(ids)
        for name, values, fill in (
            ("input_ids", ids, PAD),
            ("attention_mask", [1] * len(ids), 0),
            ("labels", labels, IGNORE_INDEX),
            ("document_ids", owners, -1),
        ):
            pads = [fill] * padding
            columns[name].append(pads + values if pad_left else values + pads)
    batch: dict[str, Any] = {name: torch.tensor(values) for name, values in columns.items()}
    if all(text.masked is None for row in rows for text in row):
        del batch["labels"]
    if all(len(row) == 1 for row in rows):
        del batch["document_ids"]
    if prompt_lengths is not None:
        batch["prompt_length"] = torch.tensor(prompt_lengths)
    return batch


def found(blocks: Blocks) -> list[list[tuple[int, int]]]:
    """(document, e_k) of the blocks of each row, in their order."""
    return [
        [
            (int(document), int(position))
            for document, position, there in zip(*fields, strict=True)
            if there
        ]
        for fields in zip(blocks.document, blocks.position, blocks.exists, strict=True)
    ]


def check(
    rows: list[list[Text]],
    *,
    pad_left: bool = False,
    prompt_lengths: list[int] | None = None,
    **numbers: Any,
) -> Blocks:
    """Compare `find_blocks` with the definition, field by field; returns the blocks."""
    batch = batch_of(rows, pad_left=pad_left, prompt_lengths=prompt_lengths)
    blocks = find_blocks(Documents.from_inputs(batch), **numbers)
    expected = [
        [
            (index, end)
            for index, text in enumerate(row)
            for end in anchors_by_definition(
                text,
                prompt_length=None if prompt_lengths is None else prompt_lengths[number],
                **numbers,
            )
        ]
        for number, row in enumerate(rows)
    ]
    assert found(blocks) == expected

    most = max(1, *(len(row) for row in expected))
    assert blocks.exists.shape == blocks.column.shape == blocks.position.shape == (len(rows), most)
    assert blocks.document.shape == (len(rows), most)
    counts = blocks.per_document()
    for number, of_row in enumerate(expected):
        # Existing blocks come first; what is not there holds the documented values.
        assert blocks.exists[number].tolist() == [k < len(of_row) for k in range(most)]
        for k in range(most):
            if k < len(of_row):
                document, end = of_row[k]
                first = sum(text.length for text in rows[number][:document])
                assert int(blocks.column[number, k]) == first + end
                assert int(counts[number, k]) == sum(owner == document for owner, _ in of_row)
            else:
                assert int(blocks.column[number, k]) == 0
                assert int(blocks.position[number, k]) == 0
                assert int(blocks.document[number, k]) == -1
                assert int(counts[number, k]) == 0
    return blocks


# ---- Any batch -----------------------------------------------------------------------------------


@st.composite
def texts(draw: st.DrawFn, with_labels: bool) -> Text:
    length = draw(st.integers(1, 16))
    if not with_labels:
        return Text(length)
    start = draw(st.integers(0, length))
    holes = draw(st.sets(st.integers(0, length - 1), max_size=3))
    return Text(length, frozenset(range(start)) | frozenset(holes))


numbers_strategy = st.fixed_dictionaries(
    {
        "stride": st.integers(1, 6),
        "context_length": st.integers(1, 6),
        "generate_max_len": st.integers(1, 5),
        "min_completion_prefix": st.integers(0, 4),
    }
)


@settings(deadline=None)  # machines may be busy
@given(data=st.data(), with_labels=st.booleans(), pad_left=st.booleans(), numbers=numbers_strategy)
def test_packed_rows_equal_the_definition(
    data: st.DataObject, with_labels: bool, pad_left: bool, numbers: dict[str, Any]
) -> None:
    row = st.lists(texts(with_labels), min_size=1, max_size=3)
    rows = data.draw(st.lists(row, min_size=1, max_size=3))
    check(rows, pad_left=pad_left, **numbers)


@settings(deadline=None)  # machines may be busy
@given(data=st.data(), with_labels=st.booleans(), pad_left=st.booleans(), numbers=numbers_strategy)
def test_prompt_lengths_equal_the_definition(
    data: st.DataObject, with_labels: bool, pad_left: bool, numbers: dict[str, Any]
) -> None:
    """A `prompt_length` column decides where completions start, with labels beside it or not."""
    rows = [[text] for text in data.draw(st.lists(texts(with_labels), min_size=1, max_size=3))]
    prompts = [data.draw(st.integers(0, row[0].length)) for row in rows]
    check(rows, pad_left=pad_left, prompt_lengths=prompts, **numbers)


# ---- Cases by hand -------------------------------------------------------------------------------


def masked_until(start: int) -> frozenset[int]:
    return frozenset(range(start))


def test_blocks_fill_the_document_where_the_stride_divides() -> None:
    blocks = check([[Text(20)]], stride=4, context_length=8, generate_max_len=4)
    assert blocks.position.tolist() == [[8, 12, 16]]


@pytest.mark.parametrize("length", [21, 22, 23])
def test_a_remainder_shorter_than_the_stride_gets_no_block(length: int) -> None:
    """S - G - a_0 is 9, 10 or 11: three blocks of stride 4 whatever is left over."""
    blocks = check([[Text(length)]], stride=4, context_length=8, generate_max_len=4)
    assert blocks.position.tolist() == [[8, 12, 16]]


def test_blocks_overlap_where_the_stride_is_shorter_than_a_rollout() -> None:
    blocks = check([[Text(10)]], stride=1, context_length=3, generate_max_len=5)
    assert blocks.position.tolist() == [[3, 4, 5]]


def test_the_document_may_be_exactly_one_block_long() -> None:
    assert bool(check([[Text(12)]], stride=4, context_length=8, generate_max_len=4).exists.all())
    assert not bool(
        check([[Text(11)]], stride=4, context_length=8, generate_max_len=4).exists.any()
    )


def test_padding_gets_no_blocks() -> None:
    """Lengths are the documents' own, on whichever side the padding lies."""
    for pad_left in (False, True):
        rows = [[Text(20)], [Text(9)], [Text(5)]]
        blocks = check(rows, pad_left=pad_left, stride=2, context_length=3, generate_max_len=4)
        assert found(blocks)[1:] == [[(0, 3), (0, 5)], []]


def test_each_document_has_its_own_first_anchor() -> None:
    """The longest prompt of the batch must not move the anchors of the other rows."""
    rows = [[Text(16, masked_until(10))], [Text(16, masked_until(2))], [Text(16, frozenset())]]
    blocks = check(rows, stride=4, context_length=4, generate_max_len=2)
    assert found(blocks) == [
        [(0, 10), (0, 14)],
        [(0, 4), (0, 8), (0, 12)],
        [(0, 4), (0, 8), (0, 12)],
    ]


def test_each_packed_document_has_its_own_first_anchor() -> None:
    row = [Text(9, masked_until(5)), Text(9, masked_until(1)), Text(3, masked_until(1))]
    blocks = check([row], stride=2, context_length=2, generate_max_len=2)
    assert found(blocks) == [[(0, 5), (0, 7), (1, 2), (1, 4), (1, 6)]]
    assert blocks.column.tolist() == [[5, 7, 11, 13, 15]]
    assert blocks.per_document().tolist() == [[2, 2, 3, 3, 3]]


def test_min_completion_prefix_counts_from_the_completion() -> None:
    numbers: dict[str, Any] = {"stride": 3, "context_length": 4, "generate_max_len": 2}
    text = Text(16, masked_until(6))
    assert found(check([[text]], min_completion_prefix=0, **numbers)) == [[(0, 6), (0, 9), (0, 12)]]
    assert found(check([[text]], min_completion_prefix=2, **numbers)) == [
        [(0, 8), (0, 11), (0, 14)]
    ]
    # Without a marked completion there is nothing to count from.
    assert found(check([[Text(16)]], min_completion_prefix=2, **numbers)) == [
        [(0, 4), (0, 7), (0, 10), (0, 13)]
    ]


def test_a_context_longer_than_the_prompt_wins() -> None:
    blocks = check(
        [[Text(16, masked_until(3))]],
        stride=4,
        context_length=8,
        generate_max_len=4,
        min_completion_prefix=2,
    )
    assert found(blocks) == [[(0, 8), (0, 12)]]


def test_windows_with_a_masked_label_have_no_block() -> None:
    """A user's turn in the middle of a chat: tokens 9 and 10 are nobody's target.

    The anchors around it stay on the lattice of the first one.
    """
    text = Text(20, masked_until(3) | {9, 10})
    blocks = check([[text]], stride=2, context_length=3, generate_max_len=3)
    assert found(blocks) == [[(0, 3), (0, 5), (0, 11), (0, 13), (0, 15), (0, 17)]]


def test_a_fully_masked_document_has_no_block() -> None:
    rows = [[Text(12, masked_until(12))], [Text(12, masked_until(2))]]
    blocks = check(rows, stride=3, context_length=2, generate_max_len=2)
    assert blocks.exists.any(dim=1).tolist() == [False, True]


def test_prompt_length_equals_masking_the_prompt() -> None:
    numbers: dict[str, Any] = {
        "stride": 3,
        "context_length": 2,
        "generate_max_len": 2,
        "min_completion_prefix": 1,
    }
    lengths, prompts = [14, 11, 8], [6, 0, 8]
    by_column = check([[Text(length)] for length in lengths], prompt_lengths=prompts, **numbers)
    by_labels = check(
        [[Text(n, masked_until(start))] for n, start in zip(lengths, prompts, strict=True)],
        **numbers,
    )
    assert found(by_column) == found(by_labels)


def test_windows_do_not_cross_documents() -> None:
    """Two documents of 6 tokens are not one of 12: no window reaches into the neighbour."""
    numbers: dict[str, Any] = {"stride": 1, "context_length": 3, "generate_max_len": 2}
    packed = check([[Text(6), Text(6)]], **numbers)
    assert found(packed) == [[(0, 3), (0, 4), (1, 3), (1, 4)]]
    whole = check([[Text(12)]], **numbers)
    assert whole.exists.sum() == 8


def test_a_batch_without_blocks_keeps_one_place_that_does_not_exist() -> None:
    """So that every process of a distributed run makes the same forward passes."""
    blocks = check([[Text(5)], [Text(1)]], stride=8, context_length=8, generate_max_len=8)
    assert blocks.exists.tolist() == [[False], [False]]
    assert blocks.per_document().tolist() == [[0], [0]]


def test_a_row_without_any_token_has_no_block() -> None:
    """A fully masked row, as a collator that fills up batches makes it."""
    batch = {
        "input_ids": torch.arange(10).expand(2, -1),
        "attention_mask": torch.tensor([[1] * 10, [0] * 10]),
    }
    blocks = find_blocks(
        Documents.from_inputs(batch), stride=3, context_length=2, generate_max_len=2
    )
    assert found(blocks) == [[(0, 2), (0, 5), (0, 8)], []]


@pytest.mark.parametrize("multiple", [1, 3, 4, 40])
def test_padded_blocks_are_the_same_blocks_and_some_that_are_not_there(multiple: int) -> None:
    ids = torch.arange(1, 41).view(2, 20)
    mask = torch.arange(20) < torch.tensor([20, 11])[:, None]
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    settings = {"stride": 3, "context_length": 4, "generate_max_len": 2}
    plain = find_blocks(Documents.from_inputs(batch), **settings)
    padded_documents = Documents.from_inputs(batch, widths=Buckets(16))
    assert padded_documents.input_ids.shape == (2, 32)
    padded = find_blocks(padded_documents, **settings, counts=Buckets(multiple))
    count = plain.exists.shape[1]
    assert padded.exists.shape[1] % multiple == 0
    assert 0 <= padded.exists.shape[1] - count < multiple
    for name in ("column", "position", "document", "exists"):
        torch.testing.assert_close(getattr(padded, name)[:, :count], getattr(plain, name))
    assert not padded.exists[:, count:].any()


# ---- Replies -------------------------------------------------------------------------------------


def replies_of(text: Text) -> list[tuple[int, int]]:
    """(start, end) of every unbroken stretch of labelled tokens, if the text starts masked."""
    masked = text.masked or frozenset()
    if not text.completion_start():
        return []
    starts = [i for i in range(text.length) if i not in masked and (i == 0 or i - 1 in masked)]
    return [
        (start, next((i for i in range(start, text.length) if i in masked), text.length))
        for start in starts
    ]


@settings(deadline=None)  # machines may be busy
@given(data=st.data(), pad_left=st.booleans(), numbers=numbers_strategy)
def test_replies_that_no_block_reaches_are_counted(
    data: st.DataObject, pad_left: bool, numbers: dict[str, Any]
) -> None:
    row = st.lists(texts(True), min_size=1, max_size=3)
    rows = data.draw(st.lists(row, min_size=1, max_size=3))
    documents = Documents.from_inputs(batch_of(rows, pad_left=pad_left))
    counted = count_replies(
        documents, find_blocks(documents, **numbers), numbers["generate_max_len"]
    )
    everything = [text for row in rows for text in row]
    replies = [(text, *reply) for text in everything for reply in replies_of(text)]
    without = [
        (text, start, end)
        for text, start, end in replies
        if not any(start <= anchor < end for anchor in anchors_by_definition(text, **numbers))
    ]
    short = [end - start for _, start, end in replies if end - start < numbers["generate_max_len"]]
    assert (int(counted.count), int(counted.without_blocks)) == (len(replies), len(without))
    assert int(counted.too_short) == len(short)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_replies_that_are_long_enough_are_reached(stride: int) -> None:
    """`generate_max_len + stride - 1` tokens are enough, and one less may not be."""
    length, first = 4, 5
    reached = []
    for later in (length + stride - 2, length + stride - 1):
        for gap in range(1, stride + 1):
            end = 6 + first + gap
            masked = masked_until(6) | frozenset(range(6 + first, end))
            documents = Documents.from_inputs(batch_of([[Text(end + later, masked)]]))
            blocks = find_blocks(
                documents, stride=stride, context_length=2, generate_max_len=length
            )
            reached.append((later, int(count_replies(documents, blocks, length).without_blocks)))
    assert all(missed == 0 for later, missed in reached if later == length + stride - 1)
    assert any(missed == 1 for later, missed in reached if later == length + stride - 2)


def test_blocks_that_do_not_exist_fill_a_chunk_up() -> None:
    inputs = {"input_ids": torch.arange(40).view(2, 20)}
    documents = Documents.from_inputs(inputs)
    blocks = find_blocks(documents, stride=4, context_length=3, generate_max_len=4)
    thinned = blocks.thinned(torch.ones(blocks.exists.shape).bool(), torch.ones(2, 4) / 2)
    for some in (blocks, thinned):
        filled = some.filled_up(3)
        assert torch.equal(filled[:4].column, some.column)
        assert torch.equal(filled[:4].exists, some.exists)
        assert filled.exists.shape == (2, 7) and not filled.exists[:, 4:].any()
        assert (filled.document[:, 4:] == -1).all()
        assert not filled.weights[:, 4:].any() and not filled.per_document()[:, 4:].any()
