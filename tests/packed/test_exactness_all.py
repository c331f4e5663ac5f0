"""Every causal language model type of transformers is exact or refused, never silently wrong.

The fast half of `docs/architectures.md` is `test_exactness.py` and `test_refused_models.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hf_ebft.packed.model_parts import bare_model
from hf_ebft.packed.supported import gather_facts
from tests.support.architectures import (
    LAYERS,
    LIMIT,
    MODEL_TYPES,
    NOT_BUILT,
    tiny_config,
    tiny_model,
)
from tests.support.exactness import (
    TOLERANCE,
    Case,
    judge,
    masked_labels,
    packed_documents,
    ragged_batch,
)
from tools.architecture_table import (
    AMPLE,
    CASE,
    LONGEST,
    SHORT,
    build_and_judge,
    documented,
)

pytestmark = pytest.mark.slow

BUILT = [model_type for model_type in MODEL_TYPES if model_type not in NOT_BUILT]
VERSION, DOCUMENTED = documented()


def test_row_and_documents_enclose_the_limit() -> None:
    assert SHORT < LONGEST < LIMIT < CASE.layout().row_width < AMPLE


@pytest.mark.parametrize("model_type", BUILT)
def test_every_type_is_as_documented(model_type: str) -> None:
    verdict = build_and_judge(model_type, limit=AMPLE, attention=None)
    assert verdict is not None and verdict.outcome in ("exact", "refused"), verdict
    # Another release of transformers may have changed the model.
    if transformers.__version__ == VERSION:
        assert verdict.outcome == DOCUMENTED[model_type], verdict


@pytest.mark.skipif(transformers.__version__ != VERSION, reason="the page is of another release")
def test_the_page_lists_every_type() -> None:
    assert DOCUMENTED.keys() == set(BUILT)
    assert list(DOCUMENTED.values()).count("exact") >= 100


ACCEPTED = [model_type for model_type in BUILT if DOCUMENTED.get(model_type) != "refused"]


@pytest.mark.parametrize("attention", ["split", "sdpa", "eager"])
@pytest.mark.parametrize("model_type", ACCEPTED)
def test_lengths_between_document_and_row(model_type: str, attention: str) -> None:
    verdict = build_and_judge(model_type, limit=LIMIT, attention=attention)
    if verdict is None:
        pytest.skip(f"{model_type} has no {attention} attention")
    assert verdict.outcome in ("exact", "limited"), verdict


@pytest.mark.parametrize("model_type", ACCEPTED)
def test_flex_attention_is_exact_where_it_is_taken(model_type: str) -> None:
    """Traced as on a GPU, computed unfused."""
    model = tiny_model(model_type, limit=AMPLE)
    facts = gather_facts(bare_model(model), device_type="cpu", trains=False, compiles=False)
    if facts.why_not_flex is not None:
        pytest.skip(f"{model_type}: {facts.why_not_flex}")
    torch._dynamo.reset()
    assert judge(model, CASE, "flex_attention").outcome == "exact"


@pytest.mark.parametrize("model_type", ACCEPTED)
def test_lengths_below_the_document(model_type: str) -> None:
    verdict = build_and_judge(model_type, limit=SHORT, attention=None)
    assert verdict is not None and verdict.outcome != "wrong", verdict


@pytest.mark.parametrize("model_type", ACCEPTED)
@pytest.mark.parametrize(
    "case",
    [
        Case(packed_documents([15, 9, 4], [20]), stride=4, context_length=1, n_samples=3),
        Case(
            masked_labels(ragged_batch(26, 19, left=True), slice(0, 9), slice(15, 18)),
            stride=2,
            generate_max_len=3,
            n_samples=1,
        ),
    ],
    ids=["packed", "left padded"],
)
def test_packed_documents_and_masked_labels(model_type: str, case: Case) -> None:
    verdict = judge(tiny_model(model_type, limit=AMPLE), case)
    assert verdict.outcome == "exact", verdict
    assert verdict.differences.blocks > 5


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("model_type", ACCEPTED)
def test_layers_of_one_kind_only(model_type: str, kind: str) -> None:
    if "sliding_attention" not in (getattr(tiny_config(model_type), "layer_types", None) or ()):
        pytest.skip(f"{model_type} has one kind of layer only")
    try:
        model = tiny_model(model_type, limit=AMPLE, layer_types=[kind] * LAYERS)
    except (KeyError, ValueError) as error:
        pytest.skip(f"{model_type} cannot be built so: {error!r}")
    assert judge(model, CASE).outcome == "exact"


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **settings}}


LLAMA3 = {
    "original_max_position_embeddings": 12,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LONGROPE = {
    "original_max_position_embeddings": LONGEST,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
}
GEMMA4_EXPERTS = {
    "enable_moe_block": True,
    "top_k_experts": 2,
    "num_experts": 4,
    "moe_intermediate_size": 16,
}
# Configurations of accepted types that take other ways through their code.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama, linear rope": ("llama", rope("linear")),
    "llama, yarn": ("llama", rope("yarn", original_max_position_embeddings=12)),
    "llama, llama3 rope": (
        "llama",
        rope("llama3", **LLAMA3),
    ),
    "llama, dynamic rope": ("llama", rope("dynamic")),
    "llama, longrope": (
        "llama",
        rope("longrope", **LONGROPE),
    ),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, stray window": ("llama", {"sliding_window": 7}),
    "qwen2, no window": ("qwen2", {"use_sliding_window": False}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "llama4, no tuning": ("llama4_text", {"attn_temperature_tuning": False}),
    "llama4, rope everywhere": ("llama4_text", {"no_rope_layers": [1] * LAYERS}),
    "gpt_neo, global": ("gpt_neo", {"attention_types": [[["global"], LAYERS]]}),
    "granitemoehybrid, attention": ("granitemoehybrid", {"layer_types": ["attention"] * LAYERS}),
    "qwen3_next, attention": ("qwen3_next", {"layer_types": ["full_attention"] * LAYERS}),
    "kimi_linear, attention": ("kimi_linear", {"layer_types": ["full_attention"] * LAYERS}),
    "lfm2, attention": ("lfm2", {"layer_types": ["full_attention"] * LAYERS}),
    "ministral3, scaled": (
        "ministral3",
        rope("yarn", original_max_position_embeddings=12, llama_4_scaling_beta=0.5),
    ),
    "doge, few keys kept": ("doge", {"keep_window_size": 10}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "deepseek_v2, full queries": ("deepseek_v2", {"q_lora_rank": None}),
    "gemma3n, own keys": ("gemma3n_text", {"num_kv_shared_layers": 0}),
    "gemma4, keys as values": (
        "gemma4_text",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0},
    ),
    "gemma4, experts": ("gemma4_text", GEMMA4_EXPERTS),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_type(name: str) -> None:
    model_type, overrides = VARIANTS[name]
    verdict = judge(tiny_model(model_type, limit=AMPLE, **overrides), CASE)
    assert verdict.outcome == "exact", verdict
    assert verdict.differences.largest < TOLERANCE
