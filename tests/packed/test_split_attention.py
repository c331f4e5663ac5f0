"""Split attention against the dense mask: the same visibility, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward

import hf_ebft.packed.split_attention
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.masks import (
    CHUNKED,
    FULL,
    SLIDING,
    SPLIT,
    MaskRecipe,
    PackedMask,
    _split_attention_forward,
)
from hf_ebft.packed.split_attention import AttentionPlan, split_attention
from hf_ebft.packed.supported import set_packed_attention
from hf_ebft.rows.layout import PackedLayout, PackedPart
from tests.support.architectures import WINDOW, tiny_model
from tests.support.exactness import Case, packed_documents, ragged_batch, row_log_probs, sample

KINDS = (FULL, SLIDING, CHUNKED)
CASES = {
    "ragged": Case(ragged_batch(33, 21, 5), stride=6),
    "left padded": Case(ragged_batch(26, 19, left=True), stride=2, n_samples=3),
    "packed documents": Case(packed_documents([15, 9, 4], [20]), stride=4, context_length=1),
    "one token a rollout": Case(ragged_batch(17, 12), stride=3, generate_max_len=1),
    "no blocks": Case(ragged_batch(6, 4), context_length=8),
    "one row": Case(ragged_batch(60), stride=8, generate_max_len=6, n_samples=4),
}


def recipe(implementation: str = SPLIT) -> MaskRecipe:
    return MaskRecipe(
        implementation, KINDS, by_layer_type=True, window=WINDOW, chunk=5, dtype=torch.float32
    )


def parts(layout: PackedLayout) -> dict[str, PackedPart]:
    steps = {f"step {step}": layout.step_part(step) for step in range(layout.length - 1)}
    return {
        "document": layout.document_part,
        "row": layout.row_part,
        "predicting": layout.predicting_part,
        **steps,
    }


def existing(part: PackedPart) -> Tensor:
    """(B, Q) bool: queries whose result anybody reads."""
    return part.queries.document >= 0


def visible(plan: AttentionPlan, rows: int) -> Tensor:
    """(B, Q, C) bool from the tiles, by handing key j the j-th unit vector."""
    keys = torch.eye(plan.n_keys).expand(rows, 1, -1, -1)
    queries = torch.zeros(rows, 1, plan.n_queries, plan.n_keys)
    return split_attention(queries, keys, keys, plan, 1.0)[:, :, 0] > 0


@pytest.mark.parametrize("small_tiles", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_plan_is_the_mask(
    name: str, kind: str, small_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_tiles:
        monkeypatch.setitem(hf_ebft.packed.split_attention.TILE_ROWS, "cpu", 5)
    for part in parts(CASES[name].layout()).values():
        dense = recipe("sdpa").build(part.queries, part.keys)[kind][:, 0]
        plan = recipe().plan(kind, part)
        covered = []
        for section in plan.sections:
            queries = list(range(plan.n_queries)[section.queries])
            size = section.per_group[0] * section.per_group[1]
            groups = [queries[start : start + size] for start in range(0, len(queries), size)]
            covered += [query for tile in section.tiles for g in groups[tile.groups] for query in g]
        assert sorted(covered) == list(range(plan.n_queries))
        exists = existing(part)
        assert torch.equal(visible(plan, len(dense))[exists], dense[exists])


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_dense_attention(
    name: str, kind: str, heads: tuple[int, int]
) -> None:
    """In double precision, with values of another width than keys, in all memory orders."""
    generator = torch.Generator().manual_seed(0)
    part = CASES[name].layout().row_part
    rows, places = part.queries.slot.shape
    query, key, value = (
        torch.randn(rows, places, count, width, generator=generator, dtype=torch.float64)
        .transpose(1, 2)
        .requires_grad_()
        for count, width in ((heads[0], 5), (heads[1], 5), (heads[1], 3))
    )
    mask = recipe("sdpa").build(part.queries, part.keys)[kind]
    dense_keys, dense_values = (
        tensor.repeat_interleave(heads[0] // heads[1], dim=1) for tensor in (key, value)
    )
    scores = 0.7 * query @ dense_keys.transpose(2, 3)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (weights @ dense_values).transpose(1, 2)
    found = split_attention(query, key, value, recipe().plan(kind, part), 0.7)

    exists = existing(part)
    torch.testing.assert_close(found[exists], expected[exists], atol=1e-12, rtol=1e-12)
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    direction = direction * exists[:, :, None, None]
    ours = torch.autograd.grad((found * direction).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * direction).sum(), (query, key, value))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    part = CASES["one row"].layout().row_part
    tensors = [torch.randn(1, 2, part.keys.slot.shape[1], 8, generator=generator) for _ in "qkv"]
    plan = recipe().plan(FULL, part)
    exact = [tensor.to(dtype).float().requires_grad_() for tensor in tensors]
    rounded = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    expected, found = (split_attention(*given, plan, 0.3) for given in (exact, rounded))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
    for ours, theirs in zip(
        torch.autograd.grad(found.float().square().sum(), rounded),
        torch.autograd.grad(expected.square().sum(), exact),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


def test_scores_of_the_whole_row_never_exist() -> None:
    """Doubling the document doubles the largest tensor, which dense attention would quadruple."""

    def largest(length: int) -> int:
        layout = Case(ragged_batch(length), stride=4, generate_max_len=4, n_samples=4).layout()
        plan = recipe().plan(FULL, layout.row_part)
        return max(
            section.per_group[0]
            * section.per_group[1]
            * (tile.groups.stop - tile.groups.start)
            * tile.width
            for section in plan.sections
            for tile in section.tiles
        )

    assert largest(2048) <= 2.2 * largest(1024)


# ---- Inside a model ------------------------------------------------------------------------------


def packed_mask(kind: str = FULL) -> PackedMask:
    masks = recipe().masks_for(CASES["ragged"].layout().row_part)
    mask = masks[kind]
    assert isinstance(mask, PackedMask)
    return mask


def test_masks_of_a_part_are_made_once() -> None:
    part = CASES["ragged"].layout().row_part
    assert recipe().masks_for(part) is recipe().masks_for(part)
    assert recipe("sdpa").masks_for(part) is not recipe().masks_for(part)


def test_a_packed_mask_that_is_only_handed_on_is_never_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made(*_: object) -> Tensor:
        raise AssertionError("somebody looked at the mask")

    monkeypatch.setattr(MaskRecipe, "_dense_mask", made)
    mask = packed_mask()
    assert (mask.shape, mask.dtype, mask.dim()) == (mask.size(), torch.bool, 4)
    assert not mask.requires_grad and not mask.is_floating_point()
    assert mask.detach() is mask
    for name, overrides in (("llama", {}), ("gemma3_text", {}), ("gpt2", {})):
        model = tiny_model(name, **overrides)
        layout = CASES["ragged"].layout()
        forward = PackedForward.for_model(model)
        assert forward.recipe.implementation == SPLIT
        rollouts, _ = sample(model, forward, layout)
        row_log_probs(model, forward, rollouts).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_else_is_done_with_a_packed_mask_is_done_with_the_mask(kind: str) -> None:
    part = CASES["ragged"].layout().row_part
    dense = recipe("sdpa").build(part.queries, part.keys)[kind]
    mask = packed_mask(kind)
    assert torch.equal(mask[:, :, 2:, :7], dense[:, :, 2:, :7])
    assert torch.equal(mask.float(), dense.float())
    assert torch.equal(~mask, ~dense)
    assert torch.equal(mask.mT, dense.mT)
    assert torch.equal(torch.where(mask, 1.0, 0.0), dense.float())
    assert int(mask.sum()) == int(dense.sum())
    assert type(mask & dense) is Tensor


@pytest.mark.parametrize("change", ["dropout", "softcap", "position_bias"])
def test_arguments_that_change_the_scores_get_the_dense_mask(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, object]] = []

    def recording(
        module: object, query: object, key: object, value: object, mask: object, **kwargs: object
    ) -> tuple[None, None]:
        seen.append({"mask": mask, **kwargs})
        return None, None

    monkeypatch.setattr("hf_ebft.packed.masks.sdpa_attention_forward", recording)
    mask = packed_mask()
    tensors = [torch.randn(mask.shape[0], 2, mask.shape[2], 4) for _ in "qkv"]
    _split_attention_forward(torch.nn.Identity(), *tensors, mask, **{change: 0.5})
    assert torch.equal(seen[0]["mask"], mask.dense()) and seen[0][change] == 0.5


def test_it_is_the_eager_attention_of_transformers() -> None:
    """The reference implementation, with its additive mask."""
    part = CASES["packed documents"].layout().row_part
    rows, places = part.queries.slot.shape
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 4, places, 8, generator=generator)
    key, value = (torch.randn(rows, 2, places, 8, generator=generator) for _ in "kv")
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 2
    for kind in KINDS:
        additive = recipe("eager").build(part.queries, part.keys)[kind]
        expected, _ = eager_attention_forward(module, query, key, value, additive, scaling=0.5)
        mask = recipe().masks_for(part)[kind]
        found, _ = _split_attention_forward(module, query, key, value, mask, scaling=0.5)
        exists = existing(part)
        torch.testing.assert_close(found[exists], expected[exists], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_gradients_are_the_same_under_gradient_checkpointing(
    architecture: str, reentrant: bool
) -> None:
    layout = CASES["ragged"].layout()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(architecture)
        forward = PackedForward.for_model(model)
        rollouts, _ = sample(model, forward, layout)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        row_log_probs(model, forward, rollouts)[0, ..., 3].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_autocast_computes_in_its_own_dtype() -> None:
    mask = packed_mask()
    tensors = [torch.randn(mask.shape[0], 2, mask.shape[2], 4) for _ in "qkv"]
    module = torch.nn.Identity()
    expected, _ = _split_attention_forward(module, *[t.bfloat16() for t in tensors], mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = _split_attention_forward(module, *tensors, mask)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_a_model_with_split_attention_is_still_an_ordinary_model() -> None:
    """Padded batches, generation and saving are as they were with sdpa."""
    plain, split = tiny_model("llama"), tiny_model("llama")
    set_packed_attention(plain, "sdpa")
    assert set_packed_attention(split, "auto") == SPLIT
    batch = ragged_batch(9, 6, left=True)
    with torch.no_grad():
        expected, found = (model(**batch).logits for model in (plain, split))
        exists = batch["attention_mask"].bool()
        torch.testing.assert_close(found[exists], expected[exists])
        continued = [
            model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
            for model in (plain, split)
        ]
    assert torch.equal(*continued)
    assert SPLIT not in split.config.to_json_string()


@pytest.mark.parametrize(
    ("choice", "before", "after"),
    [
        ("auto", "sdpa", SPLIT),
        ("split", "sdpa", SPLIT),
        ("split", "eager", SPLIT),
        ("auto", "eager", "eager"),
        ("auto", SPLIT, SPLIT),
        ("sdpa", SPLIT, "sdpa"),
    ],
)
def test_choice_of_attention(choice: str, before: str, after: str) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(before)
    assert set_packed_attention(model, choice) == after
    assert PackedForward.for_model(model, choice).recipe.implementation == after


@pytest.mark.parametrize("architecture", ["falcon", "gpt_neo"])
def test_code_with_branches_of_its_own_keeps_its_attention(architecture: str) -> None:
    model = tiny_model(architecture)
    before = model.config._attn_implementation
    assert set_packed_attention(model, "auto") == before
    with pytest.raises(ValueError, match=r"split: its code does not call the attention function"):
        set_packed_attention(model, "split")
