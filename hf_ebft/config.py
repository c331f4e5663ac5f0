"""The settings of the library: their defaults, help texts and validation, in one place.

The fields are in two mixins, so that other trainers (and scripts that hold a plain
`TrainingArguments`) can reuse them. Every default is declared here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers import SchedulerType, TrainingArguments

FeatureNormalization = Literal["per_layer", "joint"]
FEATURE_NORMALIZATIONS: tuple[FeatureNormalization, ...] = get_args(FeatureNormalization)
EmbedMethod = Literal["last_token", "mean_pooling", "concat", "completion_mean"]
EMBED_METHODS: tuple[EmbedMethod, ...] = get_args(EmbedMethod)
# All blocks of strided mode have the same length, so `completion_mean` would equal `mean_pooling`.
STRIDED_EMBED_METHODS: tuple[EmbedMethod, ...] = ("last_token", "mean_pooling", "concat")
# The spaces in which a group of rollouts is whitened by itself.
GroupWhiteningSpace = Literal["feature", "sample"]
GROUP_WHITENING_SPACES: tuple[GroupWhiteningSpace, ...] = get_args(GroupWhiteningSpace)
# All choices of `whitening_space`.
WhiteningSpace = Literal["feature", "sample", "corpus"]
WHITENING_SPACES: tuple[WhiteningSpace, ...] = get_args(WhiteningSpace)
DEFAULT_TOLERANCE = 1e-5
# Rounding of a float64 Gram matrix leaves null singular values at up to about sqrt(n) * 1.5e-8 of
# the largest: a smaller tolerance would invert noise.
SMALLEST_TOLERANCE = 1e-6
AdvantageEstimator = Literal["rloo", "group_norm", "reinforce", "fitted"]
ADVANTAGE_ESTIMATORS: tuple[AdvantageEstimator, ...] = get_args(AdvantageEstimator)
KLEstimator = Literal["k1", "k2", "k3"]
KL_ESTIMATORS: tuple[KLEstimator, ...] = get_args(KLEstimator)
FEATURE_DTYPES = ("float32", "bfloat16", "float16")
GatherParams = Literal["auto", "true", "false"]
GATHER_PARAMS: tuple[GatherParams, ...] = get_args(GatherParams)
PackedAttention = Literal["auto", "split", "sdpa", "eager", "flex_attention"]
PACKED_ATTENTIONS: tuple[PackedAttention, ...] = get_args(PackedAttention)
CoefficientSchedule = Literal["constant", "linear", "cosine"]
COEFFICIENT_SCHEDULES: tuple[CoefficientSchedule, ...] = get_args(CoefficientSchedule)


@dataclass
class FeatureMatchingArguments:
    """Rewards, advantages and loss weights: the settings that every mode shares.

    The help of a field names the paper's value where it is known.
    """

    feature_layers: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 0.75],
        metadata={
            "help": "Depths of the layers whose hidden states form the features, as fractions of "
            "the number of layers: 0 is the embedding output, 1 the last hidden state after the "
            "final norm."
        },
    )
    feature_normalization: FeatureNormalization = field(
        default="per_layer",
        metadata={
            "help": "'per_layer': L2-normalise each layer, concatenate, divide by sqrt(layers). "
            "'joint': concatenate, then normalise once (the paper's released code)."
        },
    )
    feature_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model to use as the frozen feature network. It must have the policy's "
            "tokenizer. Default: a frozen copy of the policy, made when the trainer is built."
        },
    )
    feature_placement: str = field(
        default="auto",
        metadata={
            "help": "Where the feature network lives: 'shared' (the base model of a PEFT policy, "
            "no copy), 'same_device', 'second_device', 'cpu', 'sharded' (FSDP2, in units of its "
            "own) or a device such as 'cuda:1'. 'auto' chooses and logs the choice."
        },
    )
    feature_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the feature network's weights (float32, bfloat16, float16); "
            "default: the policy's."
        },
    )
    feature_quantization: Literal["8bit", "4bit"] | None = field(
        default=None,
        metadata={
            "help": "Load the feature network quantized by bitsandbytes; needs "
            "feature_model_name_or_path and a device that bitsandbytes supports."
        },
    )
    use_whitening: bool = field(
        default=True,
        metadata={"help": "Whiten the features of each group of rollouts (the paper's setting)."},
    )
    whitening_space: WhiteningSpace = field(
        default="feature",
        metadata={
            "help": "'feature': whiten each group by its own rollouts (the paper's equation). "
            "'sample': the same in the released code's variant. 'corpus': whiten all groups by one "
            "matrix: the second moment of the features of training text, measured once."
        },
    )
    whitening_tolerance: float = field(
        default=DEFAULT_TOLERANCE,
        metadata={
            "help": "For whitening_space 'feature' and 'sample': singular values below this times "
            "the largest one count as zero."
        },
    )
    corpus_whitening_documents: int = field(
        default=256,
        metadata={
            "help": "For whitening_space='corpus': number of training rows to measure the second "
            "moment on (chosen by seed; all rows if there are fewer)."
        },
    )
    corpus_whitening_shrinkage: float = field(
        default=0.1,
        metadata={
            "help": "For whitening_space='corpus': how far the second moment is shrunk towards the "
            "identity, above 0 and at most 1 (no whitening)."
        },
    )
    alignment_coef: float = field(
        default=1.0, metadata={"help": "Weight of alignment (2 cos) in the reward."}
    )
    diversity_coef: float = field(
        default=1.0,
        metadata={
            "help": "Weight of diversity (twice the mean pairwise dot product), which the reward "
            "subtracts."
        },
    )
    advantage_estimator: AdvantageEstimator = field(
        default="rloo",
        metadata={
            "help": "'rloo': leave-one-out baseline. 'group_norm': z-score. 'reinforce': no "
            "baseline. 'fitted': token-level baselines and control variates, from regressions on "
            "the feature network's states. It has the expected gradient of 'reinforce' with less "
            "noise, and needs use_whitening=False and embed_method='last_token' "
            "(docs/estimators.md)."
        },
    )
    ce_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the teacher-forced cross-entropy (gamma in the paper, which tries "
            "0, 0.03 and 0.1)."
        },
    )
    ce_coef_schedule: CoefficientSchedule = field(
        default="constant",
        metadata={
            "help": "How ce_coef changes over the optimizer steps of a run: 'constant', or "
            "'linear' or 'cosine' from ce_coef at the first step to ce_coef_final at the last one."
        },
    )
    ce_coef_final: float | None = field(
        default=None,
        metadata={"help": "The weight at the last optimizer step, for ce_coef_schedule."},
    )
    kl_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a per-token KL penalty with the feature network as reference "
            "policy. 0 costs nothing. Above 0, the feature network also runs its head."
        },
    )
    kl_coef_schedule: CoefficientSchedule = field(
        default="constant",
        metadata={"help": "Like ce_coef_schedule, for kl_coef."},
    )
    kl_coef_final: float | None = field(
        default=None,
        metadata={"help": "The weight at the last optimizer step, for kl_coef_schedule."},
    )
    kl_estimator: KLEstimator = field(
        default="k3", metadata={"help": "Estimator of the KL divergence (Schulman's names)."}
    )

    def validate_feature_matching(self, n_samples: int, n_samples_name: str) -> None:
        """Check the fields of this group; `n_samples` is the size of a group of rollouts.

        Raises:
            ValueError: naming the field, the value, the reason and what to write instead.
        """
        _require_choice(self, "feature_normalization", FEATURE_NORMALIZATIONS)
        _require_choice(self, "whitening_space", WHITENING_SPACES)
        _require_choice(self, "advantage_estimator", ADVANTAGE_ESTIMATORS)
        _require_choice(self, "kl_estimator", KL_ESTIMATORS)
        _require_bool(self, "use_whitening")
        layers = self.feature_layers
        if isinstance(layers, str) or not isinstance(layers, Sequence) or len(layers) == 0:
            raise ValueError(
                f"feature_layers={layers!r} lists no layers, so there would be no features; "
                "write a list of fractions of depth such as [0.25, 0.5, 0.75]."
            )
        for fraction in layers:
            if not _is_finite_number(fraction) or not 0.0 <= fraction <= 1.0:
                raise ValueError(
                    f"feature_layers contains {fraction!r}, which is not a fraction of depth; "
                    "write values from 0.0 (embeddings) to 1.0 (last layer)."
                )
        for name in ("alignment_coef", "diversity_coef", "ce_coef", "kl_coef"):
            _require_at_least(self, name, 0.0)
        for name in ("ce_coef", "kl_coef"):
            _require_schedule(self, name)
        _require_finite(self, "whitening_tolerance")
        if not SMALLEST_TOLERANCE <= self.whitening_tolerance < 1.0:
            raise ValueError(
                f"whitening_tolerance={self.whitening_tolerance} must lie between "
                f"{SMALLEST_TOLERANCE:g} (the rounding of float32 features) and 1: it is relative "
                f"to the largest singular value; the default is {DEFAULT_TOLERANCE:g}."
            )
        _require_count(self, "corpus_whitening_documents")
        _require_finite(self, "corpus_whitening_shrinkage")
        if not 0.0 < self.corpus_whitening_shrinkage <= 1.0:
            raise ValueError(
                f"corpus_whitening_shrinkage={self.corpus_whitening_shrinkage} must lie in (0, 1]: "
                "0 would divide by rounding errors in directions that no feature uses, and 1 "
                "means no whitening; the default is 0.1."
            )
        if self.feature_dtype not in (None, *FEATURE_DTYPES):
            raise ValueError(
                f"feature_dtype={self.feature_dtype!r} is unknown; choose one of "
                f"{', '.join(FEATURE_DTYPES)}, or leave it unset to use the policy's dtype."
            )
        if self.feature_quantization not in (None, "8bit", "4bit"):
            raise ValueError(
                f"feature_quantization={self.feature_quantization!r} is unknown; choose 8bit or "
                "4bit."
            )
        if self.feature_quantization is not None and self.feature_model_name_or_path is None:
            raise ValueError(
                f"feature_quantization={self.feature_quantization!r} quantizes weights while they "
                "are loaded, so it needs feature_model_name_or_path; set it to the policy's own "
                "name for a quantized copy of the policy."
            )
        if n_samples < 2 and self.advantage_estimator != "reinforce":
            raise ValueError(
                f"{n_samples_name}={n_samples} leaves advantage_estimator="
                f"'{self.advantage_estimator}' no other rollout to compare with; set "
                f"{n_samples_name} to 2 or more (the paper uses 4), or set "
                "advantage_estimator='reinforce'."
            )
        if n_samples < 2 and self.diversity_coef > 0:
            raise ValueError(
                f"{n_samples_name}={n_samples} gives no pairs of rollouts, so diversity_coef="
                f"{self.diversity_coef} would have no effect; set {n_samples_name} to 2 or more, "
                "or set diversity_coef=0."
            )


@dataclass
class StridedArguments:
    """Where rollouts start, how long they are and how they are sampled (strided mode)."""

    stride: int = field(
        default=8, metadata={"help": "Tokens between the starts of neighbouring blocks (paper: 8)."}
    )
    context_length: int = field(
        default=8, metadata={"help": "Tokens before the first block of a document (paper: 8)."}
    )
    generate_max_len: int = field(
        default=8, metadata={"help": "Tokens in a rollout, and in its ground truth (paper: 8)."}
    )
    embed_method: Literal["last_token", "mean_pooling", "concat"] = field(
        default="last_token",
        metadata={"help": "How the token features of a rollout are pooled into one embedding."},
    )
    n_samples_per_prompt: int = field(
        default=4, metadata={"help": "Rollouts per block (paper: 4)."}
    )
    temperature: float = field(
        default=0.6, metadata={"help": "Sampling temperature; rollouts are also scored at it."}
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Nucleus sampling. Below 1, tokens are sampled from the truncated distribution "
            "but scored by the full softmax, so the gradient estimate is biased."
        },
    )
    min_completion_prefix: int = field(
        default=0,
        metadata={
            "help": "Tokens of a completion before its first block. Used where labels or "
            "prompt_length mark a completion."
        },
    )
    document_masking: bool | None = field(
        default=None,
        metadata={
            "help": "How to split rows that pack several documents. Default: by document_ids, "
            "seq_idx or position_ids that restart, where a batch has them. True: also at the EOS "
            "token. False: every row is one document."
        },
    )
    rl_coef: float = field(default=1.0, metadata={"help": "Weight of the policy-gradient loss."})
    rl_coef_schedule: CoefficientSchedule = field(
        default="constant",
        metadata={"help": "Like ce_coef_schedule, for rl_coef."},
    )
    rl_coef_final: float | None = field(
        default=None,
        metadata={"help": "The weight at the last optimizer step, for rl_coef_schedule."},
    )
    packed_attention: PackedAttention = field(
        default="auto",
        metadata={
            "help": "Attention implementation for the packed row. 'split' computes only what is "
            "visible and needs no mask; 'flex_attention' does so in one kernel on a GPU. 'auto' on "
            "CUDA: 'flex_attention' where model and machine support it, else 'sdpa'. 'auto' "
            "elsewhere: 'split' where the model's code calls the configured attention function, "
            "else 'sdpa' or 'eager'. A model that was loaded with eager attention keeps it."
        },
    )
    verify_packing: bool = field(
        default=True,
        metadata={
            "help": "When the trainer is built, compare a short packed row with plain forward "
            "passes of the actual model. Raise an error if they differ."
        },
    )
    gather_params_for_sampling: GatherParams = field(
        default="auto",
        metadata={
            "help": "FSDP2: keep the policy's parameters gathered during all decoding steps of "
            "sampling instead of gathering them at each step. 'auto': if they fit into free "
            "memory."
        },
    )
    eval_rollouts: bool = field(
        default=True,
        metadata={
            "help": "Also sample rollouts during evaluation, for eval_ebft/cfm_loss and the other "
            "eval_ebft metrics."
        },
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of a batch that are sampled, embedded and scored together. Larger "
            "batches are processed in chunks, with the same gradient and less memory. Default: "
            "the whole batch at once."
        },
    )
    block_share: float = field(
        default=1.0,
        metadata={
            "help": "Average share of the blocks that a training step samples. Below 1, blocks are "
            "left out at random. A block is kept with a higher probability if the cross-entropy of "
            "its ground truth is high, and kept blocks get a larger weight, so the expected "
            "gradient stays the same for less compute. Worth trying if the policy is certain of "
            "most blocks (docs/estimators.md)."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={
            "help": "Pad rows to a multiple of this many tokens, and their blocks accordingly, so "
            "that shapes repeat: torch_compile and flex_attention compile less often, and GPU "
            "memory fragments less. Padding costs compute. Default: on CUDA and with "
            "torch_compile, multiples of 128 tokens and 8 blocks, in larger steps for long rows; "
            "else 1."
        },
    )
    log_pictures_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps between pictures in TensorBoard: rollouts with their rewards, "
            "histograms, and a heat map of the reward by position. Needs matplotlib. 0: no "
            "pictures, no cost."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of an exponential moving average of the trained weights, which is "
            "evaluated and saved beside them (the paper's released configurations: 0.9). Default: "
            "no average, no cost."
        },
    )
    log_prob_chunk_size: int = field(
        default=1024,
        metadata={
            "help": "Rows of logits that exist at once, in sampling and in training. They need "
            "memory for this times the vocabulary, whatever the number of rollouts."
        },
    )

    training_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Rollout tokens whose activations exist at once, in training and in the "
            "feature network. More tokens are processed in chunks, with the same features and the "
            "same gradient. Default: 1024 on a CPU, else 8192, and in training no more than 2^23 / "
            "hidden_size (4096 for models of 2048)."
        },
    )

    def validate_strided(self) -> None:
        """Check the fields of this group.

        Raises:
            ValueError: naming the field, the value, the reason and what to write instead.
        """
        for name in (
            "stride",
            "context_length",
            "generate_max_len",
            "n_samples_per_prompt",
            "rollout_batch_size",
            "pad_to_multiple_of",
            "log_prob_chunk_size",
            "training_chunk_size",
        ):
            may_be_unset = name in (
                "rollout_batch_size",
                "pad_to_multiple_of",
                "training_chunk_size",
            )
            if not may_be_unset or getattr(self, name) is not None:
                _require_count(self, name)
        prefix = self.min_completion_prefix
        if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
            raise ValueError(
                f"min_completion_prefix={prefix!r} must be a whole number of tokens, 0 or more."
            )
        pictures = self.log_pictures_steps
        if isinstance(pictures, bool) or not isinstance(pictures, int) or pictures < 0:
            raise ValueError(
                f"log_pictures_steps={pictures!r} must be a whole number of optimizer steps; "
                "write 0 for no pictures."
            )
        _require_finite(self, "temperature")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature} must be above 0: a policy gradient needs sampled "
                "rollouts, and temperature 0 would decode greedily; the default is 0.6."
            )
        _require_finite(self, "block_share")
        if not 0.0 < self.block_share <= 1.0:
            raise ValueError(
                f"block_share={self.block_share} must lie in (0, 1]; 1.0 samples all blocks."
            )
        _require_finite(self, "top_p")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(
                f"top_p={self.top_p} must lie in (0, 1]; 1.0 samples the full softmax."
            )
        _require_choice(self, "embed_method", STRIDED_EMBED_METHODS)
        _require_at_least(self, "rl_coef", 0.0)
        _require_schedule(self, "rl_coef")
        _require_choice(self, "packed_attention", PACKED_ATTENTIONS)
        for name in ("verify_packing", "eval_rollouts"):
            _require_bool(self, name)
        if self.document_masking is not None:
            _require_bool(self, "document_masking")
        _require_choice(self, "gather_params_for_sampling", GATHER_PARAMS)
        if self.ema_decay is not None:
            _require_finite(self, "ema_decay")
            check_ema_decay(self.ema_decay)


@dataclass
class EBFTSettings(StridedArguments, FeatureMatchingArguments):
    """Every setting of strided EBFT, without the `TrainingArguments`.

    The trainer reads its settings from such an object: from an `EBFTConfig`, which is one, or from
    the defaults where it gets a plain `TrainingArguments`.
    """

    def validate(self) -> None:
        """Check all settings together.

        Raises:
            ValueError: naming the setting, the value, the reason and what to write instead.
        """
        self.validate_strided()
        self.validate_feature_matching(self.n_samples_per_prompt, "n_samples_per_prompt")
        self._validate_fitted()
        used = {
            name for name in ("rl_coef", "ce_coef", "kl_coef") if largest_weight(self, name) > 0
        }
        if not used:
            raise ValueError(
                "rl_coef=0, ce_coef=0 and kl_coef=0 make the loss zero; set one of them above 0."
            )
        if "rl_coef" in used and self.alignment_coef == 0 and self.diversity_coef == 0:
            raise ValueError(
                f"rl_coef={largest_weight(self, 'rl_coef')} has no effect, since all rewards are 0 "
                "with alignment_coef=0 and diversity_coef=0; set one of these two above 0, or "
                "rl_coef=0 to train without rewards."
            )

    def _validate_fitted(self) -> None:
        """Raise for settings that the regressions of `advantage_estimator="fitted"` lack."""
        if self.advantage_estimator != "fitted":
            return
        if self.use_whitening:
            raise ValueError(
                "advantage_estimator='fitted' predicts unwhitened features, but with "
                "use_whitening=True the reward is computed from whitened ones; set "
                "use_whitening=False (the reward is then the gradient of the CFM loss), or "
                "advantage_estimator='rloo'."
            )
        if self.embed_method != "last_token":
            raise ValueError(
                "advantage_estimator='fitted' predicts the feature of a rollout's last token, but "
                f"embed_method={self.embed_method!r} pools several tokens; set "
                "embed_method='last_token', or advantage_estimator='reinforce'."
            )

    def __post_init__(self) -> None:
        self.validate()


# For full fine-tuning: the rate of the paper's released configurations.
LEARNING_RATE = 1e-6
# For adapters: ten times that. The best rate for LoRA was found to be about ten times the best rate
# for full fine-tuning, in supervised fine-tuning and in reinforcement learning (J. Schulman and
# Thinking Machines Lab, "LoRA Without Regret", 2025, https://thinkingmachines.ai/blog/lora/).
ADAPTER_LEARNING_RATE = 1e-5


@dataclass
class OptimizerDefaults:
    """Fields of `TrainingArguments` whose defaults follow the paper's released configurations.

    `learning_rate` is None until a trainer is built, since its default depends on whether adapters
    or whole models are trained. The released configurations also average the weights
    (`ema_decay=0.9`); here that stays an option.
    """

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate. Default: 1e-6 for full fine-tuning (the paper's released "
            "configurations), 1e-5 for adapters (LoRA needs about ten times the rate). Small "
            "models and short runs need a far higher one."
        },
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="constant_with_warmup",
        metadata={"help": "Learning-rate schedule (paper: constant after a warm-up)."},
    )
    warmup_steps: float = field(
        default=0.03,
        metadata={
            "help": "Number of steps in which the learning rate grows from 0; a value below 1 is a "
            "share of all steps (paper: 0.03)."
        },
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta (paper: 0.95)."})

    # The rate that a trainer filled in; None before. Without an annotation it is not a dataclass
    # field, so that users cannot set it and it is not logged.
    _filled_in = None

    def fill_in_learning_rate(self, *, adapters: bool) -> float | None:
        """Set `learning_rate` if the user has not; trainers call this.

        A rate that an earlier trainer filled in counts as unset.

        Args:
            adapters: whether adapters are trained, as opposed to whole models.

        Returns:
            The rate if it was filled in, else None.
        """
        if self.learning_rate is not None and self.learning_rate != self._filled_in:
            return None
        self.learning_rate = ADAPTER_LEARNING_RATE if adapters else LEARNING_RATE
        self._filled_in = self.learning_rate
        return self.learning_rate


@dataclass
class EBFTConfig(OptimizerDefaults, EBFTSettings, TrainingArguments):  # type: ignore[misc]
    """`transformers.TrainingArguments` plus the settings of strided EBFT.

    > [!NOTE]
    > These defaults differ from `TrainingArguments` and follow the paper's released
    > configurations: `learning_rate` is 1e-6, or 1e-5 for adapters (instead of 5e-5);
    > `lr_scheduler_type` is `"constant_with_warmup"` (instead of `"linear"`); `warmup_steps` is
    > 0.03, a share of all steps (instead of 0); `adam_beta2` is 0.95 (instead of 0.999). The
    > trainer does not change a plain `TrainingArguments`.
    """

    def __post_init__(self) -> None:
        TrainingArguments.__post_init__(self)
        self.validate()


def check_ema_decay(decay: float) -> None:
    """Raise for a decay that averages nothing.

    Raises:
        ValueError: the decay is not in (0, 1).
    """
    if not 0.0 < decay < 1.0:
        raise ValueError(
            f"ema_decay={decay} must be above 0 (which keeps the last weights only) and below 1 "
            "(which keeps the first weights only); 0.9 averages over about 10 steps."
        )


def largest_weight(settings: Any, name: str) -> float:
    """The largest value that a coefficient such as `ce_coef` takes in a run."""
    start: float = getattr(settings, name)
    final: float | None = getattr(settings, f"{name}_final")
    return start if final is None else max(start, final)


def _require_schedule(settings: Any, name: str) -> None:
    _require_choice(settings, f"{name}_schedule", COEFFICIENT_SCHEDULES)
    schedule, final = getattr(settings, f"{name}_schedule"), getattr(settings, f"{name}_final")
    if final is not None:
        _require_at_least(settings, f"{name}_final", 0.0)
    if schedule == "constant" and final is not None:
        raise ValueError(
            f"{name}_final={final} would have no effect: {name}_schedule='constant' keeps {name}="
            f"{getattr(settings, name)} in all steps. Set {name}_schedule to 'linear' or 'cosine', "
            f"or leave {name}_final unset."
        )
    if schedule != "constant" and final is None:
        raise ValueError(
            f"{name}_schedule={schedule!r} needs a final value: set {name}_final to the weight at "
            "the last optimizer step (0 switches that loss off gradually)."
        )


def _require_choice(settings: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(settings, name)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}.")


def _require_count(settings: Any, name: str) -> None:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, 1 or more.")


def _require_at_least(settings: Any, name: str, least: float) -> None:
    _require_finite(settings, name)
    value = getattr(settings, name)
    if value < least:
        raise ValueError(f"{name}={value} must be {least:g} or more.")


def _require_finite(settings: Any, name: str) -> None:
    value = getattr(settings, name)
    if not _is_finite_number(value):
        hint = " (YAML reads 1e-4 as text; write 1.0e-4)" if isinstance(value, str) else ""
        raise ValueError(f"{name}={value!r} must be a finite number{hint}.")


def _is_finite_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)


def _require_bool(settings: Any, name: str) -> None:
    value = getattr(settings, name)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False.")
