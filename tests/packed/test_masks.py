"""Masks: the same visibility in every form, and the right form for each model."""

from __future__ import annotations

import logging
import os
import shutil

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_ebft.packed.flex import FLEX
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.masks import CHUNKED, FULL, SLIDING, MaskRecipe, _log_dense_mask
from hf_ebft.packed.model_code import mask_functions
from hf_ebft.rows.layout import PackedLayout
from tests.support.architectures import WINDOW, tiny_config, tiny_model
from tests.support.exactness import Case, packed_documents, ragged_batch, row_log_probs, sample

KINDS = (FULL, SLIDING, CHUNKED)
CASES = {
    "ragged": Case(ragged_batch(33, 21, 5), stride=6),
    "left padded": Case(ragged_batch(26, 19, left=True), stride=2, n_samples=3),
    "packed documents": Case(packed_documents([15, 9, 4], [20]), stride=4, context_length=1),
}


def recipe(implementation: str, dtype: torch.dtype = torch.float32) -> MaskRecipe:
    return MaskRecipe(
        implementation, KINDS, by_layer_type=True, window=WINDOW, chunk=5, dtype=dtype
    )


def expected_mask(layout: PackedLayout, kind: str) -> Tensor:
    """(B, R, R) bool, token by token from the definition."""
    fields = ("slot", "document", "position", "rollout", "prefix_end")
    columns = [getattr(layout.coordinates, name).tolist() for name in fields]
    expected = torch.zeros(len(columns[0]), layout.row_width, layout.row_width, dtype=torch.bool)
    for row in range(len(expected)):
        tokens = list(zip(*(column[row] for column in columns), strict=True))
        for q, (_, document, position, rollout, prefix_end) in enumerate(tokens):
            for k, (_, key_document, key_position, key_rollout, _) in enumerate(tokens):
                if document == key_document != -1:
                    if rollout == 0:
                        seen = key_rollout == 0 and key_position <= position
                    elif key_rollout == 0:
                        seen = key_position < prefix_end
                    else:
                        seen = key_rollout == rollout and key_position <= position
                    if kind == SLIDING:
                        seen = seen and key_position > position - WINDOW
                    elif kind == CHUNKED:
                        seen = seen and key_position // 5 == position // 5
                else:
                    seen = False
                expected[row, q, k] = seen or q == k
    return expected


@pytest.mark.parametrize("name", ["ragged", "left padded", "packed documents"])
@pytest.mark.parametrize("kind", KINDS)
def test_boolean_mask_is_the_definition(name: str, kind: str) -> None:
    layout = CASES[name].layout()
    masks = recipe("sdpa").build(layout.coordinates, layout.coordinates)
    assert isinstance(masks, dict) and masks.keys() == set(KINDS)
    torch.testing.assert_close(masks[kind], expected_mask(layout, kind)[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_mask_is_the_boolean_one_in_the_model_s_dtype(dtype: torch.dtype) -> None:
    coordinates = CASES["packed documents"].layout().coordinates
    boolean = recipe("sdpa").build(coordinates, coordinates)
    additive = recipe("eager", dtype).build(coordinates, coordinates)
    for kind in KINDS:
        assert additive[kind].dtype == dtype
        torch.testing.assert_close(additive[kind] == 0, boolean[kind])
        assert (additive[kind][~boolean[kind]] == torch.finfo(dtype).min).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", FLEX])
def test_mask_of_a_decoding_step_is_the_rows_and_columns_of_the_whole(implementation: str) -> None:
    layout = CASES["ragged"].layout()
    whole = layout.coordinates
    fed = layout.step_slots(1)
    cached = torch.cat([torch.arange(layout.document_width), layout.step_slots(0), fed])
    for kind in KINDS:
        full = recipe("sdpa").build(whole, whole)[kind]
        step = recipe(implementation).build(whole.select(fed), whole.select(cached))[kind]
        if implementation == "eager":
            step = step == 0
        torch.testing.assert_close(step, full[:, :, fed][..., cached])


def test_every_query_sees_itself_so_that_no_softmax_is_empty() -> None:
    coordinates = CASES["packed documents"].layout().coordinates
    assert (coordinates.document == -1).any()
    for mask in recipe("sdpa").build(coordinates, coordinates).values():
        assert torch.diagonal(mask, dim1=-2, dim2=-1).all()


def test_one_kind_of_layer_gets_a_mask_and_several_get_a_dict() -> None:
    coordinates = CASES["ragged"].layout().coordinates
    llama = MaskRecipe.for_model(tiny_model("llama"))
    gemma = MaskRecipe.for_model(tiny_model("gemma3_text"))
    assert isinstance(llama.build(coordinates, coordinates), Tensor)
    assert gemma.build(coordinates, coordinates).keys() == {FULL, SLIDING}


@pytest.mark.parametrize(
    ("model_type", "overrides", "kinds"),
    [
        ("llama", {}, (FULL,)),
        ("mistral", {}, (SLIDING,)),
        ("mistral", {"sliding_window": None}, (FULL,)),
        ("qwen2", {"use_sliding_window": False}, (FULL,)),
        ("qwen2", {}, (FULL, SLIDING)),
        ("llama4_text", {}, (CHUNKED, FULL)),
        # Configurations that name a window which the model's code never looks at.
        ("llama", {"sliding_window": WINDOW}, (FULL,)),
        ("llama", {"attention_chunk_size": WINDOW}, (FULL,)),
        ("moshi", {}, (FULL,)),
    ],
)
def test_recipe_follows_configuration_and_code(
    model_type: str, overrides: dict[str, object], kinds: tuple[str, ...]
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides))
    assert MaskRecipe.for_model(model).layer_types == kinds


def test_code_of_a_subclass_is_that_of_its_parents() -> None:
    parent = type(tiny_model("mistral"))

    class Renamed(parent):
        pass

    with torch.device("meta"):
        model = Renamed(tiny_config("mistral"))
    assert "create_sliding_window_causal_mask" in mask_functions(model)
    assert MaskRecipe.for_model(model).layer_types == (SLIDING,)


def test_layers_that_no_mask_can_tell_apart_are_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("lfm2"))
    with pytest.raises(ValueError, match=r"layers of type conv.*full_attention, sliding_attention"):
        MaskRecipe.for_model(model)


def test_window_counts_positions_and_not_places_of_the_row() -> None:
    # The last block's tokens lie far from their prefix in the row, and next to it in the text.
    layout = CASES["ragged"].layout()
    mask = recipe("sdpa").build(layout.coordinates, layout.coordinates)[SLIDING][0, 0]
    last = int(layout.predictor[0, 0, -1, 1])
    end = int(layout.blocks.position[0, -1])
    assert last - end > 3 * WINDOW
    assert mask[last, end - WINDOW + 1 : end].all()
    assert not mask[last, : end - WINDOW + 1].any()


def test_a_mask_of_the_whole_row_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Attention that cannot be split is exact, and costs memory and time."""
    _log_dense_mask.cache_clear()
    model, layout = tiny_model("llama"), CASES["ragged"].layout()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    forward = PackedForward.for_model(model)
    with caplog.at_level(logging.WARNING, logger="hf_ebft"):
        rollouts, _ = sample(model, forward, layout)
        assert not caplog.records
        row_log_probs(model.train(), forward, rollouts)
    (record,) = caplog.records
    assert "LlamaAttention uses dropout, which split attention does not" in record.getMessage()


@pytest.mark.parametrize(
    ("model_type", "choice", "reason"),
    [
        (
            "falcon",
            "auto",
            "its code does not call the attention function that its configuration names",
        ),
        ("gemma2", "auto", "sdpa ignores the soft cap on its scores"),
        ("gemma2", "eager", None),
        ("llama", "auto", None),
        ("llama", "sdpa", None),
    ],
)
def test_attention_that_cannot_be_split_is_logged(
    model_type: str, choice: str, reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_ebft"):
        PackedForward.for_model(tiny_model(model_type), choice)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("hf_ebft")]
    assert len(lines) == (reason is not None)
    assert reason is None or f"cannot use split attention, because {reason}" in lines[0]


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["gemma2", "vaultgemma"])
def test_sdpa_does_not_leave_out_bounds_on_scores(
    model_type: str, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.17 has sdpa for these models, and ignores their bound there."""
    model = tiny_model(model_type)
    monkeypatch.setattr(type(model), "_supports_sdpa", True)
    model.set_attn_implementation(before)
    for choice in ("split", "sdpa"):
        with pytest.raises(ValueError, match=r"sdpa ignores the soft cap.*softcapping=50"):
            PackedForward.for_model(model, choice)
    assert PackedForward.for_model(model).recipe.implementation == "eager"
    model.config.attn_logit_softcapping = None
    assert PackedForward.for_model(model, "sdpa").recipe.implementation == "sdpa"


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("gemma2", "sdpa ignores the soft cap"), ("gpt_oss", "it does not support sdpa")],
)
def test_split_attention_is_refused_where_it_would_leave_something_out(
    model_type: str, reason: str
) -> None:
    """A bound on the scores, or sinks. sdpa, which split attention falls back to, lacks them too.

    With sinks left out, the log-probabilities were wrong and nothing said so.
    """
    with pytest.raises(ValueError, match=rf"split: {reason}.*'eager'"):
        PackedForward.for_model(tiny_model(model_type), "split")


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.slow
@pytest.mark.skipif(_compiler() is None, reason="flex_attention on a CPU needs a C++ compiler")
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "llama4_text"])
def test_compiled_flex_attention_equals_the_dense_mask(model_type: str) -> None:
    model = tiny_model(model_type, limit=4096)
    layout = Case(ragged_batch(33, 21), stride=6, generate_max_len=2).layout()
    dense = PackedForward.for_model(model, "sdpa")
    rollouts, sampled = sample(model, dense, layout)
    exists = rollouts.exists[:, None].expand(sampled.shape[:3])
    with torch.no_grad():
        expected = row_log_probs(model, dense, rollouts)
    # torch 2.13's C++ template does not compile with the dynamic shapes of a second length.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        torch._dynamo.reset()
        flex = PackedForward.for_model(model, "flex_attention")
        assert flex.recipe.implementation == FLEX
        with torch.no_grad():
            found = row_log_probs(model, flex, rollouts)
        torch.testing.assert_close(found[exists], expected[exists], atol=1e-5, rtol=0)
        # Every kind of mask and every length is compiled by itself, which takes long.
        if model_type == "llama":
            repeated, resampled = sample(model, flex, layout)
            assert torch.equal(repeated.tokens[exists], rollouts.tokens[exists])
            torch.testing.assert_close(resampled[exists], sampled[exists], atol=1e-5, rtol=0)
        torch._dynamo.reset()
