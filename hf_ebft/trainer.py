"""`EBFTTrainer`: a `transformers.Trainer` whose loss is Energy-Based Fine-Tuning.

`compute_loss` is the algorithm: sample, score, log-probabilities, objective, record. Optimizer
steps, evaluation and hyperparameter search are mixins, in `training/`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_ebft.config import EBFTConfig, EBFTSettings
from hf_ebft.data.collator import EBFTDataCollator
from hf_ebft.feature_network.corpus_whitening import choose_rows, measure_corpus_whitening
from hf_ebft.feature_network.fingerprint import fingerprint_of
from hf_ebft.feature_network.loading import build_feature_network
from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.losses import ebft_objective
from hf_ebft.objective.rewards import rewards_from_settings
from hf_ebft.objective.whitening import CorpusWhitening
from hf_ebft.packed.compiled_layers import CompileOptions
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.fsdp import SamplingGather
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.packed.model_parts import forward_inputs, vocabulary_size
from hf_ebft.packed.sampling import Rollouts, SamplingRecord, sample_with_record
from hf_ebft.packed.verification import verify_packing
from hf_ebft.training.ema import EMACallback
from hf_ebft.training.evaluation import EvaluationMixin
from hf_ebft.training.fitted_baseline import FittedBaseline
from hf_ebft.training.metrics import sum_over_processes
from hf_ebft.training.outputs import EBFTOutput, Scores
from hf_ebft.training.preparation import check_arguments, fill_in_learning_rate, with_adapters
from hf_ebft.training.random_streams import RolloutStreams, corpus_rows
from hf_ebft.training.same_features import SameFeaturesCallback
from hf_ebft.training.search import SearchMixin
from hf_ebft.training.step_log import StepLog
from hf_ebft.training.steps import StepsMixin
from hf_ebft.watching.saving import CardTrainer
from hf_ebft.watching.tensorboard import PicturesCallback

if TYPE_CHECKING:
    from peft import PeftConfig


class EBFTTrainer(StepsMixin, EvaluationMixin, SearchMixin, CardTrainer):
    """Drop-in replacement for `transformers.Trainer` that fine-tunes by feature matching.

    Args:
        model: the policy: a causal language model with attention layers only, or a PEFT model of
            one.
        args: an `EBFTConfig`, or a plain `TrainingArguments`, for which the EBFT settings have
            their defaults.
        data_collator: default: `EBFTDataCollator`, which pads.
        feature_network: frozen network phi with the policy's tokenizer. Default: the model at
            `feature_model_name_or_path` if set, else a frozen copy of `model` as it is now.
            `feature_placement` says where it lives.
        peft_config: if given, `model` is wrapped with these adapters first.
        **kwargs: the other arguments of `Trainer`.

    Raises:
        ValueError: settings, model, feature network or dataset that cannot work.
    """

    _corpus_whitening: CorpusWhitening | None
    _keeps_record = False  # see _sample_with_record
    _record: SamplingRecord | None = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        feature_network: nn.Module | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = EBFTConfig(output_dir="tmp_trainer") if args is None else args
        self.ebft: EBFTSettings = args if isinstance(args, EBFTSettings) else EBFTSettings()
        check_arguments(args, self.ebft, kwargs, train_dataset, eval_dataset)
        self._given_feature_network = feature_network
        self._constructed = False
        super().__init__(
            model=with_adapters(model, peft_config),
            args=args,
            data_collator=data_collator or EBFTDataCollator(processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # for releases without loss_is_scaled_for_ga
        fill_in_learning_rate(self.args, self.model)
        self._prepare_networks(self.model)
        # Under FSDP, only the main process may hold the policy's weights at this point.
        if self.ebft.verify_packing and self.accelerator.is_main_process:
            verify_packing(self.model, self._forward)
        self.random_streams = RolloutStreams(self.args)
        self.step_log = StepLog(self, self.ebft, static_shapes=self.static_shapes)
        gather = self.ebft.gather_params_for_sampling
        self._gathered_for_sampling = SamplingGather(gather, self.accelerator)
        self.add_callback(SameFeaturesCallback(lambda: self._fingerprint))
        if (every := self.ebft.log_pictures_steps) > 0:
            self.add_callback(PicturesCallback(self, every, stride=self.ebft.stride))
        if self.ebft.advantage_estimator == "fitted":
            self.fitted = FittedBaseline(self)
            self.add_callback(self.fitted)
        if self.ebft.ema_decay is not None:
            self.averaging = EMACallback(self, self.ebft.ema_decay)
            self.add_callback(self.averaging)
        self._constructed = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The EBFT loss of a batch.

        Every process makes the same forward passes, whatever its documents: G for sampling and one
        with gradient. So the collective calls of DDP and FSDP stay in step.

        Args:
            model: the wrapped policy.
            inputs: `input_ids` (rows, tokens) and what else `Documents.from_inputs` reads.
            return_outputs: also return an `EBFTOutput`.
            num_items_in_batch: documents of the whole optimizer step, over accumulation steps and
                processes, as `get_batch_samples` counts them. None: this batch is the step.

        Raises:
            FloatingPointError: the loss or the policy's logits are not finite.
            ValueError: the batch cannot be read, or a document is too long for the model.
        """
        if self._teacher_forced:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.step_log.phase("rollout"):
            rollouts, record = self._sample_with_record(model, inputs)
        with self.step_log.phase("features"):
            scores = self.score_rollouts(rollouts)
        log_probs = self._training_pass.log_probs(model, rollouts, record)
        objective = ebft_objective(
            self.ebft,
            rollouts.layout,
            log_probs.rollout,
            scores.by_token,
            document_log_probs=log_probs.document,
            reference_log_probs=scores.reference_log_probs,
            coefficients=self.coefficients,
        )
        outputs = EBFTOutput.from_step(rollouts, scores, log_probs.rollout, objective)
        self.step_log.record(outputs)
        loss = objective.loss * self.share_of_step(rollouts.layout.documents, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
        """Sample rollouts for a batch; override to supply others.

        A subclass may return `super().sample_rollouts(model, inputs).with_tokens(...)`.

        Args:
            model: the wrapped policy.
            inputs: the batch, on the policy's device.

        Returns:
            `tokens` (B, n, K, G), K the largest number of blocks in the batch (at least 1), and
            `exists` (B, K).
        """
        settings, layout = self.ebft, self.read_layout(inputs)
        generator = self.random_streams.next(
            layout.documents.input_ids.device, self.state.global_step
        )
        layout = self.choose_blocks(model, layout, generator)
        targets = None
        if self._keeps_record:
            targets = self._training_pass.targets_in_sampling(model, layout)
        with self._gathered_for_sampling(model):
            rollouts, record = sample_with_record(
                model,
                self._forward,
                layout,
                temperature=settings.temperature,
                top_p=settings.top_p,
                chunk_size=settings.log_prob_chunk_size,
                generator=generator,
                targets=targets,
            )
        if self._keeps_record:
            self._record = record
        return rollouts

    def _sample_with_record(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Rollouts, SamplingRecord | None]:
        """`sample_rollouts` for a loss, with the record of the sampling.

        The record is None if a subclass supplied the rollouts.
        """
        self._keeps_record, self._record = True, None
        try:
            return self.sample_rollouts(model, inputs), self._record
        finally:
            self._keeps_record, self._record = False, None

    def score_rollouts(self, rollouts: Rollouts) -> Scores:
        """Compute rewards and advantages of rollouts; override to train on others.

        A subclass may return `dataclasses.replace(super().score_rollouts(rollouts), ...)`.

        Args:
            rollouts: the batch and its sampled tokens.

        Returns:
            Rewards and advantages (B, n, K), and phi's log-probabilities if training has a KL
            penalty.
        """
        settings = self.ebft
        score = None
        if self.coefficients.kl > 0 and not self.random_streams.evaluating:
            score = partial(
                packed_log_probs,
                temperature=settings.temperature,
                with_document=False,
                chunk_size=settings.log_prob_chunk_size,
            )
        fitted = None if self.random_streams.evaluating else self.fitted
        with torch.no_grad(), self.accelerator.autocast():
            features = (fitted or self.feature_network).embed(rollouts, score)
        with torch.no_grad():
            rewards = rewards_from_settings(
                settings,
                features.generated,
                features.ground_truth,
                corpus_whitening=self.corpus_whitening(),
            )
            if fitted:
                by_token = fitted.score(self.model, self._forward, rollouts, features)
                return Scores(rewards, by_token.mean(-1), features.reference_log_probs, by_token)
            estimator = "reinforce" if self.fitted else settings.advantage_estimator
            advantages = compute_advantages(rewards, estimator)
        return Scores(rewards, advantages, features.reference_log_probs)

    def corpus_whitening(self) -> CorpusWhitening | None:
        """The corpus whitening, measured on first use; None if unused.

        A collective call: all processes must make it together. The data loader repeats rows to
        fill up the last batches of the processes; these rows count twice.
        """
        settings = self.ebft
        if not settings.use_whitening or settings.whitening_space != "corpus":
            return None
        if self._corpus_whitening is None:
            number, generator = settings.corpus_whitening_documents, corpus_rows(self.args.seed)
            rows = choose_rows(self.train_dataset, number, generator)
            batches = self.get_test_dataloader(cast(Any, rows))
            self._corpus_whitening = measure_corpus_whitening(
                self.feature_network,
                (self.document_reader.read(self._prepare_inputs(batch)) for batch in batches),
                settings,
                sum_over_processes=sum_over_processes,
                autocast=self.accelerator.autocast,
            )
        return self._corpus_whitening

    # ---- Preparation --------------------------------------------------------------------------

    def _prepare_networks(self, policy: nn.Module) -> None:
        compiler = CompileOptions.of(self.args)
        self._forward = PackedForward.for_model(
            policy,
            self.ebft.packed_attention,
            device_type=self.accelerator.device.type,
            trains=True,
            compiler=compiler,
        )
        self._vocabulary_size = vocabulary_size(policy)
        self._model_inputs = forward_inputs(policy)
        self.feature_network = build_feature_network(
            policy, self._given_feature_network, self.ebft, self.accelerator, compiler=compiler
        )
        self._fingerprint = fingerprint_of(self.feature_network)
        self._corpus_whitening = None  # measured when first needed

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Call `model_init`, and prepare the new policy of each `train()` like the first one."""
        policy = super().call_model_init(trial)
        if self._constructed:  # else the constructor does so, once the policy is on its device
            self._prepare_networks(policy)
        return policy
