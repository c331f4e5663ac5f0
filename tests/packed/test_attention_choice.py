"""What `packed_attention="auto"` means, for machines that are only told of."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_ebft.packed.attention_choice import AttentionFacts, choose_attention
from hf_ebft.packed.flex import FLEX
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.masks import SPLIT
from hf_ebft.packed.supported import attention_of, gather_facts, set_packed_attention
from tests.support.architectures import tiny_config, tiny_model

CUDA = AttentionFacts(
    device="cuda",
    before="sdpa",
    supports_sdpa=True,
    takes_flex=True,
    head_dim=64,
    widest_head=64,
    dropout=0.0,
    trains=True,
    has_triton=True,
    compiles=False,
)
CPU = replace(CUDA, device="cpu", has_triton=False)


def test_auto_is_flex_attention_on_cuda_and_split_attention_on_a_cpu() -> None:
    assert choose_attention("auto", CUDA).candidates == (FLEX, "sdpa", "eager")
    assert choose_attention("auto", CPU).candidates == (SPLIT, "sdpa", "eager")
    for device in ("mps", "xpu", "npu"):
        assert choose_attention("auto", replace(CUDA, device=device)).candidates[0] == SPLIT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 8}, "8 wide.*at least 16"),
        ({"widest_head": 512}, "512 wide.*at most 256"),
        ({"has_triton": False}, "Triton"),
        ({"takes_flex": False}, "not known to work"),
        ({"dropout": 0.1}, "dropout.*0.1"),
    ],
)
def test_auto_on_cuda_is_sdpa_where_flex_attention_cannot_serve(
    change: dict[str, object], reason: str
) -> None:
    facts = replace(CUDA, **change)
    chosen = choose_attention("auto", facts)
    assert chosen.candidates == ("sdpa", "eager")
    assert chosen.reason is not None
    with pytest.raises(ValueError, match=f"'flex_attention' does not work.*{reason}.*'auto'"):
        choose_attention("flex_attention", facts)


def test_heads_of_sixteen_are_wide_enough() -> None:
    assert choose_attention("auto", replace(CUDA, head_dim=16)).candidates[0] == FLEX


def test_flex_attention_on_a_cpu_is_for_frozen_networks() -> None:
    with pytest.raises(ValueError, match="cannot train on a CPU"):
        choose_attention("flex_attention", CPU)
    frozen = replace(CPU, trains=False, head_dim=8)
    assert choose_attention("flex_attention", frozen).candidates == (FLEX,)


def test_eager_attention_is_kept_where_it_was_chosen() -> None:
    for device, compiles in itertools.product(("cpu", "cuda"), (False, True)):
        facts = replace(CUDA, device=device, compiles=compiles, before="eager")
        assert choose_attention("auto", facts).candidates[0] == "eager"
    # Where the model has nothing else, nobody chose it.
    alone = replace(CUDA, before="eager", supports_sdpa=False)
    assert choose_attention("auto", alone).candidates == (FLEX, "eager", "sdpa")


def test_compiled_layers_get_dense_masks_on_a_cpu_and_flex_attention_on_cuda() -> None:
    assert choose_attention("auto", replace(CPU, compiles=True)).candidates == ("sdpa", "eager")
    assert choose_attention("auto", replace(CUDA, compiles=True)).candidates[0] == FLEX


@pytest.mark.parametrize("choice", ["split", "sdpa", "eager", "flex_attention"])
def test_a_named_attention_is_the_only_candidate(choice: str) -> None:
    named = {"split": SPLIT, "flex_attention": FLEX}.get(choice, choice)
    assert choose_attention(choice, CUDA).candidates == (named,)


def test_weights_on_the_meta_device_change_nothing() -> None:
    """Processes other than the main one may hold none when they decide."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config("llama"))
    full = tiny_model("llama")
    for device in ("cuda", "cpu"):
        options = {"device_type": device, "trains": True, "compiles": False}
        assert gather_facts(empty, **options) == gather_facts(full, **options)


@pytest.mark.parametrize(
    ("model_type", "overrides", "expected"),
    [
        ("llama", {"head_dim": 24}, {"head_dim": 24, "dropout": 0.0, "takes_flex": True}),
        ("llama", {"attention_dropout": 0.25}, {"dropout": 0.25}),
        ("falcon", {}, {"takes_flex": False}),
        # It leaves out block masks.
        ("doge", {}, {"takes_flex": False}),
        # Layers of several widths, about which the configuration has no one answer.
        ("gemma4_text", {"head_dim": 8, "global_head_dim": 16}, {"head_dim": 8, "widest_head": 16}),
        ("gemma4_text", {"num_kv_shared_layers": 2}, {"takes_flex": True}),
    ],
)
def test_facts_are_read_off_the_model(
    model_type: str, overrides: dict[str, object], expected: dict[str, object]
) -> None:
    model = tiny_model(model_type, **overrides)
    model.config.attention_dropout = overrides.get("attention_dropout", 0.0)
    facts = gather_facts(model, device_type="cuda", trains=True, compiles=False)
    assert {name: getattr(facts, name) for name in expected} == expected
    assert gather_facts(model, device_type=None, trains=False, compiles=False).dropout == 0.0


def test_what_auto_came_to_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    wide = tiny_model("llama", hidden_size=64, num_attention_heads=4, head_dim=16)
    with caplog.at_level(logging.INFO, logger="hf_ebft"):
        assert set_packed_attention(wide, "auto", device_type="cuda", trains=True) == FLEX
        narrow = tiny_model("llama", head_dim=8)
        assert set_packed_attention(narrow, "auto", device_type="cuda", trains=True) == "sdpa"
    flex, dense = (
        record.getMessage() for record in caplog.records if "for packed rows" in record.msg
    )
    assert "flex_attention" in flex and "cuda" in flex
    assert "sdpa attention with a mask of the whole row" in dense
    assert "because its heads are 8 wide" in dense
    assert attention_of(wide) == "flex_attention"


def test_a_model_that_comes_back_from_cuda_gets_the_attention_of_a_cpu() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(FLEX)
    assert PackedForward.for_model(model).recipe.implementation == SPLIT
