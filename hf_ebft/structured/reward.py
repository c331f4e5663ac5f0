"""Feature matching as a reward function of TRL's trainers.

Dimension letters: R rows (completions) of this process, P prompts of all processes, n completions
of a prompt, D width of an embedding.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ebft.data.thinking import answer_start
from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.duplicates import first_equal_rollouts, with_equal_features
from hf_ebft.objective.rewards import Rewards, rewards_from_settings
from hf_ebft.packed.model_parts import bare_model
from hf_ebft.structured.baselines import BASELINES, Baseline, check_trainer
from hf_ebft.structured.columns import ground_truth_column
from hf_ebft.structured.config import StructuredSettings, refuse_groups_that_do_not_sum_to_zero
from hf_ebft.structured.encoding import Example, ExampleEncoder, text_of
from hf_ebft.structured.groups import fingerprints, gather_rows, group_size, own_rows
from hf_ebft.structured.sequence_features import SequenceFeatureNetwork, TokenSequence
from hf_ebft.structured.trl_internals import restore_forward, trainer_of
from hf_ebft.structured.unfinished import rank_unfinished_last
from hf_ebft.training.metric_table import PREFIX
from hf_ebft.training.metrics import ZERO_ADVANTAGE

# Settings that are fixed by a `SequenceFeatureNetwork`.
NETWORK_OPTIONS = (
    "feature_layers",
    "feature_normalization",
    "feature_placement",
    "feature_dtype",
    "embed_method",
    "feature_batch_tokens",
)


@dataclass(frozen=True)
class Scores:
    """Rewards and advantages of the completions of all processes.

    Attributes:
        rewards: fields (P, n, 1), scores of groups (P, 1).
        advantages: (P, n, 1).
        duplicates: (P, n) bool, whether a completion repeats an earlier one of its group.
        has_answer: (P * n,) bool, false for completions that end within their thinking.
        examples: the R prompts and ground truths of this process.
    """

    rewards: Rewards
    advantages: Tensor
    duplicates: Tensor
    has_answer: Tensor
    examples: list[Example]


class FeatureMatchingReward:
    """Rewards completions whose features resemble the ground truth's and differ from each other's.

    A reward function for TRL's `GRPOTrainer` and `RLOOTrainer`. Both subtract a baseline from the
    rewards, which would undo the paper's baseline (eq. 94). So this function returns numbers that
    become the wanted advantage A after that subtraction. A sums to zero over every group of n >= 3,
    hence:

    - `GRPOTrainer` subtracts the group's mean: A - mean(A) = A, so A is returned. Its
      `scale_rewards` must be off.
    - `RLOOTrainer` subtracts the mean of the others: A_j - (0 - A_j) / (n - 1) = A_j n / (n - 1),
      so A (n - 1) / n is returned, with `trainer_baseline="leave_one_out"`. Its
      `normalize_advantages` and `reward_clip_range` must be off, and its `beta` 0.

    If the trainer has other settings, a warning is logged at the first call.

    The ground truth is read from a column of the dataset, which TRL passes by name (but not a
    column called `completion`: rename that one). The trainers' metric `reward` is then the mean
    advantage, about 0; the paper's reward is the metric `ebft/mean_reward`.

    Args:
        model_or_feature_network: the frozen network phi; or a model, of which a frozen copy is made
            (so the policy itself may be given); or the name of a model. It embeds the policy's
            token ids, so both must have the same tokenizer.
        processing_class: the policy's tokenizer, as the trainer has it. Default: the tokenizer at
            the model's name or path.
        num_generations: completions per prompt in training. Default: the number of consecutive
            equal prompts in a batch; set it if a dataset may contain a row twice.
        num_generations_eval: completions per prompt in evaluation. Default: as in training.
        trainer_baseline: what the trainer subtracts from rewards: `group_mean` (`GRPOTrainer`) or
            `leave_one_out` (`RLOOTrainer`).
        chat_template_kwargs: those of the trainer.
        eos_token_ids: ids that end a completion, in addition to the tokenizer's. Default: those
            that the model declares.
        settings: all settings at once, instead of **options.
        **options: fields of `StructuredSettings`, such as `embed_method` or `use_whitening`.

    Raises:
        ValueError: settings that cannot work.
        TypeError: an unknown option.
    """

    def __init__(
        self,
        model_or_feature_network: SequenceFeatureNetwork | nn.Module | str,
        processing_class: Any = None,
        *,
        num_generations: int | None = None,
        num_generations_eval: int | None = None,
        trainer_baseline: Baseline = "group_mean",
        chat_template_kwargs: dict[str, Any] | None = None,
        eos_token_ids: Sequence[int] | None = None,
        settings: StructuredSettings | None = None,
        **options: Any,
    ) -> None:
        if settings is not None and options:
            raise TypeError(f"settings and {', '.join(options)} are both given; keep one.")
        if trainer_baseline not in BASELINES:
            raise ValueError(
                f"trainer_baseline={trainer_baseline!r} is unknown; choose group_mean "
                "(GRPOTrainer) or leave_one_out (RLOOTrainer)."
            )
        if settings is None:
            _refuse_unused(options, model_or_feature_network)
            settings = StructuredSettings(**options)
        self.settings = settings
        # The group size is unknown until the first batch; 4 is valid for every estimator.
        self.settings.validate_for(num_generations or 4, "num_generations")
        self.trainer_baseline = trainer_baseline
        self.network = _network_of(model_or_feature_network, self.settings)
        self.encoder = ExampleEncoder(
            _tokenizer_of(self.network.model) if processing_class is None else processing_class,
            eos_token_ids=(
                _eos_token_ids(self.network.model) if eos_token_ids is None else eos_token_ids
            ),
            chat_template_kwargs=chat_template_kwargs,
            vocabulary_size=self.network.vocabulary_size,
        )
        self.column = self.settings.ground_truth_column
        self.num_generations = num_generations
        # A trainer may set these for the next batch.
        self.group_sizes: tuple[int | None, ...] = (num_generations, num_generations_eval)
        self.completion_budget: int | None = None
        self._trainer_checked = False
        # TRL names metrics and columns of the completions table after the function.
        self.__name__ = "feature_matching"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Reward completions, with the signature that TRL expects.

        All processes must call this together, with equally many completions.

        Args:
            prompts: R prompts, each repeated for its completions.
            completions: R completions as text or messages; ignored, since the ids are used.
            completion_ids: R lists of token ids.
            log_metric, log_extra: TRL's channels for metrics and for the completions table.
            **columns: the dataset's other columns, R values each. Besides the ground truth,
                `embed_thinking`, `completion_mask` and `rollout_prompt_ids` are read, see
                `score`.

        Returns:
            R numbers.

        Raises:
            ValueError: the columns contain no ground truth, the rows are not groups, or the trainer
                subtracts another baseline.
        """
        if not self._trainer_checked:
            check_trainer(trainer_of(log_metric), self.trainer_baseline)
            self._trainer_checked = True
        start = time.perf_counter()
        truths = columns[ground_truth_column(columns, self.column)]
        scores = self.score(
            prompts,
            completion_ids,
            truths,
            embed_thinking=columns.get("embed_thinking"),
            completion_mask=columns.get("completion_mask"),
            rollout_prompt_ids=columns.get("rollout_prompt_ids"),
        )
        seconds = time.perf_counter() - start
        if log_metric is not None:
            for name, value in self._metrics(scores).items():
                log_metric(PREFIX + name, value)
            log_metric(PREFIX + "seconds_features", seconds)
        rewards, advantages = scores.rewards, scores.advantages
        if log_extra is not None:
            log_extra("ground_truth", [text_of(truth) for truth in truths])
            for name, values in (
                ("alignment", rewards.alignment),
                ("diversity", rewards.diversity),
            ):
                log_extra(name, [round(value, 4) for value in self._own(values, len(prompts))])
        if self.trainer_baseline == "leave_one_out":
            n_samples = advantages.shape[1]
            advantages = advantages * ((n_samples - 1) / n_samples)
        return self._own(advantages, len(prompts))

    def score(
        self,
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        truths: Sequence[Any],
        *,
        embed_thinking: Sequence[bool | None] | None = None,
        completion_mask: Sequence[Sequence[int]] | None = None,
        rollout_prompt_ids: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        """Embed the completions of this process, and reward those of all processes in their groups.

        A collective call.

        Args:
            prompts, completion_ids: as in `__call__`.
            truths: R ground truths.
            embed_thinking: whether thinking before an answer is embedded, too. Default: it is.
            completion_mask: 1 on tokens that the policy sampled, 0 on messages between its replies,
                as a rollout function for several turns returns it.
            rollout_prompt_ids: the prompts after which the completions were sampled, to be checked.
        """
        settings = self.settings
        device = PartialState().device
        examples = self.encoder.encode(prompts, truths, embed_thinking)
        _refuse_other_prompts(examples, rollout_prompt_ids)
        _refuse_other_masks(completion_ids, completion_mask)
        n_local = len(examples)
        sampled = [
            self._sequence(
                examples[row],
                tuple(completion_ids[row]),
                embed_thinking is None or embed_thinking[row] in (None, True),
                None if completion_mask is None else completion_mask[row],
            )
            for row in range(n_local)
        ]
        known = [_ground_truth_sequence(example) for example in examples]
        has_answer = torch.tensor([sequence is not None for sequence in sampled], device=device)
        embedded = self.network.embed(known + [s for s in sampled if s is not None]).to(device)
        truth_RD = embedded[:n_local]
        # A completion without an answer has no features; see `rank_unfinished_last` for its reward.
        generated_RD = torch.zeros_like(truth_RD)
        generated_RD[has_answer] = embedded[n_local:]

        n_samples = self._group_size(gather_rows(fingerprints(examples, device)))
        groups = (-1, n_samples)
        # One block per prompt: K = 1. Tokens decide which are equal, since rounding may differ.
        sequence_W = gather_rows(fingerprints([_key(sequence) for sequence in sampled], device))
        generated_PnKD = with_equal_features(
            gather_rows(generated_RD).unflatten(0, groups)[:, :, None],
            first_equal_rollouts(sequence_W.unflatten(0, groups)[:, :, None, None]),
        )
        rewards = rewards_from_settings(
            settings,
            generated_PnKD,
            gather_rows(truth_RD).unflatten(0, groups)[:, :1],
        )
        answered = gather_rows(has_answer)
        rewards = rank_unfinished_last(rewards, answered.unflatten(0, groups)[:, :, None])
        tokens = [tuple(ids) for ids in completion_ids]
        tokens_Pn = gather_rows(fingerprints(tokens, device)).unflatten(0, groups)
        same_Pnn = tokens_Pn[:, :, None] == tokens_Pn[:, None, :]
        return Scores(
            rewards=rewards,
            advantages=compute_advantages(rewards, settings.advantage_estimator),
            duplicates=same_Pnn.tril(-1).any(dim=2),
            has_answer=answered,
            examples=examples,
        )

    def _sequence(
        self,
        example: Example,
        completion: tuple[int, ...],
        with_thinking: bool,
        mask: Sequence[int] | None,
    ) -> TokenSequence | None:
        """The part of a completion to embed; None if it ends before its answer."""
        start = 0
        if not with_thinking:
            start = answer_start(example.prompt_ids, completion, self.encoder.tokenizer)
            if start == len(completion) > 0:
                return None
        others = () if mask is None else mask[start:]
        return TokenSequence(
            prompt_ids=example.prompt_ids,
            completion_ids=completion[start:],
            not_averaged=frozenset(
                place for place, by_policy in enumerate(others) if not by_policy
            ),
        )

    def _group_size(self, prompts: Tensor) -> int:
        size = group_size(prompts, self.group_sizes)
        if size < 2:
            raise ValueError(
                "num_generations=1 gives each prompt one completion, so there is no other one to "
                "compare it with; set the trainer's num_generations to 3 or more (the paper uses "
                "4)."
            )
        if self.num_generations in (None, size):
            refuse_groups_that_do_not_sum_to_zero(self.settings, size, "num_generations")
        return size

    def _metrics(self, scores: Scores) -> dict[str, float]:
        """Means over the completions of all processes; equal on all processes."""
        rewards, advantages = scores.rewards, scores.advantages
        idle = (advantages.abs() <= ZERO_ADVANTAGE).all(dim=1)
        lengths = [len(example.truth_ids) for example in scores.examples]
        metrics = {
            "alignment": rewards.alignment.mean().item(),
            "diversity": rewards.diversity.mean().item(),
            "mean_reward": rewards.reward.mean().item(),
            "cfm_loss": rewards.cfm_loss.mean().item(),
            "energy_score": rewards.energy_score.mean().item(),
            "excess_over_spread": rewards.excess_over_spread.mean().item(),
            "advantages_std": advantages.std(correction=0).item(),
            "duplicate_rollouts": scores.duplicates.float().mean().item(),
            "zero_advantage_groups": idle.float().mean().item(),
            "without_answer": 1 - scores.has_answer.float().mean().item(),
            # The mean of this process; TRL averages over processes.
            "ground_truth_length": sum(lengths) / len(lengths),
        }
        if self.completion_budget is not None:
            longer = sum(length > self.completion_budget for length in lengths)
            metrics["ground_truths_over_budget"] = longer / len(lengths)
        return metrics

    def _own(self, values: Tensor, n_local: int) -> list[float]:
        """(P, n, 1) of all processes -> R numbers of this one."""
        return own_rows(values.flatten(), n_local, PartialState().process_index).tolist()


def _key(sequence: TokenSequence | None) -> Hashable:
    """A value that identifies an embedded sequence, the same on every process."""
    if sequence is None:
        return None
    return sequence.prompt_ids, sequence.completion_ids, tuple(sorted(sequence.not_averaged))


def _ground_truth_sequence(example: Example) -> TokenSequence:
    return TokenSequence(
        prompt_ids=example.prompt_ids,
        completion_ids=example.truth_ids[example.answer_start :],
        not_averaged=frozenset(
            place
            for place, is_target in enumerate(example.is_target[example.answer_start :])
            if not is_target
        ),
    )


def _refuse_other_prompts(
    examples: list[Example], rollout_prompt_ids: Sequence[Sequence[int]] | None
) -> None:
    for example, ids in zip(examples, rollout_prompt_ids or (), strict=bool(rollout_prompt_ids)):
        if tuple(ids) != example.prompt_ids:
            raise ValueError(
                f"The rollout function sampled after a prompt of {len(ids)} tokens that is not the "
                f"one of {len(example.prompt_ids)} tokens that the ground truth continues; both "
                "must use the trainer's tokenizer and chat template."
            )


def _network_of(
    given: SequenceFeatureNetwork | nn.Module | str, settings: StructuredSettings
) -> SequenceFeatureNetwork:
    if isinstance(given, SequenceFeatureNetwork):
        return given
    _refuse_placements_of_the_trainer(settings)
    state = PartialState()
    dtype = None if settings.feature_dtype is None else getattr(torch, settings.feature_dtype)
    if isinstance(given, str):
        model: nn.Module = AutoModelForCausalLM.from_pretrained(given, dtype=dtype or "auto")
    else:
        model = frozen_copy(given)
        if dtype is not None:
            model = model.to(dtype)
    placement = settings.feature_placement
    wanted = placement not in ("auto", "same_device")
    return SequenceFeatureNetwork(
        model.to(torch.device(placement) if wanted else state.device),
        feature_layers=settings.feature_layers,
        embed_method=settings.embed_method,
        normalization=settings.feature_normalization,
        batch_tokens=settings.feature_batch_tokens,
    )


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model that runs with its own weights."""
    duplicate = copy.deepcopy(model)
    restore_forward(duplicate)
    return duplicate


def _refuse_other_masks(
    completion_ids: Sequence[Sequence[int]], masks: Sequence[Sequence[int]] | None
) -> None:
    for ids, mask in zip(completion_ids, masks or (), strict=bool(masks)):
        if len(mask) != len(ids):
            raise ValueError(
                f"completion_mask has {len(mask)} entries for a completion of {len(ids)} tokens, "
                "so it does not belong to it. Only rollout functions for several turns return this "
                "column; remove it from the dataset."
            )


def _refuse_unused(options: dict[str, Any], given: Any) -> None:
    """Raise for options that would have no effect."""
    weights = [
        name
        for name, value in options.items()
        if name.startswith("ce_coef") and value not in (0, None, "constant")
    ]
    if weights:
        raise ValueError(
            f"{weights[0]}={options[weights[0]]!r} adds a term to the loss, which a reward cannot; "
            "use EBFTGRPOTrainer."
        )
    settled = [name for name in NETWORK_OPTIONS if name in options]
    if settled and isinstance(given, SequenceFeatureNetwork):
        raise ValueError(
            f"{', '.join(settled)} would have no effect, since the SequenceFeatureNetwork is "
            "already built; pass these options to its constructor instead."
        )


def _refuse_placements_of_the_trainer(settings: StructuredSettings) -> None:
    if settings.feature_placement in ("shared", "second_device", "sharded"):
        raise ValueError(
            f"feature_placement={settings.feature_placement!r} needs EBFTGRPOTrainer, which knows "
            "the policy and the processes; with FeatureMatchingReward alone write a device such "
            "as 'cuda:1' or 'cpu'."
        )
    if settings.feature_model_name_or_path is not None or settings.feature_quantization is not None:
        raise ValueError(
            "feature_model_name_or_path and feature_quantization need EBFTGRPOTrainer; pass "
            "FeatureMatchingReward the name of the model, or the loaded model, directly."
        )


def _tokenizer_of(model: nn.Module) -> Any:
    path = bare_model(model).config.name_or_path
    if not path:
        raise ValueError(
            "The model's config has no name_or_path, so its tokenizer is unknown; pass "
            "processing_class."
        )
    return AutoTokenizer.from_pretrained(path)


def _eos_token_ids(model: nn.Module) -> list[int]:
    """Ids that the model declares as ends of a completion, read as TRL reads them."""
    declared = cast(Any, bare_model(model).generation_config).eos_token_id
    if declared is None:
        return []
    return [declared] if isinstance(declared, int) else list(declared)
