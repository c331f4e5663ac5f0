"""Checks and corrections of arguments before an `EBFTTrainer` is built."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Sized
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any, cast

from accelerate.parallelism_config import ParallelismConfig
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_ebft.config import EBFTConfig, EBFTSettings, OptimizerDefaults
from hf_ebft.training.quantized import keep_gradients

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

# Set by `accelerate launch`.
_PARALLELISM_VARIABLE = "ACCELERATE_USE_PARALLELISM_CONFIG"


def check_arguments(
    args: TrainingArguments,
    settings: EBFTSettings,
    kwargs: dict[str, Any],
    train_dataset: Any,
    eval_dataset: Any,
) -> None:
    """Check everything that can be checked before a trainer is built, and correct `args`.

    Args:
        args: the training arguments.
        settings: the EBFT settings in `args`, or the defaults.
        kwargs: further arguments, which the trainer passes on to `Trainer`.
        train_dataset, eval_dataset: the datasets of the trainer.

    Raises:
        ValueError: something cannot work, or would be ignored.
    """
    refuse_ignored_arguments(args, kwargs)
    refuse_options_of_other_trainers(args)
    refuse_updates_between_parts(args, settings)
    refuse_unsupported_parallelism(args)
    refuse_empty(train_dataset, "train_dataset")
    refuse_empty(eval_dataset, "eval_dataset")
    refuse_missing_corpus(settings, train_dataset)
    keep_one_device_per_process(args)


def with_adapters(model: nn.Module | None, peft_config: PeftConfig | None) -> nn.Module | None:
    """Wrap the model with adapters if a configuration is given; 4-bit weights keep their gradients.

    Raises:
        TypeError: `model` is a name or anything else that is no model.
        ValueError: there is no model to wrap, or it has adapters already.
    """
    if model is not None and not isinstance(model, nn.Module):
        name = model if isinstance(model, str) else "..."
        raise TypeError(
            f"model={model!r} is not a loaded model; load it first: "
            f"AutoModelForCausalLM.from_pretrained({name!r})."
        )
    if model is not None:
        keep_gradients(model)
    if peft_config is None:
        return model
    from peft import PeftModel, get_peft_model

    if model is None:
        raise ValueError(
            "peft_config needs a model to wrap, but model is None; pass model, or let model_init "
            "return a PEFT model."
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "peft_config would add adapters to a model that has adapters already; drop "
            "peft_config, or pass the model without adapters."
        )
    return get_peft_model(cast(PreTrainedModel, model), peft_config)


def fill_in_learning_rate(args: TrainingArguments, model: nn.Module) -> None:
    """Fill in the default learning rate for the model, if `args` is ours and has none.

    Args:
        args: the training arguments.
        model: the policy, with its adapters if it has any.
    """
    if not isinstance(args, OptimizerDefaults):
        return
    # PEFT models have this attribute, and so do models to which transformers has added adapters.
    adapters = hasattr(model, "peft_config")
    rate = args.fill_in_learning_rate(adapters=adapters)
    if rate is not None and args.process_index == 0:
        logger.info(
            "learning_rate is not set; using %g, the default for %s.",
            rate,
            "adapters" if adapters else "full fine-tuning",
        )


def refuse_ignored_arguments(args: TrainingArguments, kwargs: dict[str, Any]) -> None:
    """Raise a ValueError for arguments of `Trainer` that would have no effect with EBFT."""
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func would replace the EBFT loss; drop it, or override compute_loss in a "
            "subclass of EBFTTrainer."
        )
    if args.torch_compile and isinstance(args, EBFTSettings) and args.packed_attention == "split":
        raise ValueError(
            "torch_compile=True with packed_attention='split': TorchDynamo cannot trace the object "
            "that split attention passes through the model. Use packed_attention='auto' "
            "(flex_attention on CUDA, dense masks elsewhere)."
        )
    # With one process, TrainingArguments itself sets it to False.
    if not args.average_tokens_across_devices and args.world_size > 1:
        raise ValueError(
            "average_tokens_across_devices=False asks each process to average over its own tokens, "
            "but the EBFT loss is a mean over the documents of the step on all processes. Leave it "
            "at True."
        )
    if args.label_smoothing_factor != 0:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no meaning for the EBFT "
            "loss; set it to 0."
        )


def refuse_options_of_other_trainers(args: TrainingArguments) -> None:
    """Raise a ValueError if options of another trainer are set; warn if they have defaults.

    `SFTConfig`, for example, is a `TrainingArguments`, but EBFTTrainer does not use `packing` or
    `completion_only_loss`. A field counts as another trainer's if a library declares it. Fields
    that a script declares in a class of its own are allowed, since the script may use them.
    """
    known_class = EBFTConfig if isinstance(args, EBFTSettings) else TrainingArguments
    known = {field.name for field in fields(known_class)}
    foreign = [
        field
        for field in fields(args)
        if field.name not in known and _declaring_library(type(args), field.name) is not None
    ]
    changed = {
        field.name: getattr(args, field.name)
        for field in foreign
        if getattr(args, field.name) not in (None, _default(field))
    }
    kind = type(args).__name__
    if changed:
        listed = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        raise ValueError(
            f"args is of type {kind} and sets {listed}, which EBFTTrainer would ignore. Use an "
            "EBFTConfig; cut, pack and mask rows when the dataset is made (with hf_ebft.data, or "
            "by the columns labels, completion_mask, assistant_masks, position_ids)."
        )
    if foreign:
        logger.warning(
            "args is of type %s: EBFTTrainer ignores the options of that class, also their "
            "defaults (%s). Use an EBFTConfig.",
            kind,
            ", ".join(f"{f.name}={getattr(args, f.name)!r}" for f in foreign if _default(f)),
        )


def refuse_updates_between_parts(args: TrainingArguments, settings: EBFTSettings) -> None:
    """Raise a ValueError if the optimizer would change the weights between parts of a batch."""
    if settings.rollout_batch_size is not None and args.optim in (
        OptimizerNames.LOMO,
        OptimizerNames.ADALOMO,
    ):
        raise ValueError(
            f"optim={OptimizerNames(args.optim).value!r} updates the weights within the backward "
            f"pass, and rollout_batch_size={settings.rollout_batch_size} makes one backward pass "
            "for each part of a batch. So the weights would change between parts of one optimizer "
            "step. Leave rollout_batch_size unset and lower per_device_train_batch_size."
        )


def _declaring_library(kind: type, name: str) -> str | None:
    """The library (transformers, TRL or this one) that declares a field of a class, or None."""
    declaring = [base for base in kind.__mro__ if name in inspect.get_annotations(base)]
    library = declaring[0].__module__.split(".")[0] if declaring else ""
    return library if library in ("transformers", "trl", "hf_ebft") else None


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def refuse_unsupported_parallelism(args: TrainingArguments) -> None:
    """Raise a ValueError for ways of distributing a run that EBFT does not support.

    It checks both `args` and the environment variables that `accelerate launch` sets.
    """
    if args.deepspeed or args.deepspeed_plugin is not None:
        raise ValueError(
            "DeepSpeed is not supported: its engine wraps one model with one forward and backward "
            "pass per step, but EBFT runs several passes over the policy, some of them without "
            "gradient, and a frozen copy. Use DDP, or FSDP2 to shard weights, gradients and "
            "optimizer state as ZeRO does (accelerate_configs/fsdp2.yaml)."
        )
    parallelism = args.parallelism_config
    if parallelism is None and os.environ.get(_PARALLELISM_VARIABLE, "").lower() == "true":
        parallelism = ParallelismConfig()  # accelerate reads it from the environment
    sizes = {name: getattr(parallelism, name, 1) or 1 for name in ("cp_size", "sp_size", "tp_size")}
    split = ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
    if split:
        raise ValueError(
            f"parallelism_config with {split} is not supported: context and sequence parallelism "
            "split rows, and with them the prefix that all rollouts of a document share; tensor "
            "parallelism is not tested. Leave these sizes at 1, and distribute documents over "
            "processes (DDP, or FSDP2 with dp_shard_size)."
        )


def refuse_empty(dataset: Any, name: str) -> None:
    """Raise a ValueError if a dataset, or one in a dict of datasets, has no rows."""
    datasets = dataset if isinstance(dataset, dict) else {name: dataset}
    for key, value in datasets.items():
        if isinstance(value, Sized) and len(value) == 0:
            raise ValueError(
                f"{name if key == name else f'{name}[{key!r}]'} is empty: there is nothing to "
                "sample prefixes from. Check the path, the split and any filter."
            )


def refuse_missing_corpus(settings: EBFTSettings, train_dataset: Any) -> None:
    """Raise a ValueError for whitening by corpus without a training dataset."""
    if settings.use_whitening and settings.whitening_space == "corpus" and train_dataset is None:
        raise ValueError(
            "whitening_space='corpus' measures features of training text, but train_dataset is "
            "None; pass one, or whiten by group with whitening_space='feature'."
        )


def refuse_frozen(model: nn.Module) -> None:
    """Raise a ValueError if all weights are frozen, so that training would change nothing."""
    if any(weight.requires_grad for weight in model.parameters()):
        return
    has_adapters = hasattr(type(model), "get_base_model")
    raise ValueError(
        "No weight of the model is trainable (requires_grad is False for all of them), so there is "
        "nothing to train. "
        + (
            "Load the adapter with PeftModel.from_pretrained(..., is_trainable=True)."
            if has_adapters
            else "Set requires_grad on the weights to train, or pass peft_config."
        )
    )


def refuse_no_batch(args: TrainingArguments, dataset: Any) -> None:
    """Raise a ValueError if `dataloader_drop_last` would drop all rows, for a run of 0 steps."""
    if not args.dataloader_drop_last or args.auto_find_batch_size or not isinstance(dataset, Sized):
        return
    needed = args.train_batch_size * args.world_size
    if len(dataset) < needed:
        raise ValueError(
            f"dataloader_drop_last=True drops all {len(dataset)} rows of train_dataset: one batch "
            f"on every process needs {needed} rows (per_device_train_batch_size="
            f"{args.per_device_train_batch_size}). Lower the batch size, or set "
            "dataloader_drop_last=False."
        )


def keep_one_device_per_process(args: TrainingArguments) -> None:
    """Keep `Trainer` from wrapping the policy into DataParallel when several devices are visible.

    DataParallel splits the arguments of forward along their first dimension. This would split masks
    and caches, and training would use the rollouts of one device only. `_n_gpu` is private;
    `Trainer` itself sets it to 1 for models that it must not wrap.
    """
    if args.n_gpu > 1:
        logger.warning(
            "%d devices are visible to one process, but EBFT trains on %s only. Use `accelerate "
            "launch` with one process per device to train on all of them.",
            args.n_gpu,
            args.device,
        )
        args._n_gpu = 1
