"""Tiny random models of every causal language model type that transformers has.

One table of sizes serves all configuration classes, since most of them name their fields alike;
what a type needs beyond it is in `OVERRIDES`. Lengths are small on purpose: every window is
shorter than the test's documents, and every other limit lies between the longest document and the
packed row, which is where real training runs, so that a model which treats a long row differently
is caught.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
# Types that cannot be built here, and why.
NOT_BUILT = {
    "gemma3n": "its vision tower needs the timm package; its text model is gemma3n_text",
    "gemma4_assistant": "drafts for another model, whose keys and values it needs",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it needs",
    "musicgen": "AutoModelForCausalLM cannot build it from its configuration",
    "musicgen_melody": "AutoModelForCausalLM cannot build it from its configuration",
}

VOCABULARY = 64
# Sliding windows and chunks. Documents of the tests are longer.
WINDOW = 7
# Positions, selected keys, attention scaling and so on. Documents are shorter, packed rows longer.
LIMIT = 48
LIMITED_FIELDS = (
    "floor_scale",
    "index_topk",
    "keep_window_size",
    "log_scaling_n_floor",
    "max_position_embeddings",
    "max_seq_len",
    "n_positions",
    "original_max_position_embeddings",
    "window_size",
)

LAYERS, HEADS, HIDDEN, MLP = 4, 4, 32, 48
# Value of a configuration field, in every class that has one of that name.
SIZES: dict[str, Any] = (
    dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS)
    | dict.fromkeys(("decoder_layers", "num_decoder_layers"), LAYERS)
    | dict.fromkeys(("encoder_layers", "num_encoder_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS)
    | dict.fromkeys(("attention_heads", "decoder_attention_heads"), HEADS)
    | dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads"), HEADS)
    | dict.fromkeys(("num_decoder_attention_heads",), HEADS)
    | dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim"), HIDDEN)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "dim_ff", "d_inner", "dff"), MLP)
    | dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size"), MLP)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16)
    | dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4)
    | dict.fromkeys(LIMITED_FIELDS, LIMIT)
    | dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention"), WINDOW)
    | dict.fromkeys(("attention_chunk_size",), WINDOW)
    | dict.fromkeys(("head_dim", "v_head_dim", "rotary_dim"), 8)
    | dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim"), 8)
    | dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16)
    | {
        "vocab_size": VOCABULARY,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "index_n_heads": 2,
        "first_k_dense_replace": 1,
        "use_sliding_window": True,
        "max_window_layers": 2,
        "is_decoder": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "mamba_d_state": 8,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_chunk_size": 8,
        "chunk_size": 8,
        "state_size": 8,
    }
)


class _ClassDefault:
    """Marks a field of `SIZES` that a type leaves at its class's default."""


KEEP = _ClassDefault()


class _Part:
    """The configuration of a part (text decoder, vision tower) of a composite model."""

    def __init__(self, model_type: str, **overrides: Any) -> None:
        self.model_type = model_type
        self.overrides = overrides

    def to_dict(self, limit: int) -> dict[str, Any]:
        return tiny_config(self.model_type, limit=limit, **self.overrides).to_dict()


MIXED_WINDOWS = ["sliding_attention", "full_attention"] * 2
HYBRID = ["linear_attention", "full_attention"] * 2
LOW_RANK = {"head_dim": KEEP, "num_key_value_heads": HEADS}
LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": HYBRID,
}
IMAGE = {"image_size": 16, "patch_size": 8}
PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
GEMMA4 = {"global_head_dim": 16, "layer_types": MIXED_WINDOWS}
INKLING = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "unpadded_vocab_size": VOCABULARY,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
}

# What a type needs beyond SIZES.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": LOW_RANK,
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "vocab_size": KEEP,
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": _Part("blt_patcher"),
        "encoder_config": _Part("blt_local_encoder"),
        "decoder_config": _Part("blt_local_decoder"),
        "global_config": _Part("blt_global_transformer"),
    },
    "cohere2": {"layer_types": MIXED_WINDOWS},
    "cohere2_moe": {"layer_types": MIXED_WINDOWS},
    "cohere_compass_text": {
        "layer_types": MIXED_WINDOWS,
        "rope_parameters": {
            kind: {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            }
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "cpmant": {"dim_head": 8, "prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "deepseek_v2": LOW_RANK,
    "deepseek_v3": LOW_RANK,
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "initializer_range": 1.0},
    "dots3_note": {
        "text_config": _Part("dots3_note_text"),
        "vision_config": {"adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_out_dim": HIDDEN},
    },
    "dots3_note_text": {
        "num_key_value_heads": HEADS,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "head_dim": 16,
        "shared_experts_intermediate_size": 16,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    },
    "emu3": {
        "text_config": _Part("emu3_text_model"),
        "vq_config": _Part(
            "emu3_vqgan",
            base_channels=32,
            channel_multiplier=[1],
            num_res_blocks=1,
            codebook_size=8,
        ),
        "vocabulary_map": {"<image>": 3},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "fuyu": {"text_config": _Part("persimmon"), "image_token_id": 3, **IMAGE},
    "gemma2": {"layer_types": MIXED_WINDOWS},
    "gemma3": {
        "text_config": _Part("gemma3_text"),
        "vision_config": _Part("siglip_vision_model", **IMAGE),
        "mm_tokens_per_image": 4,
        "image_token_index": 3,
    },
    "gemma3_text": {"layer_types": MIXED_WINDOWS},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": MIXED_WINDOWS, **PER_LAYER_INPUTS},
    "gemma4": {
        "text_config": _Part("gemma4_text"),
        "vision_config": _Part("gemma4_vision", position_embedding_size=16),
        "audio_config": None,
        "image_token_id": 3,
    },
    "gemma4_text": {"num_kv_shared_layers": 2, **GEMMA4, **PER_LAYER_INPUTS},
    "gemma4_unified": {
        "text_config": _Part("gemma4_unified_text"),
        "vision_config": None,
        "audio_config": None,
        "image_token_id": 3,
    },
    "gemma4_unified_text": GEMMA4,
    "git": {"vision_config": _Part("git_vision_model", **IMAGE)},
    "glm4_moe_lite": LOW_RANK,
    "got_ocr2": {
        "text_config": _Part("qwen2"),
        "vision_config": _Part(
            "got_ocr2_vision", mlp_dim=MLP, output_channels=8, global_attn_indexes=[1], **IMAGE
        ),
        "image_token_index": 3,
    },
    "gpt_neox": {"is_decoder": KEEP},
    "gpt_neox_japanese": {"is_decoder": KEEP},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "hrm_text": {"num_hidden_layers": 2, "H_cycles": 1, "L_cycles": 2, "L_bp_cycles": [1, 1]},
    "inkling2_text": INKLING,
    "inkling_text": INKLING,
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": HEADS, **LOW_RANK},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4": {
        "text_config": _Part("llama4_text"),
        "vision_config": _Part("llama4_vision_model", **IMAGE),
        "image_token_index": 3,
    },
    "llama4_text": {"intermediate_size_mlp": MLP},
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": MLP,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "num_key_value_heads": HEADS,
    },
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "minicpm3": {"dim_model_base": HIDDEN, **LOW_RANK},
    "minimax_m3_vl_text": {
        "dense_intermediate_size": MLP,
        "shared_intermediate_size": 16,
        "index_block_size": 8,
        "index_topk_blocks": 4,
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
    },
    "mllama": {
        "text_config": _Part("mllama_text_model", cross_attention_layers=[1]),
        "vision_config": _Part("mllama_vision_model", num_global_layers=1, **IMAGE),
        "image_token_index": 3,
    },
    "moss_transcribe_diarize": {
        "text_config": _Part("qwen3"),
        "audio_config": _Part("moss_transcribe_diarize_audio"),
        "audio_token_id": 3,
    },
    "phi4_multimodal": {
        "vision_config": _Part("phi4_multimodal_vision", crop_size=16, **IMAGE),
        "audio_config": _Part(
            "phi4_multimodal_audio",
            num_blocks=1,
            nemo_conv_channels=8,
            ext_pw_out_channel=8,
            depthwise_separable_out_channel=8,
        ),
        "original_max_position_embeddings": LIMIT,
    },
    "qwen3_5": {
        "text_config": _Part("qwen3_5_text"),
        "vision_config": _Part("qwen3_5_vision", depth=1, out_hidden_size=HIDDEN),
        "image_token_id": 3,
    },
    "qwen3_5_moe": {
        "text_config": _Part("qwen3_5_moe_text"),
        "vision_config": _Part("qwen3_5_moe_vision", depth=1, out_hidden_size=HIDDEN),
        "image_token_id": 3,
    },
    "qwen3_5_moe_text": LINEAR_ATTENTION,
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_next": LINEAR_ATTENTION,
    "qwen4_exp": {
        "text_config": _Part("qwen4_exp_text"),
        "vision_config": _Part("qwen4_exp_vision", depth=1, out_hidden_size=HIDDEN),
        "image_token_id": 3,
    },
    "qwen4_exp_text": {
        **LINEAR_ATTENTION,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "attention_head_size": 8,
        "num_buckets": 4,
        "max_position_embeddings": 64,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_embed_dim": 8,
        "shape_vocab_size": VOCABULARY,
    },
    "youtu": LOW_RANK,
    "sarvam_mla": LOW_RANK,
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": HEADS,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": HEADS,
        "n_mamba_heads": 4,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
        "layer_types": ["hybrid"] * LAYERS,
    },
}


def tiny_config(model_type: str, *, limit: int = LIMIT, **overrides: Any) -> PreTrainedConfig:
    """The smallest sensible configuration of a type.

    Args:
        model_type: one of `MODEL_TYPES`, or the type of a part.
        limit: what stands for the lengths in `LIMITED_FIELDS`.
        **overrides: fields to set otherwise.
    """
    config_class = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(config_class)}
    sizes = SIZES | dict.fromkeys(LIMITED_FIELDS, limit)
    settings = {name: value for name, value in sizes.items() if name in fields}
    settings |= OVERRIDES.get(model_type, {}) | overrides
    # Without dropout a model must say the same in training mode.
    settings |= {name: 0.0 for name in fields if "drop" in name or "jitter_noise" in name}
    return config_class(
        **{
            name: value.to_dict(limit) if isinstance(value, _Part) else value
            for name, value in settings.items()
            if value is not KEEP
        }
    )


def tiny_model(
    model_type: str, *, limit: int = LIMIT, attention: str | None = None, **overrides: Any
) -> PreTrainedModel:
    """A random model of a type in evaluation mode, float32, with weights large enough to matter.

    Raises:
        ValueError: the type does not have this attention implementation.
    """
    config = tiny_config(model_type, limit=limit, **overrides)
    chosen = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(config, **chosen)
    widen(model)
    return model.eval()


def widen(model: nn.Module) -> None:
    """Random weights of unit gain.

    With the usual small ones, hidden states are nearly constant and a token that sees too much
    changes nothing that a tolerance of 1e-4 could tell.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
