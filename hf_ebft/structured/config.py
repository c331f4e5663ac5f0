"""The settings of structured mode: `trl.GRPOConfig` plus the settings of EBFT."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, cast

from trl import GRPOConfig  # type: ignore[attr-defined]  # re-exported lazily

from hf_ebft.config import (
    EMBED_METHODS,
    EmbedMethod,
    FeatureMatchingArguments,
    OptimizerDefaults,
)
from hf_ebft.structured.vllm.settings import VLLMServerArguments


@dataclass
class StructuredArguments:
    """The ground-truth column, the embedding of sequences, and limits for feature passes."""

    embed_method: EmbedMethod = field(
        default="last_token",
        metadata={
            "help": "How the token features of prompt + completion are pooled into one embedding: "
            "'last_token', 'completion_mean' (mean over the completion), 'mean_pooling' (mean over "
            "prompt and completion) or 'concat' (tokens at 25, 50 and 75 % of the whole)."
        },
    )
    ground_truth_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the dataset with the ground-truth completion. Default: whichever of "
            "'ground_truth', 'completion' and 'answer' the dataset has."
        },
    )
    feature_batch_tokens: int = field(
        default=8192,
        metadata={
            "help": "Largest number of tokens, padding included, that the feature network reads at "
            "once (a single longer sequence is read alone). It bounds memory and changes no result."
        },
    )

    def validate_structured(self) -> None:
        """Check the fields of this group.

        Raises:
            ValueError: naming the field, the value, the reason and what to write instead.
        """
        if self.embed_method not in EMBED_METHODS:
            raise ValueError(
                f"embed_method={self.embed_method!r} is unknown; choose one of "
                f"{', '.join(EMBED_METHODS)}."
            )
        tokens = self.feature_batch_tokens
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(
                f"feature_batch_tokens={tokens!r} must be a whole number of tokens, at least 1."
            )
        column = self.ground_truth_column
        if column is not None and (not isinstance(column, str) or column in ("", "prompt")):
            raise ValueError(
                f"ground_truth_column={column!r} cannot hold the ground truth; name the column of "
                "the dataset that does, or leave it unset."
            )


@dataclass
class StructuredSettings(StructuredArguments, FeatureMatchingArguments):
    """Every setting of feature-matching rewards on sequences, without TRL's settings.

    `EBFTGRPOConfig` is a subclass; `FeatureMatchingReward` alone makes one from its options.
    """

    def validate_for(self, n_samples: int, n_samples_name: str) -> None:
        """Check all settings for groups of `n_samples` completions.

        Raises:
            ValueError: naming the setting, the value, the reason and what to write instead.
        """
        self.validate_structured()
        self.validate_feature_matching(n_samples, n_samples_name)
        kl_options = {
            entry.name: entry.default
            for entry in fields(FeatureMatchingArguments)
            if entry.name.startswith("kl_")
        }
        if any(getattr(self, name) != default for name, default in kl_options.items()):
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in kl_options)
            raise ValueError(
                f"{given} belong to strided mode; TRL's trainers penalise the KL divergence from "
                "the initial policy by `beta`, with their own estimator. Set beta and leave these "
                "unset."
            )
        if self.advantage_estimator == "fitted":
            raise ValueError(
                "advantage_estimator='fitted' gives every token its own advantage, but structured "
                "mode passes TRL one advantage for each completion; use 'rloo' or 'group_norm'."
            )
        if self.advantage_estimator == "reinforce":
            raise ValueError(
                "advantage_estimator='reinforce' keeps the reward as it is, but TRL's trainers "
                "subtract a baseline from every reward; use 'rloo' or 'group_norm'."
            )
        if self.alignment_coef == 0 and self.diversity_coef == 0:
            raise ValueError(
                "alignment_coef=0 and diversity_coef=0 make every reward 0, so there is nothing to "
                "learn from; set one of them above 0."
            )
        if self.use_whitening and self.whitening_space == "corpus":
            raise ValueError(
                "whitening_space='corpus' whitens by features of blocks of training text, which "
                "structured mode does not have; use 'feature' or 'sample', or use_whitening=False."
            )
        refuse_groups_that_do_not_sum_to_zero(self, n_samples, n_samples_name)


def refuse_groups_that_do_not_sum_to_zero(
    settings: FeatureMatchingArguments, n_samples: int, n_samples_name: str
) -> None:
    """Raise for the only case in which TRL's group mean would change an advantage.

    Raises:
        ValueError: groups of two completions with a diversity term.
    """
    if n_samples == 2 and settings.advantage_estimator == "rloo" and settings.diversity_coef > 0:
        raise ValueError(
            f"{n_samples_name}=2 with diversity_coef={settings.diversity_coef}: both completions "
            "of a pair have the same diversity, whose leave-one-out baseline (paper, eq. 94) is 0. "
            "TRL subtracts the group mean, which would remove the penalty completely. With 3 or "
            "more completions, advantages sum to zero, and TRL does not change them: set "
            f"{n_samples_name} to 3 or more (the paper uses 4), or diversity_coef=0."
        )


# Keys of TRL's `generation_kwargs` that a field of the configuration, or TRL itself, sets.
DECIDED_BY_FIELD = {
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "max_tokens": "max_completion_length",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "num_return_sequences": "num_generations",
    "n": "num_generations",
}
DECIDED_BY_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class EBFTGRPOConfig(  # type: ignore[misc]  # learning_rate is None until a trainer is built
    OptimizerDefaults, VLLMServerArguments, StructuredSettings, GRPOConfig
):
    """`trl.GRPOConfig` plus the settings of EBFT on prompts with ground-truth completions.

    > [!NOTE]
    > These defaults differ from `GRPOConfig`. `scale_rewards` is `"none"`: feature matching passes
    > TRL finished advantages, and dividing them by the standard deviation of their group would be
    > another estimator (`advantage_estimator="group_norm"`). As in the paper's released
    > configurations, `learning_rate` is 1e-6, or 1e-5 for adapters (instead of 1e-6 for both),
    > `lr_scheduler_type` is `"constant_with_warmup"` (instead of `"linear"`), `warmup_steps` is
    > 0.03, a share of all steps (instead of 0), and `adam_beta2` is 0.95 (instead of 0.999).
    """

    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "Must stay off ('none' or False), since feature matching passes TRL finished "
            "advantages. To divide advantages by the group's standard deviation, set "
            "advantage_estimator='group_norm'."
        },
    )
    adaptive_max_tokens: bool = field(
        default=False,
        metadata={
            "help": "Limit the completions of a batch to gt_length_multiplier times its longest "
            "ground truth, and to max_completion_length."
        },
    )
    gt_length_multiplier: float = field(
        default=1.5,
        metadata={
            "help": "Limit of adaptive_max_tokens, as a multiple of the batch's longest ground "
            "truth."
        },
    )

    def __post_init__(self) -> None:
        try:
            GRPOConfig.__post_init__(self)
        except ValueError as error:
            if "must be divisible by num_generations" not in str(error):
                raise
            raise ValueError(
                f"{error} A generation batch is per_device_train_batch_size="
                f"{self.per_device_train_batch_size} times processes times steps_per_generation "
                f"(default: gradient_accumulation_steps={self.gradient_accumulation_steps}), and "
                f"must consist of whole groups of num_generations={self.num_generations} "
                "completions: change one of these."
            ) from error
        self.validate()

    def validate(self) -> None:
        """Check all settings together.

        Raises:
            ValueError: naming the setting, the value, the reason and what to write instead.
        """
        assert self.num_generations is not None  # GRPOConfig has checked it
        self.validate_for(self.num_generations, "num_generations")
        self.validate_vllm_server(self.use_vllm)
        self._refuse_what_trl_ignores()
        self._refuse_generation_kwargs()
        evaluated = self.num_generations_eval
        if evaluated is not None and evaluated < 2:
            raise ValueError(
                f"num_generations_eval={evaluated} gives no pairs of completions, from which the "
                "CFM loss is estimated; set it to 2 or more, or leave it unset to use "
                "num_generations."
            )
        if self.scale_rewards != "none":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} would divide finished advantages by a "
                "standard deviation, so the gradient would not be that of advantage_estimator. "
                "Leave it at 'none'; to divide by the group's standard deviation, set "
                "advantage_estimator='group_norm'."
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} would divide "
                "finished advantages by standard deviations; leave it at 'sum_then_normalize'."
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop the ground truth from the dataset before "
                "the reward sees it; leave it at False."
            )
        if not isinstance(self.adaptive_max_tokens, bool):
            raise ValueError(
                f"adaptive_max_tokens={self.adaptive_max_tokens!r} must be True or False."
            )
        if not _is_positive(self.gt_length_multiplier):
            raise ValueError(
                f"gt_length_multiplier={self.gt_length_multiplier!r} must be a number above 0: it "
                "is the limit of completions, as a multiple of the longest ground truth."
            )
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ValueError(
                f"max_completion_length={self.max_completion_length} must be at least 1: a "
                "completion without tokens has no features."
            )

    def _refuse_what_trl_ignores(self) -> None:
        """Raise for fields that TRL would ignore or that would affect sampling only."""
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} would have no effect: "
                "neither GRPO's loss nor the cross-entropy of ce_coef smooths its targets. "
                "Leave it at 0."
            )
        if self.neftune_noise_alpha:
            raise ValueError(
                f"neftune_noise_alpha={self.neftune_noise_alpha} adds new noise in sampling and in "
                "every forward pass of the loss, so log-probs would belong to another policy than "
                "the one that sampled. Leave it unset."
            )
        if self.data_seed is not None:
            raise ValueError(
                f"data_seed={self.data_seed} would have no effect: TRL shuffles prompts by seed. "
                "Set seed."
            )
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={str(self.train_sampling_strategy)!r} would have no "
                "effect: TRL draws prompts by its own sampler. Leave it unset; "
                "shuffle_dataset=False keeps the order of the dataset."
            )
        if self.max_tool_calling_iterations is not None:
            raise ValueError(
                f"max_tool_calling_iterations={self.max_tool_calling_iterations} would have no "
                "effect: structured mode refuses tools, which change the prompt while completions "
                "are sampled. Leave it unset."
            )
        if self.use_vllm:
            return
        for entry in fields(GRPOConfig):
            by_vllm_only = entry.name.startswith(("vllm_importance", "vllm_structured"))
            if by_vllm_only and getattr(self, entry.name) != entry.default:
                raise ValueError(
                    f"{entry.name}={getattr(self, entry.name)!r} would have no effect: TRL reads "
                    "it with use_vllm=True only. Leave it out."
                )

    def _refuse_generation_kwargs(self) -> None:
        """Raise for keys of `generation_kwargs` that would be overwritten or change completions."""
        for name, value in cast("dict[str, Any]", self.generation_kwargs or {}).items():
            given = f"generation_kwargs={{{name!r}: {value!r}}}"
            if name in DECIDED_BY_FIELD:
                raise ValueError(
                    f"{given} is set by the field {DECIDED_BY_FIELD[name]}; set that field instead."
                )
            if name in DECIDED_BY_TOKENIZER:
                raise ValueError(
                    f"{given} would end completions at other tokens than ground truths; set it on "
                    "the tokenizer, or add end tokens to the model's generation_config."
                )
            if (name == "do_sample" and not value) or (name == "num_beams" and value != 1):
                raise ValueError(
                    f"{given} does not sample from the policy: the completions of a group would "
                    "hardly differ, and their log-probs would not be the policy's. Leave it out."
                )


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0
