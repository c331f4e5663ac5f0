"""Tables of axolotl's keys: our names for them, and reasons why some have no counterpart."""

from __future__ import annotations

from typing import Any

#: Keys with the same meaning in both modes: axolotl's name -> ours.
SAME: dict[str, str] = {
    "base_model": "model_name_or_path",
    "revision_of_model": "model_revision",
    "tokenizer_config": "tokenizer_name_or_path",
    "trust_remote_code": "trust_remote_code",
    "attn_implementation": "attn_implementation",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "num_epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "learning_rate": "learning_rate",
    "optimizer": "optim",
    "optim_args": "optim_args",
    "lr_scheduler": "lr_scheduler_type",
    "lr_scheduler_kwargs": "lr_scheduler_kwargs",
    "warmup_steps": "warmup_steps",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of all steps
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "gradient_checkpointing": "gradient_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "lora_r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "output_dir": "output_dir",
    "logging_steps": "logging_steps",
    "save_steps": "save_steps",
    "save_strategy": "save_strategy",
    "save_total_limit": "save_total_limit",
    "eval_steps": "eval_steps",
    "eval_strategy": "eval_strategy",
    "resume_from_checkpoint": "resume_from_checkpoint",
    "seed": "seed",
    "tf32": "tf32",
    "wandb_name": "run_name",
    "hub_model_id": "hub_model_id",
    "dataloader_num_workers": "dataloader_num_workers",
    "dataloader_pin_memory": "dataloader_pin_memory",
    "dataloader_prefetch_factor": "dataloader_prefetch_factor",
    "dataloader_drop_last": "dataloader_drop_last",
    "ddp_timeout": "ddp_timeout",
}
#: Keys of adapters -> options; the default of all is false.
ADAPTERS: dict[str, str] = {
    "load_in_8bit": "load_in_8bit",
    "load_in_4bit": "load_in_4bit",
    "lora_modules_to_save": "lora_modules_to_save",
    "lora_target_parameters": "lora_target_parameters",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
}
#: Keys of `ebft` that both modes have.
EBFT_SAME = (
    "feature_layers",
    "embed_method",
    "use_whitening",
    "alignment_coef",
    "diversity_coef",
    "ce_coef",
)
#: Keys of `ebft` for strided mode; the names are ours.
EBFT_STRIDED = (
    "stride",
    "context_length",
    "generate_max_len",
    "n_samples_per_prompt",
    "temperature",
    "top_p",
    "rl_coef",
    "advantage_estimator",
    "min_completion_prefix",
)
#: Keys of `ebft` for structured mode; the names are ours.
EBFT_STRUCTURED = ("adaptive_max_tokens", "gt_length_multiplier")
#: axolotl's defaults that are not ours, with the modes that have the option.
OTHER_DEFAULTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "use_whitening": (False, ("strided", "structured")),
    "adaptive_max_tokens": (True, ("structured",)),
    "lr_scheduler_type": ("cosine", ("strided", "structured")),
    "adam_beta2": (0.999, ("strided", "structured")),
}
#: Keys of `trl` that `trl.GRPOConfig` and ours have by the same name.
TRL_SAME = (
    # groups and lengths
    "num_generations",
    "num_generations_eval",
    "generation_batch_size",
    "steps_per_generation",
    "max_completion_length",
    "shuffle_dataset",
    "pad_to_multiple_of",
    # sampling
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "chat_template_kwargs",
    "cache_implementation",
    "use_transformers_continuous_batching",
    "transformers_continuous_batching_config",
    # loss
    "loss_type",
    "epsilon",
    "epsilon_high",
    "delta",
    "beta",
    "num_iterations",
    "mask_truncated_completions",
    "importance_sampling_level",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "off_policy_mask_threshold",
    "use_bias_correction_kl",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "entropy_coef_min",
    "entropy_coef_max",
    "entropy_coef_delta",
    "entropy_target",
    "multi_objective_aggregation",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    # model
    "disable_dropout",
    "cast_lm_head_to_fp32",
    "router_aux_loss_coef",
    # logging
    "log_completions",
    "num_completions_to_print",
    "log_unique_prompts",
    "log_completions_hub_repo",
    # vLLM
    "vllm_mode",
    "vllm_model_impl",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
    "vllm_enable_sleep_mode",
    "vllm_structured_outputs_regex",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)
#: Keys of `trl` that have another name here.
TRL_RENAMED: dict[str, str] = {
    "vllm_max_model_len": "vllm_max_model_length",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
}
#: Keys of `trl` without a counterpart, and why.
TRL_NO_PLACE: dict[str, str] = {
    "scale_rewards": "advantages are not divided by a standard deviation; advantage_estimator: "
    "group_norm is the estimator that does",
    "reward_funcs": "the script has one reward, feature matching; add others in a script of yours",
    "reward_weights": "the script has one reward, feature matching; alignment_coef and "
    "diversity_coef weigh its parts",
    "model_init_kwargs": "the script loads the model; see dtype, attn_implementation",
    "trust_remote_code": "it is a key of the file itself, outside trl",
    "ds3_gather_for_generation": "DeepSpeed is not supported",
    "max_tool_calling_iterations": "structured mode has no tools",
    "log_multimodal": "structured mode embeds text only",
    "use_transformers_paged": "TRL has given it up; use_transformers_continuous_batching took its "
    "place",
    "vllm_importance_sampling_cap": "TRL has given it up; vllm_importance_sampling_clip_max took "
    "its place",
    "vllm_dtype": "give it to hf-ebft serve after --, as vLLM calls it",
    "vllm_enable_prefix_caching": "give it to hf-ebft serve after --, as vLLM calls it",
    "vllm_device": "TRL has given it up; CUDA_VISIBLE_DEVICES of the server's process says it",
    "rollout_func": "it is code; the script takes the rollouts that the data needs",
}
#: Keys of `vllm` that `hf-ebft serve` reads from our file.
VLLM_SAME: dict[str, str] = {
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "max_model_len": "vllm_max_model_length",
    "port": "vllm_server_port",
}
#: Keys without a counterpart, and why.
NO_PLACE: dict[str, str] = {
    "chat_template": "the tokenizer's own template is used; set it with the tokenizer",
    "special_tokens": "the tokenizer's own are used; without a pad token it pads with EOS",
    "torch_compile": "strided mode compiles what it needs itself",
    "ddp": "accelerate launch and its configuration decide how processes share the work",
    "device_map": "accelerate decides where the model is",
    "deepspeed": "not supported; see accelerate_configs/ for DDP and FSDP2",
    "fsdp": "see accelerate_configs/fsdp2*.yaml, given to accelerate launch",
    "fsdp_config": "see accelerate_configs/fsdp2*.yaml, given to accelerate launch",
    "fsdp_version": "see accelerate_configs/fsdp2*.yaml, given to accelerate launch",
    "sample_packing": "packing is `pack: true`, for strided mode on text",
    "dataset_prepared_path": "datasets caches what it has prepared by itself",
    "wandb_entity": "set the environment variable WANDB_ENTITY",
}
