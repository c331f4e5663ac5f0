"""The packed row, property by property, against loops over the texts themselves.

Every token of a generated batch has an id of its own, so that what a place of the row holds, sees
and predicts can be told by its content: nothing here repeats the layout's arithmetic.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_ebft.packed.targets import KeptPlaces
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import IGNORE_INDEX, Documents, predicted_targets
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.rows.visibility import document_coordinates, sees

PAD = 0
FIRST_ROLLOUT_ID = 10_000


@dataclass(frozen=True)
class Case:
    """A batch, its layout, and rollouts.

    Attributes:
        texts: token ids of the documents of each row, all ids different.
        layout: of the batch.
        tokens: (B, n, K, G) rollouts, all ids different from each other and the texts'.
    """

    texts: list[list[list[int]]]
    layout: PackedLayout
    tokens: Tensor

    @cached_property
    def row_ids(self) -> list[list[int]]:
        return self.layout.input_ids(self.tokens).tolist()

    @cached_property
    def visible(self) -> Tensor:
        """(B, R, R) bool: who sees whom, by the layout's coordinates."""
        coordinates = self.layout.coordinates
        return sees(coordinates.map(lambda f: f[:, :, None]), coordinates.map(lambda f: f[:, None]))

    def rollouts(self) -> list[tuple[int, int, int, list[int], list[int]]]:
        """(row, sample, block, tokens of the document, own tokens) of every existing rollout."""
        rows, samples, n_blocks, _ = self.layout.rollout_shape
        blocks = self.layout.blocks
        return [
            (
                b,
                i,
                k,
                self.texts[b][int(blocks.document[b, k])],
                self.tokens[b, i, k].tolist(),
            )
            for b in range(rows)
            for k in range(n_blocks)
            if blocks.exists[b, k]
            for i in range(samples)
        ]

    def place_of(self, row: int, token: int) -> int:
        """The one place of the row that holds this token."""
        (place,) = (p for p, held in enumerate(self.row_ids[row]) if held == token)
        return place

    def seen_by(self, row: int, place: int) -> set[int]:
        """Ids of the tokens that the token at `place` sees."""
        return {self.row_ids[row][key] for key in self.visible[row, place].nonzero().flatten()}


def make_case(
    lengths: list[list[int]],
    *,
    stride: int,
    context_length: int,
    generate_max_len: int,
    n_samples: int,
    pad_left: bool = False,
    masked: frozenset[int] = frozenset(),
) -> Case:
    """Rows that pack documents of the given lengths; ids in `masked` have label -100."""
    texts: list[list[list[int]]] = []
    next_id = 1
    for of_row in lengths:
        texts.append([])
        for length in of_row:
            texts[-1].append(list(range(next_id, next_id + length)))
            next_id += length
    width = max(map(sum, lengths))
    columns: dict[str, list[list[int]]] = {
        name: [] for name in ("input_ids", "attention_mask", "labels", "position_ids")
    }
    for row in texts:
        ids = [token for text in row for token in text]
        positions = [position for text in row for position in range(len(text))]
        pads = width - len(ids)
        for name, values, fill in (
            ("input_ids", ids, PAD),
            ("attention_mask", [1] * len(ids), 0),
            ("labels", [IGNORE_INDEX if token in masked else token for token in ids], IGNORE_INDEX),
            ("position_ids", positions, 0),
        ):
            columns[name].append([fill] * pads + values if pad_left else values + [fill] * pads)
    batch: dict[str, Any] = {name: torch.tensor(values) for name, values in columns.items()}
    documents = Documents.from_inputs(batch)
    blocks = find_blocks(
        documents,
        stride=stride,
        context_length=context_length,
        generate_max_len=generate_max_len,
    )
    layout = PackedLayout(documents, blocks, n_samples, generate_max_len)
    count = torch.Size(layout.rollout_shape).numel()
    tokens = FIRST_ROLLOUT_ID + torch.randperm(count).view(layout.rollout_shape)
    return Case(texts, layout, tokens)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    length = st.integers(1, 14)
    lengths = draw(st.lists(st.lists(length, min_size=1, max_size=3), min_size=1, max_size=3))
    total = sum(map(sum, lengths))
    return make_case(
        lengths,
        stride=draw(st.integers(1, 6)),
        context_length=draw(st.integers(1, 6)),
        generate_max_len=draw(st.integers(1, 4)),
        n_samples=draw(st.integers(1, 3)),
        pad_left=draw(st.booleans()),
        masked=frozenset(draw(st.sets(st.integers(1, total), max_size=4))),
    )


# ---- The row -------------------------------------------------------------------------------------


@settings(deadline=None)  # machines may be busy
@given(case=cases())
def test_row_holds_every_document_then_every_rollout_once(case: Case) -> None:
    layout = case.layout
    for b, row in enumerate(case.texts):
        ids = [token for text in row for token in text]
        padding = [PAD] * (layout.document_width - len(ids))
        assert case.row_ids[b][: layout.document_width] == ids + padding
        rollout_part = case.row_ids[b][layout.document_width :]
        assert sorted(rollout_part) == sorted(case.tokens[b].flatten().tolist())
    assert layout.row_width == len(case.row_ids[0])


@settings(deadline=None)  # machines may be busy
@given(case=cases())
def test_tokens_of_a_rollout_are_neighbours_and_samples_of_a_block_lie_together(case: Case) -> None:
    layout = case.layout
    expected = case.tokens.permute(0, 2, 1, 3).flatten(1)
    assert torch.equal(torch.tensor(case.row_ids)[:, layout.document_width :], expected)


@settings(deadline=None)  # machines may be busy
@given(case=cases())
def test_round_trip_in_both_directions(case: Case) -> None:
    layout, tokens = case.layout, case.tokens
    assert torch.equal(layout.from_row(layout.to_row(tokens)), tokens)
    rollout_part = torch.tensor(case.row_ids)[:, layout.document_width :]
    assert torch.equal(layout.to_row(layout.from_row(rollout_part)), rollout_part)
    # What is said about tokens may have more dimensions, hidden states for example.
    states = torch.stack([rollout_part, -rollout_part], dim=-1)
    assert torch.equal(layout.from_row(states), torch.stack([tokens, -tokens], dim=-1))


@settings(deadline=None)  # machines may be busy
@given(case=cases())
def test_steps_partition_the_rollout_part(case: Case) -> None:
    """The tokens that a decoding step feeds: the same step of every rollout, in the row's order."""
    layout = case.layout
    _, samples, n_blocks, length = layout.rollout_shape
    slots = [layout.step_slots(step) for step in range(length)]
    assert all(len(of_step) == samples * n_blocks for of_step in slots)
    assert sorted(torch.cat(slots).tolist()) == list(range(layout.document_width, layout.row_width))
    row_ids = torch.tensor(case.row_ids)
    for step, of_step in enumerate(slots):
        held = row_ids[:, of_step]
        assert torch.equal(held, case.tokens[..., step].transpose(1, 2).flatten(1))


@settings(deadline=None)  # machines may be busy
@given(case=cases())
def test_windows_hold_the_ground_truth(case: Case) -> None:
    layout = case.layout
    for b, _, k, document, _ in case.rollouts():
        end = int(layout.blocks.position[b, k])
        held = [case.row_ids[b][place] for place in layout.window[b, k].tolist()]
        assert held == document[end : end + layout.length]
        assert len(held) == layout.length
    assert int(layout.window[~layout.blocks.exists].sum()) == 0


def test_rollouts_of_another_shape_are_refused() -> None:
    case = make_case([[9]], stride=2, context_length=2, generate_max_len=2, n_samples=3)
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 2\).*\(1, 3, 3, 2\)"):
        case.layout.input_ids(case.tokens[:, :2])


# ---- Coordinates ---------------------------------------------------------------------------------


@settings(deadline=None)  # machines may be busy
@given(case=cases())
def test_slots_number_the_places_of_the_row(case: Case) -> None:
    slots = case.layout.coordinates.slot
    assert torch.equal(slots, torch.arange(case.layout.row_width).expand_as(slots))


@settings(deadline=None)  # machines may be busy
@given(case=cases())
def test_positions_are_those_of_the_text(case: Case) -> None:
    """In a document the index within it; token t of a rollout continues its prefix at e_k + t."""
    layout = case.layout
    position = layout.coordinates.position
    for b, row in enumerate(case.texts):
        for text in row:
            for index, token in enumerate(text):
                assert int(position[b, case.place_of(b, token)]) == index
    for b, _, k, _, own in case.rollouts():
        end = int(layout.blocks.position[b, k])
        for t, token in enumerate(own):
            assert int(position[b, case.place_of(b, token)]) == end + t


@settings(deadline=None)  # machines may be busy
@given(case=cases(), data=st.data())
def test_selected_tokens_keep_their_coordinates(case: Case, data: st.DataObject) -> None:
    """What decoding feeds and caches: any tokens in any order see each other as in the row."""
    layout = case.layout
    prefix = document_coordinates(layout.documents)
    order = data.draw(st.permutations(range(layout.document_width, layout.row_width)))
    index = torch.tensor(order)
    keys = prefix.followed_by(layout.coordinates.select(index))
    queries = layout.coordinates.select(index)
    visible = sees(queries.map(lambda f: f[:, :, None]), keys.map(lambda f: f[:, None]))
    places = torch.cat([torch.arange(layout.document_width), index])
    assert torch.equal(visible, case.visible[:, index][:, :, places])


# ---- Who sees whom -------------------------------------------------------------------------------


@settings(deadline=None)  # machines may be busy
@given(case=cases())
def test_rollout_tokens_see_their_prefix_and_own_past_only(case: Case) -> None:
    for b, _, k, document, own in case.rollouts():
        prefix = document[: int(case.layout.blocks.position[b, k])]
        assert prefix  # never empty: something has to predict the first token
        for t, token in enumerate(own):
            expected = {*prefix, *own[: t + 1]}
            assert case.seen_by(b, case.place_of(b, token)) == expected


@settings(deadline=None)  # machines may be busy
@given(case=cases())
def test_document_tokens_see_their_document_up_to_themselves_only(case: Case) -> None:
    for b, row in enumerate(case.texts):
        for text in row:
            for index, token in enumerate(text):
                assert case.seen_by(b, case.place_of(b, token)) == set(text[: index + 1])


@settings(deadline=None)  # machines may be busy
@given(case=cases())
def test_padding_and_absent_rollouts_see_themselves_and_are_seen_by_nobody_else(
    case: Case,
) -> None:
    """They see themselves, lest a softmax has no term."""
    layout = case.layout
    for b, row in enumerate(case.texts):
        padding = range(sum(map(len, row)), layout.document_width)
        absent = [
            case.place_of(b, token)
            for k in (~layout.blocks.exists[b]).nonzero().flatten().tolist()
            for token in case.tokens[b, :, k].flatten().tolist()
        ]
        for place in [*padding, *absent]:
            assert case.visible[b, place].nonzero().flatten().tolist() == [place]
            assert case.visible[b, :, place].nonzero().flatten().tolist() == [place]


# ---- Who predicts whom ---------------------------------------------------------------------------


@settings(deadline=None)  # machines may be busy
@given(case=cases())
def test_every_rollout_token_has_the_one_right_predictor(case: Case) -> None:
    """The prefix's last token or the own previous one, one position before, blind to the token."""
    layout, coordinates = case.layout, case.layout.coordinates
    assert layout.predictor.shape == layout.rollout_shape
    for b, i, k, document, own in case.rollouts():
        prefix = document[: int(layout.blocks.position[b, k])]
        for t, token in enumerate(own):
            place, predictor = case.place_of(b, token), int(layout.predictor[b, i, k, t])
            assert case.row_ids[b][predictor] == (own[t - 1] if t else prefix[-1])
            assert coordinates.position[b, predictor] == coordinates.position[b, place] - 1
            assert coordinates.document[b, predictor] == coordinates.document[b, place]
            assert case.seen_by(b, predictor) == case.seen_by(b, place) - {token}


@settings(deadline=None)  # machines may be busy
@given(case=cases())
def test_no_rollout_token_predicts_two(case: Case) -> None:
    """All but the last token of a rollout predict exactly one token, the last one none."""
    layout = case.layout
    for b in range(len(case.texts)):
        inside = layout.predictor[b, :, :, 1:].flatten().tolist()
        assert len(set(inside)) == len(inside)
        last = {case.place_of(b, token) for token in case.tokens[b, :, :, -1].flatten().tolist()}
        assert last.isdisjoint(inside)


@settings(deadline=None)  # machines may be busy
@given(case=cases(), whole_document=st.booleans())
def test_kept_places_cover_every_predictor(case: Case, whole_document: bool) -> None:
    layout = case.layout
    kept = KeptPlaces.for_layout(layout, whole_document=whole_document)
    places = kept.places.tolist()
    assert places == sorted(set(places))
    assert kept.places[: kept.n_document].max() < layout.document_width
    assert all(place >= layout.document_width for place in places[kept.n_document :])
    assert torch.equal(kept.places[kept.index_of[layout.predictor]], layout.predictor)
    if whole_document:
        # Index i of the document's part is place i, and every target's predecessor is there.
        assert places[: kept.n_document] == list(range(kept.n_document))
        targets = predicted_targets(layout.documents).nonzero()[:, 1]
        assert all(int(target) - 1 < kept.n_document for target in targets)
    else:
        # Nothing is computed in vain: each place predicts a rollout token of some row.
        assert set(places) == set(layout.predictor.flatten().tolist())


def test_a_layout_of_a_device_is_not_copied_back_to_the_host() -> None:
    """As for a feature network on the CPU. The "meta" device has no values to copy."""
    documents = Documents.from_inputs({"input_ids": torch.arange(1, 13)[None]})
    blocks = find_blocks(documents, stride=2, context_length=2, generate_max_len=2)
    layout = PackedLayout(documents, blocks, 2, 2)
    on_device = layout.to(torch.device("meta"))
    assert on_device.to(torch.device("cpu")) is layout
    chunk = on_device.select_blocks(slice(0, 1)).to(torch.device("cpu"))
    assert torch.equal(chunk.predictor, layout.select_blocks(slice(0, 1)).predictor)
