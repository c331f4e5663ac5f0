"""`EBFTGRPOTrainer`: TRL's `GRPOTrainer` with feature matching as its reward.

TRL does the sampling, clipping, loss types, vLLM and logging. This class adds the reward with its
frozen network, a cross-entropy term on the ground truth, a limit of completions that follows the
ground truth's length, and evaluation with a fixed seed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput
from trl import GRPOTrainer  # type: ignore[attr-defined]  # re-exported lazily

from hf_ebft.feature_network.fingerprint import fingerprint_of
from hf_ebft.feature_network.loading import build_placed_network
from hf_ebft.feature_network.shared_base import trainable_kept
from hf_ebft.objective.schedules import coefficient_at, is_scheduled
from hf_ebft.packed.supported import sequence_limit
from hf_ebft.structured.config import EBFTGRPOConfig
from hf_ebft.structured.cross_entropy import ground_truth_nll
from hf_ebft.structured.datasets import (
    prepare_dataset,
    prepare_evaluation,
    refuse_chats_without_template,
    refuse_partial_groups,
    refuse_too_few_prompts,
    with_one_bos,
)
from hf_ebft.structured.encoding import Example
from hf_ebft.structured.reward import FeatureMatchingReward
from hf_ebft.structured.sequence_features import SequenceFeatureNetwork, refuse_longer
from hf_ebft.structured.trl_internals import (
    CardNames,
    count_positions_from_mask,
    restore_forward,
    set_most_tokens,
    take_metrics,
)
from hf_ebft.structured.vllm.rollouts import VLLMRollouts
from hf_ebft.structured.vllm.trainer import StalenessCorrection
from hf_ebft.training.before_training import BeforeTrainingMixin
from hf_ebft.training.metrics import MetricAccumulator, Ratio
from hf_ebft.training.preparation import (
    fill_in_learning_rate,
    refuse_frozen,
    refuse_unsupported_parallelism,
)
from hf_ebft.training.quantized import keep_gradients
from hf_ebft.training.same_features import SameFeaturesCallback

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


class EBFTGRPOTrainer(CardNames, StalenessCorrection, BeforeTrainingMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` that fine-tunes by feature matching.

    The advantages in its loss are those of the paper (leave-one-out, eq. 94), exactly.

    Args:
        model: the policy: a causal language model, a PEFT model of one, or a name or path.
        args: the settings of TRL and EBFT.
        train_dataset, eval_dataset: with `prompt` (text, or messages) and a ground truth (text,
            or messages) in `ground_truth`, `completion` or `answer`, or in
            `args.ground_truth_column`.
        processing_class: the policy's tokenizer.
        feature_network: frozen network phi with the policy's tokenizer. Default: the model at
            `feature_model_name_or_path` if set, else a frozen copy of the policy as it is now.
            `feature_placement` says where it lives.
        peft_config: if given, `model` is wrapped with these adapters first.
        reward_funcs: further rewards, added to the feature-matching advantage. Their baseline is
            GRPO's group mean; the first entry of `reward_weights` is then the weight of feature
            matching.
        rollout_func: TRL's `rollout_func(prompts, trainer)`, which samples instead of the policy.
            It may read `trainer.completion_budget`. Default: `VLLMRollouts` with `vllm_lora_sync`
            or `vllm_full_sync`.
        **kwargs: other arguments of `GRPOTrainer`, except tools and environments.

    Attributes:
        reward: the `FeatureMatchingReward`.
        feature_network: its `SequenceFeatureNetwork`.
        completion_budget: largest number of tokens of a completion of the current batch.

    Raises:
        ValueError: settings, model, feature network or dataset that cannot work.
        TypeError: `args` is not an `EBFTGRPOConfig`.
    """

    args: EBFTGRPOConfig
    model: nn.Module

    def __init__(
        self,
        model: nn.Module | str,
        args: EBFTGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        feature_network: nn.Module | None = None,
        peft_config: PeftConfig | None = None,
        reward_funcs: Any = None,
        rollout_func: Callable[..., dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        args = EBFTGRPOConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, EBFTGRPOConfig):
            raise TypeError(
                f"args is a {type(args).__name__}; EBFTGRPOTrainer needs an EBFTGRPOConfig, which "
                "takes all fields of GRPOConfig."
            )
        refuse_unsupported_parallelism(args)
        _refuse_tools(kwargs)
        if rollout_func is None and args.samples_on_server:
            rollout_func = VLLMRollouts(args)
        others = _as_list(reward_funcs)
        if others and kwargs.get("reward_processing_classes") is not None:
            classes = [None, *_as_list(kwargs["reward_processing_classes"])]
            kwargs["reward_processing_classes"] = classes
        self._column, train_dataset = prepare_dataset(train_dataset, args, "train_dataset")
        refuse_too_few_prompts(train_dataset, args)
        eval_dataset = prepare_evaluation(eval_dataset, args, self._column)
        # With `beta`, TRL adds a reference adapter, and PEFT would make active adapters trainable.
        with trainable_kept(model) if isinstance(model, PeftModel) else nullcontext():
            super().__init__(
                model=cast(Any, model),
                reward_funcs=cast(Any, [self.feature_matching, *others]),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                rollout_func=rollout_func,
                **kwargs,
            )
        refuse_chats_without_template(self.train_dataset, self.processing_class)
        keep_gradients(self.model)
        fill_in_learning_rate(args, self.model)
        self.train_dataset = with_one_bos(self.train_dataset, self.processing_class)
        self.eval_dataset = with_one_bos(self.eval_dataset, self.processing_class)
        _refuse_lasting_cast(self.model, args)
        self._limit = sequence_limit(self.model)
        for policy in (self.model, self.ref_model):
            if policy is not None:
                count_positions_from_mask(self.accelerator.unwrap_model(policy))
        self.feature_network = self._build_network(feature_network)
        fingerprint = fingerprint_of(self.feature_network)
        self.add_callback(SameFeaturesCallback(lambda: fingerprint))
        self.reward = FeatureMatchingReward(
            self.feature_network,
            self.processing_class,
            num_generations=self.num_generations,
            chat_template_kwargs=cast("dict[str, Any]", self.chat_template_kwargs),
            eos_token_ids=self.eos_token_ids,
            settings=args,
        )
        self.reward.column = self._column
        self._set_budget(self._most_tokens)
        self._metrics_of_loss = {
            mode: MetricAccumulator(self.accelerator.device) for mode in ("train", "eval")
        }
        self._rows: Sequence[dict[str, Any]] = ()
        self._micro_step = 0
        self._evaluation_prefix = "eval"

    def feature_matching(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> list[float]:
        """The reward function for TRL; see `FeatureMatchingReward`."""
        self.reward.group_sizes = (self._group_size,)
        return self.reward(prompts, completions, completion_ids, **columns)

    # ---- Loss ---------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """TRL's loss, plus `ce_coef` times the cross-entropy of the ground truth.

        The cross-entropy is a mean over the prompts of the optimizer step (in evaluation, of the
        batch). Each prompt contributes the mean over its ground truth's tokens, at temperature 1.
        A prompt counts once and is read once, however many completions it has.

        `ce_coef_schedule` changes the weight from one optimizer step to the next.
        """
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        training = self.model.training
        ce_coef = coefficient_at(self.args, "ce_coef", self.state.global_step, self.state.max_steps)
        metrics = self._metrics_of_loss["train" if training else "eval"]
        if training and is_scheduled(self.args, "ce_coef"):
            metrics.add({"ce_coef": Ratio(ce_coef, 1)})
        if training and ce_coef == 0:
            return loss
        examples, n_prompts = self._ground_truths()
        # A collective call: a process without a prompt of its own still makes the pass.
        nll = ground_truth_nll(
            model, self.model, examples or self._any_ground_truth(), self.accelerator.device
        )
        total = nll.sum() if examples else nll.sum() * 0
        # DDP and FSDP average gradients over processes, hence the factor.
        cross_entropy = total * (self.accelerator.num_processes / n_prompts)
        shares = self.current_gradient_accumulation_steps if training else 1
        metrics.add(
            {
                "ce_loss": Ratio(total.detach(), len(examples)),
                "rl_loss": Ratio(loss.detach() * shares, 1),
            }
        )
        return loss + ce_coef * cross_entropy

    def _ground_truths(self) -> tuple[list[Example], float]:
        """The prompts of a micro-batch that this process reads, and the divisor of their sum.

        The rows are those of a whole generation batch, on which `steps_per_generation`
        micro-batches train. Its prompts are distributed over these micro-batches, so that each is
        read once in every pass over the generation batch. An optimizer step of
        `gradient_accumulation_steps` micro-batches has that fraction of the prompts.
        """
        size, n_local = self._group_size, len(self._rows)
        n_prompts = n_local * self.accelerator.num_processes / size
        # A group that began on an earlier process belongs to that process.
        first = -(n_local * self.accelerator.process_index) % size
        mine = self._rows[first::size]
        if self.model.training:
            steps = self.args.steps_per_generation
            assert steps is not None  # set by GRPOConfig
            mine = mine[self._micro_step % steps :: steps]
            n_prompts *= self.current_gradient_accumulation_steps / steps
        return self._encode(mine), n_prompts

    def _any_ground_truth(self) -> list[Example]:
        return self._encode(self._rows[:1])

    def _encode(self, rows: Sequence[dict[str, Any]]) -> list[Example]:
        return self.reward.encoder.encode(
            [row["prompt"] for row in rows],
            [row[self._column] for row in rows],
            [row.get("embed_thinking") for row in rows],
        )

    # ---- Steps --------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as TRL does.

        Raises:
            ValueError: no weight of the model is trainable.
        """
        refuse_frozen(self.model)
        return cast(TrainOutput, super().train(*args, **kwargs))

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """TRL's step; it also keeps the rows of the generation batch for the cross-entropy."""
        self._rows = inputs
        steps = self.args.steps_per_generation
        assert steps is not None
        if self._micro_step % (steps * self.num_iterations) == 0:  # TRL samples at the same steps
            self._prepare_rollouts(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_step += 1
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # Private in transformers. TRL samples here and scores the reference policy, for which it
        # switches adapters.
        with trainable_kept(self.accelerator.unwrap_model(self.model)):
            return super()._prepare_inputs(generation_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """TRL's step; it also keeps the rows, as in `training_step`."""
        self._rows = inputs
        self._prepare_rollouts(inputs)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as TRL does, on data sets in all forms that the constructor accepts."""
        return super().evaluate(self._prepared(eval_dataset), ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """`evaluate` without logging; returns the metrics, such as `test_ebft/alignment`."""
        output = super().predict(self._prepared(test_dataset), ignore_keys, metric_key_prefix)
        return output._replace(metrics={**(output.metrics or {}), **self._take_evaluation()})

    def _prepared(self, dataset: Any) -> Any:
        if dataset is None or isinstance(dataset, str):  # a data set of the constructor
            return dataset
        dataset = prepare_evaluation(dataset, self.args, self._column)
        return with_one_bos(dataset, self.processing_class)

    def _take_evaluation(self) -> dict[str, Any]:
        """Metrics of the last evaluation, with the prefix of its data set; a collective call."""
        means = {**self._take_loss("eval"), **take_metrics(self, "eval")}
        return {f"{self._evaluation_prefix}_{name}": mean for name, mean in means.items()}

    def _take_loss(self, mode: str) -> dict[str, Any]:
        return self._metrics_of_loss[mode].take(
            lambda sums: self.accelerator.reduce(sums, reduction="sum")
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """TRL's loop with sampling by a fixed seed; training's random state is restored."""
        refuse_partial_groups(self.args)
        self._evaluation_prefix = metric_key_prefix
        device = self.accelerator.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices=devices, device_type=_forked_type(device)):
            torch.manual_seed(self.args.seed + self.args.process_index)
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `ebft/ce_loss` and `ebft/rl_loss`, means over all processes, to TRL's log.

        Metrics of an evaluation get the prefix of its data set, as in `eval_a_loss`. TRL calls them
        `eval_...` for every data set, so several data sets would overwrite each other's.
        """
        logs.update(self._take_loss("train") if self.model.training else self._take_evaluation())
        super().log(logs, start_time)

    @property
    def _group_size(self) -> int:
        return cast(int, self.num_generations if self.model.training else self.num_generations_eval)

    @property
    def _most_tokens(self) -> int:
        assert self.max_completion_length is not None  # checked by EBFTGRPOConfig
        return self.max_completion_length

    # ---- Length of completions ----------------------------------------------------------------

    def rollout_budget(self, inputs: list[dict[str, Any]] | None = None) -> int:
        """Largest number of tokens of a completion, for the current batch or another one.

        With `adaptive_max_tokens` it depends on the longest ground truth of all processes: a
        collective call.

        Args:
            inputs: rows of this process in another batch.
        """
        if inputs is None:
            return self.completion_budget
        if not self.args.adaptive_max_tokens:
            return self._most_tokens
        longest = max(len(example.truth_ids) for example in self._encode(inputs))
        longest = int(gather(torch.tensor([longest], device=self.accelerator.device)).max())
        return min(self._most_tokens, math.ceil(self.args.gt_length_multiplier * longest))

    def _prepare_rollouts(self, inputs: list[dict[str, Any]]) -> None:
        """Set the budget of a batch, and raise for rows that cannot be read, before TRL samples."""
        examples = self._encode(inputs)
        self._set_budget(self.rollout_budget(inputs))
        longest = max(examples, key=lambda example: len(example.prompt_ids))
        multiple = cast("int | None", self.pad_to_multiple_of) or 1
        # TRL pads prompts and completions separately.
        width = sum(
            math.ceil(tokens / multiple) * multiple
            for tokens in (len(longest.prompt_ids), self.completion_budget)
        )
        refuse_longer(width, self._limit, "The longest prompt with a completion of full length")
        longest = max(examples, key=lambda example: len(example.prompt_ids + example.truth_ids))
        refuse_longer(
            len(longest.prompt_ids + longest.truth_ids),
            self._limit,
            "The longest prompt with its ground truth",
        )

    def _set_budget(self, tokens: int) -> None:
        self.completion_budget = self.reward.completion_budget = tokens
        set_most_tokens(self, tokens)

    # ---- Preparation --------------------------------------------------------------------------

    def _build_network(self, given: nn.Module | None) -> SequenceFeatureNetwork:
        args = self.args

        def make(model: nn.Module, *, shared: bool, device: object) -> SequenceFeatureNetwork:
            if not shared:
                restore_forward(model)
            return SequenceFeatureNetwork(
                model,
                feature_layers=args.feature_layers,
                embed_method=args.embed_method,
                normalization=args.feature_normalization,
                batch_tokens=args.feature_batch_tokens,
                shared=shared,
                autocast=self.accelerator.autocast,
            )

        return build_placed_network(self.model, given, args, self.accelerator, make)


def _refuse_lasting_cast(model: nn.Module, args: EBFTGRPOConfig) -> None:
    """Raise if continuous batching in TRL would cast the policy's weights permanently.

    Raises:
        ValueError: naming the precision to load the model in.
    """
    wanted = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    others = {weight.dtype for weight in model.parameters()} - {wanted}
    if args.use_transformers_continuous_batching and wanted is not None and others:
        found = ", ".join(sorted(map(str, others)))
        raise ValueError(
            f"use_transformers_continuous_batching=True casts the policy from {found} to {wanted} "
            "for sampling and does not restore it, so training, and a feature network that shares "
            f"the weights, would use rounded weights. Load the model in {wanted}, set bf16=False "
            "and fp16=False, or set use_transformers_continuous_batching=False."
        )


def _refuse_tools(kwargs: dict[str, Any]) -> None:
    for name in ("tools", "environment_factory"):
        if kwargs.get(name):
            raise ValueError(
                f"{name} changes the prompt while completions are sampled, so the ground truth "
                "would not continue the prompt that the policy saw; leave it out."
            )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _forked_type(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type
