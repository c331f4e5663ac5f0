"""Every field of TRL's `GRPOConfig`: honoured, TRL's own business, or refused with a reason.

A new version of TRL with a new field makes `test_every_field_is_in_the_table` fail: find out
what the field does, and put it into one of the three tables below.
"""

import importlib
from dataclasses import fields

import pytest
from trl import GRPOConfig

from tests.support.tiny_structured import config

# Field: (a value that is refused, what the message says).
REFUSED = {
    "auto_find_batch_size": (True, "auto_find_batch_size is not supported"),
    "data_seed": (1, "data_seed=1 would have no effect.*Set seed"),
    "generation_kwargs": ({"max_new_tokens": 2}, "set by the field max_completion_length"),
    "label_smoothing_factor": (0.1, "label_smoothing_factor=0.1 would have no effect"),
    "max_tool_calling_iterations": (2, "structured mode refuses tools"),
    "multi_objective_aggregation": ("normalize_then_sum", "would divide finished advantages"),
    "neftune_noise_alpha": (5.0, "another policy than the one that sampled"),
    "remove_unused_columns": (True, "would drop the ground truth"),
    "scale_rewards": ("group", "advantage_estimator='group_norm'"),
    "train_sampling_strategy": ("sequential", "shuffle_dataset=False"),
    "vllm_importance_sampling_cap": (2.0, "with use_vllm=True only"),
    "vllm_importance_sampling_clip_max": (2.0, "with use_vllm=True only"),
    "vllm_importance_sampling_clip_min": (0.5, "with use_vllm=True only"),
    "vllm_importance_sampling_correction": (False, "with use_vllm=True only"),
    "vllm_importance_sampling_mode": ("token_truncate", "with use_vllm=True only"),
    "vllm_structured_outputs_regex": ("a+", "with use_vllm=True only"),
}
# Fields that our own code reads or has to agree with, and the test of it.
TESTED = {
    "test_trainer": {
        "test_accumulation_and_several_passes_train_on_the_same_advantages": "num_iterations",
        "test_adaptive_budget_cuts_completions": "max_completion_length",
        "test_advantages_in_the_loss_are_the_papers": "num_generations",
        "test_completions_table_has_the_ground_truth_beside_them": "log_completions",
        "test_cross_entropy_gradient_is_that_of_the_mean_over_prompts": """activation_checkpointing
            gradient_accumulation_steps gradient_checkpointing per_device_train_batch_size
            temperature""",
        "test_evaluation_takes_a_group_size_of_its_own": "num_generations_eval",
        "test_kl_penalty_leaves_advantages_as_they_are": "beta",
        "test_more_micro_batches_than_accumulation_weigh_every_prompt_alike": """
            steps_per_generation""",
        "test_resuming_repeats_the_uninterrupted_run": "resume_from_checkpoint",
        "test_rewards_of_ones_own_are_added": "reward_weights",
        "test_sampling_that_would_round_the_weights_is_refused": """
            use_transformers_continuous_batching""",
    },
    "test_datasets": {
        "test_fewer_prompts_than_one_generation_batch_are_refused": "generation_batch_size",
    },
    "test_encoding": {"test_template_options_are_used": "chat_template_kwargs"},
    "test_evaluation": {
        "test_batch_that_holds_no_whole_groups_is_refused": "per_device_eval_batch_size",
        "test_best_model_is_found_by_the_metric_of_one_set": """
            load_best_model_at_end metric_for_best_model""",
    },
    "vllm.test_settings": {
        "test_fields_that_trl_has_too_have_its_defaults": """
            vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout""",
    },
}
# Fields that TRL or `Trainer` reads, and that change no reward, ground truth or feature.
TRLS = {
    "the optimizer and its schedule": """
        adam_beta1 adam_beta2 adam_epsilon learning_rate lr_scheduler_kwargs lr_scheduler_type
        max_grad_norm max_steps num_train_epochs optim optim_args optim_target_modules warmup_steps
        weight_decay""",
    "GRPO's loss of given advantages": """
        average_tokens_across_devices delta entropy_coef entropy_coef_delta entropy_coef_max
        entropy_coef_min entropy_target epsilon epsilon_high importance_sampling_level loss_type
        mask_truncated_completions off_policy_mask_threshold ref_model_mixup_alpha
        ref_model_sync_steps router_aux_loss_coef sapo_temperature_neg sapo_temperature_pos
        sync_ref_model top_entropy_quantile use_adaptive_entropy use_bias_correction_kl vespo_k_neg
        vespo_k_pos vespo_lambda_neg vespo_lambda_pos""",
    "how the policy samples; rewards see the ids that come out": """
        cache_implementation disable_dropout ds3_gather_for_generation min_p repetition_penalty
        top_k top_p transformers_continuous_batching_config use_transformers_paged
        use_vllm vllm_enable_sleep_mode vllm_gpu_memory_utilization
        vllm_group_port vllm_max_model_length vllm_mode vllm_model_impl
        vllm_tensor_parallel_size""",
    "how the policy is loaded and computed, for sampling and loss alike": """
        bf16 bf16_full_eval cast_lm_head_to_fp32 fp16 fp16_full_eval full_determinism
        activation_checkpointing_kwargs gradient_checkpointing_kwargs liger_kernel_config
        model_init_kwargs tf32 torch_compile torch_compile_backend torch_compile_mode
        torch_empty_cache_steps trust_remote_code use_cache use_cpu use_liger_kernel""",
    "how processes and loaders share the work": """
        accelerator_config dataloader_drop_last dataloader_in_order
        dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
        dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
        ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout fsdp fsdp_config
        local_rank pad_to_multiple_of seed shuffle_dataset""",
    "refused by the trainer, see tests/training/test_parallelism.py": """
        deepspeed parallelism_config""",
    "logging, saving, evaluating and publishing": """
        batch_eval_metrics debug disable_tqdm do_eval do_predict do_train
        enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches
        eval_on_start eval_steps eval_strategy eval_use_gather_object greater_is_better
        hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
        ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names
        length_column_name log_completions_hub_repo log_level log_level_replica log_multimodal
        log_on_each_node log_unique_prompts logging_first_step logging_nan_inf_filter logging_steps
        logging_strategy num_completions_to_print output_dir prediction_loss_only project
        push_to_hub report_to restore_callback_states_from_checkpoint run_name save_on_each_node
        save_only_model save_steps save_strategy save_total_limit skip_memory_metrics
        trackio_bucket_id trackio_space_id trackio_static_space_id""",
}


def table():
    lines = [*TRLS.values(), *(names for tests in TESTED.values() for names in tests.values())]
    return [*REFUSED, *(name for line in lines for name in line.split())]


def test_every_field_is_in_the_table():
    known = {entry.name for entry in fields(GRPOConfig)}
    new, gone = known - set(table()), set(table()) - known
    assert not new, (
        f"TRL's GRPOConfig has new fields: {sorted(new)}. Find out whether each changes rewards, "
        "rollouts, ground truths or features: honour it and name the test in TESTED, refuse it in "
        "EBFTGRPOConfig and add it to REFUSED, or say in TRLS why it is no business of ours."
    )
    assert not gone, f"TRL's GRPOConfig no longer has {sorted(gone)}: take them out of the tables."
    assert len(table()) == len(set(table())), "a field stands in two tables"


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_field_is_refused_with_its_reason(tmp_path, name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize("module", TESTED)
def test_fields_have_their_tests(module):
    found = importlib.import_module(f"tests.structured.{module}")
    for name in TESTED[module]:
        assert hasattr(found, name), f"{module}.{name} is gone, and with it a field's test"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 2}, r"\{'max_new_tokens': 2\} is set by the field max_completion"),
        ({"max_length": 2}, "by the field max_completion_length"),
        ({"temperature": 0.5}, "by the field temperature"),
        ({"num_return_sequences": 2}, "by the field num_generations"),
        ({"eos_token_id": 3}, "other tokens than ground truths"),
        ({"do_sample": False}, "does not sample from the policy"),
        ({"num_beams": 4}, "does not sample from the policy"),
        ('{"max_new_tokens": 2}', "by the field max_completion_length"),
    ],
)
def test_generation_kwargs_that_would_be_overwritten_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, generation_kwargs=given)


def test_other_generation_kwargs_reach_the_sampler(tmp_path):
    from hf_ebft.structured import EBFTGRPOTrainer
    from tests.support.tiny_structured import policy, rows, tokenizer

    trainer = EBFTGRPOTrainer(
        policy(),
        config(tmp_path, generation_kwargs={"suppress_tokens": [3]}),
        train_dataset=rows(),
        processing_class=tokenizer(),
    )
    assert trainer.generation_config.suppress_tokens == [3]
