"""What cannot be exact on packed rows is refused before training, and says why and what to do.

`test_exactness_all.py` checks the other half over all model types: what is not refused is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

import hf_ebft.packed.verification
from hf_ebft import EBFTConfig, EBFTTrainer
from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.masks import SPLIT
from hf_ebft.packed.supported import set_packed_attention
from hf_ebft.packed.verification import verify_packing
from tests.support.architectures import MODEL_TYPES, tiny_config, tiny_model, widen
from tests.support.exactness import Case, measure, packed_documents, ragged_batch


def skeleton(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A model without weights: refusals read the configuration and the code alone."""
    if model_type not in MODEL_TYPES:
        pytest.skip(f"this release of transformers has no {model_type}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides))


RECURRENT = "carries a recurrent state.*layers are all attention layers"
LAYERS = "layers of type .*all of type chunked_attention, full_attention, sliding_attention"
NO_POSITIONS = "takes no position_ids.*rotary or learned position embeddings"
FUTURE = "a token sees the text after it.*causal language model"
KEPT_APART = "cannot be kept apart.*another architecture"
PADDING = "position ids after its padding id.*position ids start at 0"

REFUSED = [
    ("bamba", RECURRENT),
    ("bailing_hybrid", RECURRENT),
    ("deepseek_v4", RECURRENT),
    ("falcon_h1", RECURRENT),
    ("falcon_mamba", RECURRENT),
    ("granitemoehybrid", RECURRENT),
    ("jamba", RECURRENT),
    ("kimi_linear", RECURRENT),
    ("mamba", RECURRENT),
    ("mamba2", RECURRENT),
    ("nemotron_h", RECURRENT),
    ("olmo_hybrid", RECURRENT),
    ("qwen3_5_text", RECURRENT),
    ("qwen3_5", RECURRENT),
    ("qwen3_next", RECURRENT),
    ("recurrent_gemma", RECURRENT),
    ("rwkv", RECURRENT),
    ("xlstm", RECURRENT),
    ("zamba", RECURRENT),
    ("zamba2", RECURRENT),
    # Convolutions and gated delta rules beside attention.
    ("inkling_text", LAYERS),
    ("lfm2", LAYERS),
    ("lfm2_moe", LAYERS),
    ("minimax", LAYERS),
    # Layers that pick keys by a learned score.
    ("deepseek_v32", LAYERS),
    ("glm_moe_dsa", LAYERS),
    ("minimax_m3_vl_text", LAYERS),
    # ALiBi and relative positions.
    ("bloom", NO_POSITIONS),
    ("mpt", NO_POSITIONS),
    ("xlnet", NO_POSITIONS),
    # Decoders of encoder-decoder models.
    ("bart", NO_POSITIONS),
    ("whisper", NO_POSITIONS),
    ("blt", KEPT_APART),
    ("openai-gpt", KEPT_APART),
    ("reformer", KEPT_APART),
    ("xlm", KEPT_APART),
    ("roberta", PADDING),
    ("xlm-roberta", PADDING),
]


@pytest.mark.parametrize(("model_type", "reason"), REFUSED)
def test_types_that_cannot_be_exact(model_type: str, reason: str) -> None:
    model = skeleton(model_type)
    with pytest.raises(ValueError, match=f"^{type(model).__name__}.*{reason}"):
        PackedForward.for_model(model)


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        (
            "mixtral",
            {"output_router_logits": True},
            "load-balancing loss.*Set model.config",
        ),
        ("llama", {"return_dict": False}, "tuple without names.*return_dict = True"),
        ("falcon", {"alibi": True}, "ALiBi.*rotary or learned"),
        ("bert", {"is_decoder": False}, FUTURE),
        ("megatron-bert", {"is_decoder": False}, FUTURE),
        ("gemma3_text", {"use_bidirectional_attention": True}, FUTURE),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, FUTURE),
        ("llama", {"is_causal": False}, FUTURE),
    ],
)
def test_configurations_that_cannot_be_exact(
    model_type: str, overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        PackedForward.for_model(skeleton(model_type, **overrides))


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        # GPT-NeoX's own default, which its code does not read.
        ("gpt_neox", {"is_decoder": False}),
        # Granite 4's dense models use the class of the hybrid ones.
        ("granitemoehybrid", {"layer_types": ["attention"] * 4}),
        ("lfm2", {"layer_types": ["full_attention"] * 4}),
        ("minimax_m3_vl_text", {"layer_types": ["full_attention"] * 4}),
    ],
)
def test_relatives_of_refused_models_that_are_exact(
    model_type: str, overrides: dict[str, Any]
) -> None:
    model = tiny_model(model_type, **overrides)
    assert measure(model, Case(ragged_batch(33, 21), stride=6)).largest < 1e-4


def test_encoder_decoder_models() -> None:
    config = tiny_config("bart").to_dict()
    with torch.device("meta"):
        model = BartForConditionalGeneration(BartConfig(**config))
    with pytest.raises(ValueError, match="encoder-decoder model; EBFT needs a causal"):
        PackedForward.for_model(model)


def test_modules_that_are_no_transformers_model() -> None:
    with pytest.raises(ValueError, match=r"Linear is not a transformers model"):
        PackedForward.for_model(nn.Linear(2, 2))


def test_trainer_and_feature_network_refuse_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=RECURRENT):
        FeatureNetwork(
            tiny_model("mamba"),
            feature_layers=(0.5,),
            embed_method="last_token",
            normalization="per_layer",
        )
    arguments = EBFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    rows = [{"input_ids": list(range(5, 45))}]
    with pytest.raises(ValueError, match=RECURRENT):
        EBFTTrainer(model=tiny_model("mamba"), args=arguments, train_dataset=rows)


# ---- Lengths ------------------------------------------------------------------------------------

LONGROPE = {
    "original_max_position_embeddings": 20,
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
    },
}
DYNAMIC = {
    "max_position_embeddings": 20,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}
# One type of layer scales dynamically, the other linearly.
MIXED = {
    "max_position_embeddings": 20,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
}


def test_documents_beyond_what_a_rotary_embedding_is_exact_for() -> None:
    for model_type, overrides in [("phi3", LONGROPE), ("llama", DYNAMIC), ("gemma3_text", MIXED)]:
        model = tiny_model(model_type, **overrides)
        within = measure(model, Case(ragged_batch(20, 17), stride=3))
        assert within.largest < 1e-4, (model_type, within)
        with pytest.raises(ValueError, match=r"21 tokens.*rotary embedding.*beyond 20 tokens.*Cut"):
            measure(model, Case(ragged_batch(21), stride=3))


def test_documents_beyond_the_learned_positions() -> None:
    model = tiny_model("gpt2", limit=20)
    assert measure(model, Case(ragged_batch(20), stride=3)).largest < 1e-4
    with pytest.raises(ValueError, match="no position embeddings beyond 20 tokens"):
        measure(model, Case(ragged_batch(21), stride=3))
    with pytest.raises(ValueError, match=r"21 tokens \(in row 1 of the batch\)"):
        measure(model, Case(ragged_batch(20, 21), stride=3))
    # Positions restart in each document of a row.
    assert measure(model, Case(packed_documents([20, 18]), stride=3)).largest < 1e-4


def test_rows_beyond_what_depends_on_the_place_in_the_row() -> None:
    case = Case(ragged_batch(21), stride=6, generate_max_len=3)
    width = case.layout().row_width
    for model_type, overrides, reason in [
        ("llama4_text", {"floor_scale": width + 1}, "attention temperature"),
        ("gpt_neo", {"window_size": width, "max_position_embeddings": 64}, "local layers"),
        ("gpt_neo", {"window_size": 64, "max_position_embeddings": width}, "no causal mask"),
        ("big_bird", {"max_position_embeddings": width}, "no token types"),
    ]:
        model = tiny_model(model_type, **overrides)
        assert measure(model, case).largest < 1e-4
        longer = Case(ragged_batch(22), stride=6, generate_max_len=3)
        assert longer.layout().row_width == width + 1
        with pytest.raises(
            ValueError, match=f"{width + 1} tokens.*{reason}.*beyond {width}.*fewer"
        ):
            measure(model, longer)


def test_llama4_without_temperature_tuning_has_no_limit() -> None:
    model = tiny_model("llama4_text", attn_temperature_tuning=False)
    case = Case(ragged_batch(40), stride=6)
    assert case.layout().row_width > model.config.floor_scale
    assert measure(model, case).largest < 1e-4


# ---- Attention implementations ------------------------------------------------------------------


@pytest.mark.parametrize("set_by_hand", ["flash_attention_2", "flash_attention_3", "paged|sdpa"])
def test_other_attention_is_switched_and_told(
    set_by_hand: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = set_by_hand
    with caplog.at_level("WARNING", "hf_ebft"):
        forward = PackedForward.for_model(model)
    assert forward.recipe.implementation == SPLIT == model.config._attn_implementation
    assert f"switched from {set_by_hand} to {SPLIT}" in caplog.text


def test_attention_is_left_alone_where_it_can_express_the_mask(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    assert PackedForward.for_model(model).recipe.implementation == "eager"
    assert not caplog.records


def test_chosen_attention_is_set() -> None:
    model = tiny_model("llama")
    assert set_packed_attention(model, "eager") == "eager"
    assert PackedForward.for_model(model, "sdpa").recipe.implementation == "sdpa"


def test_attention_that_a_model_does_not_have_is_refused() -> None:
    model = tiny_model("gpt_neo")
    with pytest.raises(ValueError, match=r"GPTNeo.*'eager' and cannot be switched to one of.*sdpa"):
        PackedForward.for_model(model, "sdpa")


# ---- The self-test ------------------------------------------------------------------------------


class RowIndexed(LlamaForCausalLM):
    """Adds an embedding of the place in the row."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.places = nn.Embedding(512, config.hidden_size)
        self.model.embed_tokens.register_forward_hook(self._add_places)

    def _add_places(self, _module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
        return embedded + self.places.weight[: embedded.shape[1]]


class Maskless(LlamaForCausalLM):
    """Takes a mask and ignores it."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)


class Positionless(LlamaForCausalLM):
    """Takes position ids and ignores them."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class Picky(LlamaForCausalLM):
    """Takes masks of two dimensions only."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is not None and attention_mask.dim() != 2:
            raise RuntimeError("a mask of four dimensions")
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)


def built(model_class: Callable[[PreTrainedConfig], PreTrainedModel]) -> PreTrainedModel:
    model = model_class(tiny_config("llama"))
    widen(model)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_class", [RowIndexed, Maskless, Positionless])
def test_self_test_catches_what_no_rule_knows(model_class: Any, dtype: torch.dtype) -> None:
    model = built(model_class).to(dtype)
    with pytest.raises(
        ValueError, match=r"other log-probabilities on a packed row.*verify_packing=False"
    ):
        verify_packing(model, PackedForward.for_model(model))


def test_self_test_turns_failures_into_refusals() -> None:
    model = built(Picky)
    with pytest.raises(
        ValueError, match=r"Picky fails on a packed row \(RuntimeError: a mask of four"
    ):
        verify_packing(model, PackedForward.for_model(model))


def test_self_test_catches_a_window_that_only_the_configuration_has() -> None:
    # Longer than the probe's document: the window has to shrink for it to show.
    model = tiny_model("llama", sliding_window=4096)
    forward = PackedForward.for_model(model)
    misread = replace(forward, recipe=replace(forward.recipe, layer_types=("sliding_attention",)))
    assert verify_packing(model, forward) < 1e-6
    with pytest.raises(ValueError, match="other log-probabilities"):
        verify_packing(model, misread)
    assert model.config.sliding_window == 4096


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "llama4_text", "gpt_oss"])
def test_self_test_leaves_the_model_as_it_was(model_type: str) -> None:
    model = tiny_model(model_type, limit=4096).train()
    before = model.config.to_dict()
    assert verify_packing(model, PackedForward.for_model(model)) < 1e-6
    assert model.config.to_dict() == before
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma3_text"])
def test_self_test_allows_for_the_rounding_of_low_precision(
    model_type: str, dtype: torch.dtype
) -> None:
    model = tiny_model(model_type).to(dtype)
    assert verify_packing(model, PackedForward.for_model(model)) < 1e-2


def test_self_test_allows_for_unlikely_tokens_far_off_in_low_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In bfloat16 the logits of a large vocabulary are half a nat off at their worst, in the tail.
    def rounded(*arguments: Any) -> Tensor:
        log_probs = packed_log_probs(*arguments)
        worst = log_probs.argmin(dim=-1, keepdim=True)
        return log_probs.scatter_add(-1, worst, torch.full_like(log_probs, 0.5))

    packed_log_probs = hf_ebft.packed.verification._packed_log_probs
    monkeypatch.setattr(hf_ebft.packed.verification, "_packed_log_probs", rounded)
    model = tiny_model("llama").to(torch.bfloat16)
    assert verify_packing(model, PackedForward.for_model(model)) < 1e-2


def test_self_test_passes_on_diverged_weights_as_such() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        verify_packing(model, PackedForward.for_model(model))


def test_trainer_runs_the_self_test_unless_told_not_to(tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(5, 45))}]
    arguments = EBFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="other log-probabilities on a packed row"):
        EBFTTrainer(model=built(RowIndexed), args=arguments, train_dataset=rows)
    arguments.verify_packing = False
    EBFTTrainer(model=built(RowIndexed), args=arguments, train_dataset=rows)


class Ragged(LlamaForCausalLM):
    """Confuses the rows of a batch as soon as one of them has padding."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        if (input_ids == 0).any():
            input_ids = input_ids.flip(0)
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )


def test_self_test_reads_ragged_rows() -> None:
    """A model that is exact on one row alone may treat padding or other rows wrongly."""
    model = built(Ragged)
    with pytest.raises(ValueError, match="other log-probabilities on a packed row"):
        verify_packing(model, PackedForward.for_model(model))


class Forgetful(LlamaForCausalLM):
    """Mixes up the tokens of a decoding step."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            input_ids = input_ids.roll(1, dims=1)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


def test_self_test_checks_the_cached_sampler() -> None:
    model = built(Forgetful)
    with pytest.raises(ValueError, match="other log-probabilities on a packed row"):
        verify_packing(model, PackedForward.for_model(model))


def test_models_without_a_head_are_refused_for_that() -> None:
    """The self-test said that the model took no position ids."""
    model = tiny_model("llama").model
    with pytest.raises(ValueError, match=r"LlamaModel has no language-model head.*ForCausalLM"):
        verify_packing(model, PackedForward.for_model(model))
