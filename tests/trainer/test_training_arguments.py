"""Every field of `TrainingArguments`: has an effect, is Trainer's own business, or is refused.

A release of transformers with a new field makes `test_every_field_is_in_the_table` fail: find out
whether the field changes a forward pass or the loss, and put it into one of the tables below.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import TrainingArguments

from hf_ebft import EBFTTrainer
from tests.support.tiny import assert_same_tensors, config, texts, tiny_llama, weights_of

TESTS = Path(__file__).parents[1]

# Field: (a value that is refused, the end of the message). Values are set on made arguments: some
# need libraries that are not installed to be made.
REFUSED: dict[str, tuple[Any, str]] = {
    "average_tokens_across_devices": (False, "mean over the documents of the step"),
    "deepspeed": ({"zero_optimization": {"stage": 2}}, "DeepSpeed is not supported"),
    "label_smoothing_factor": (0.1, "no meaning for the EBFT loss"),
}
# Fields that change a forward pass, the loss, or what our own code reads: the test of each.
TESTED = {
    "trainer/test_bad_input.py": {
        "test_a_loss_that_is_not_finite_stops_training": "logging_nan_inf_filter",
    },
    "trainer/test_drop_in.py": {
        "test_bf16_autocast": "bf16",
        "test_both_names_of_activation_checkpointing": """
            activation_checkpointing gradient_checkpointing""",
        "test_columns_that_ebft_understands_are_kept": "remove_unused_columns",
        "test_evaluation_is_that_of_trainer": "per_device_eval_batch_size",
        "test_evaluation_with_bf16_full_eval": "bf16_full_eval",
        "test_fp16_on_a_cpu_does_what_it_does_in_trainer": "fp16",
        "test_losses_that_are_asked_for_are_logged": "include_for_metrics",
        "test_push_to_hub": "push_to_hub",
        "test_tensorboard_shows_every_curve": "report_to",
        "test_the_best_model_by_cfm_loss_is_loaded_at_the_end": """
            load_best_model_at_end metric_for_best_model greater_is_better""",
        "test_the_script_leaves_the_same_files": "output_dir",
    },
    "trainer/test_invariants.py": {
        "test_a_compiled_policy_trains_the_same": """
            torch_compile torch_compile_backend torch_compile_mode""",
        "test_a_resumed_run_equals_the_uninterrupted_one": "save_steps save_strategy",
        "test_accumulation_gives_the_gradient_of_one_batch": """
            gradient_accumulation_steps per_device_train_batch_size""",
        "test_gradient_checkpointing_changes_no_bit": """
            activation_checkpointing_kwargs gradient_checkpointing_kwargs""",
        "test_logged_metrics_are_means_over_accumulation_and_steps": "logging_steps",
        "test_rollouts_depend_on_seed_step_and_micro_batch": "seed",
    },
    "trainer/test_training_arguments.py": {
        "test_noise_on_embeddings_trains_other_weights": "neftune_noise_alpha",
        "test_what_changes_no_weight": """
            auto_find_batch_size full_determinism include_num_input_tokens_seen
            restore_callback_states_from_checkpoint torch_empty_cache_steps use_cache""",
    },
    "training/test_before_training.py": {
        "test_an_evaluation_does_not_round_the_weights": "fp16_full_eval",
    },
    "training/test_parallelism.py": {
        "test_rows_and_tensors_are_not_split": "parallelism_config",
    },
    "distributed/test_fsdp2.py": {"test_sharded_run_equals_one_process": "fsdp fsdp_config"},
}
# Fields that `Trainer` reads, and that change neither a forward pass nor the loss.
TRAINERS_OWN = {
    "the optimizer and its schedule": """
        adam_beta1 adam_beta2 adam_epsilon learning_rate lr_scheduler_kwargs lr_scheduler_type
        max_grad_norm max_steps num_train_epochs optim optim_args optim_target_modules warmup_steps
        weight_decay""",
    "kernels and precision of products, which compute the same function": """
        liger_kernel_config tf32 use_cpu use_liger_kernel""",
    "how processes and loaders share the work": """
        accelerator_config data_seed dataloader_drop_last dataloader_in_order
        dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
        dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
        ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout
        ignore_data_skip length_column_name local_rank train_sampling_strategy""",
    "logging, saving, evaluating and publishing": """
        batch_eval_metrics debug disable_tqdm do_eval do_predict do_train
        enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches
        eval_on_start eval_steps eval_strategy eval_use_gather_object hub_always_push hub_model_id
        hub_private_repo hub_revision hub_strategy hub_token label_names log_level
        log_level_replica log_on_each_node logging_first_step logging_strategy
        prediction_loss_only project resume_from_checkpoint run_name save_on_each_node
        save_only_model save_total_limit skip_memory_metrics trackio_bucket_id trackio_space_id
        trackio_static_space_id""",
}


def names(lines: Any) -> set[str]:
    return {name for line in lines for name in line.split()}


TESTED_FIELDS = names(line for tests in TESTED.values() for line in tests.values())
OWN_FIELDS = names(TRAINERS_OWN.values())


def test_every_field_is_in_the_table() -> None:
    known = {entry.name for entry in fields(TrainingArguments)}
    new = sorted(known - TESTED_FIELDS - OWN_FIELDS - REFUSED.keys())
    assert not new, (
        f"TrainingArguments has new fields: {new}. Find out whether each changes a forward pass "
        "or the loss. If it does, write a test that it has its effect in EBFT and name it in "
        "TESTED, or refuse it (training/preparation.py) and put it into REFUSED. If it does not, "
        "put it into TRAINERS_OWN."
    )
    assert not TESTED_FIELDS & OWN_FIELDS
    assert not REFUSED.keys() & (TESTED_FIELDS | OWN_FIELDS)


@pytest.mark.parametrize("file", TESTED)
def test_the_named_tests_exist(file: str) -> None:
    source = (TESTS / file).read_text()
    missing = [name for name in TESTED[file] if f"def {name}(" not in source]
    assert not missing


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(name: str, tmp_path: Path) -> None:
    value, message = REFUSED[name]
    args = config(tmp_path)
    setattr(args, name, value)
    # Alone, a process averages over its own tokens in either case.
    args.__class__ = type("OneOfTwo", (type(args),), {"world_size": 2})
    with pytest.raises(ValueError, match=message):
        EBFTTrainer(tiny_llama(), args)


def trained(folder: Path, **settings: Any) -> dict[str, Tensor]:
    args = config(folder, max_steps=2, ce_coef=0.1, **settings)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(40, 33, 27, 21))
    trainer.train()
    return weights_of(trainer.model)


@pytest.mark.parametrize("chunk", [10**6, 9])
def test_noise_on_embeddings_trains_other_weights(chunk: int, tmp_path: Path) -> None:
    """In one pass over the whole row and in chunks of rollouts."""
    plain = trained(tmp_path, training_chunk_size=chunk)
    noisy = trained(tmp_path, training_chunk_size=chunk, neftune_noise_alpha=5.0)
    different = [name for name, weight in plain.items() if not weight.equal(noisy[name])]
    assert different


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_find_batch_size": True},
        {"full_determinism": True},
        {"include_num_input_tokens_seen": "all"},
        {"restore_callback_states_from_checkpoint": True},
        {"torch_empty_cache_steps": 1},
        {"use_cache": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_no_weight(changes: dict[str, Any], tmp_path: Path) -> None:
    assert_same_tensors(trained(tmp_path, **changes), trained(tmp_path), relative=0)
