"""`EBFTTrainer`: a `transformers.Trainer` whose loss is Energy-Based Fine-Tuning.

`compute_loss` is the algorithm; everything above it prepares, everything below it watches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hf_ebft.config import EBFTConfig, EBFTSettings
from hf_ebft.data.collator import EBFTDataCollator
from hf_ebft.feature_network.corpus_whitening import (
    choose_rows,
    from_main_process,
    measure_corpus_whitening,
)
from hf_ebft.feature_network.loading import build_feature_network
from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.losses import (
    cross_entropy,
    kl_penalty,
    per_rollout_token_mean,
    policy_gradient_loss,
    refuse_not_finite,
)
from hf_ebft.objective.rewards import Rewards, rewards_from_settings
from hf_ebft.objective.whitening import CorpusWhitening
from hf_ebft.packed.deferred import TrainingPass
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.fsdp import gathering_fits, is_sharded, parameters_gathered
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.packed.model_parts import bare_model, vocabulary_size
from hf_ebft.packed.sampling import Rollouts, SamplingRecord, sample_with_record
from hf_ebft.packed.teacher_forcing import teacher_forcing_inputs
from hf_ebft.packed.verification import verify_packing
from hf_ebft.rows.anchors import find_blocks_for
from hf_ebft.rows.documents import EBFT_COLUMNS, Documents, split_rows
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training.ema import EMACallback
from hf_ebft.training.metrics import (
    MetricAccumulator,
    Ratio,
    block_metrics,
    rollout_metrics,
    token_metrics,
)
from hf_ebft.training.outputs import EBFTOutput
from hf_ebft.training.preparation import (
    keep_one_device_per_process,
    refuse_empty,
    refuse_missing_corpus,
    refuse_what_would_be_ignored,
    with_adapters,
)
from hf_ebft.training.random_streams import RolloutStreams, corpus_rows
from hf_ebft.training.stopwatch import Stopwatch
from hf_ebft.watching.saving import CardTrainer
from hf_ebft.watching.tensorboard import PicturesCallback

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


class EBFTTrainer(CardTrainer):
    """Drop-in replacement of `transformers.Trainer` that fine-tunes by feature matching.

    Args:
        model: a causal language model whose layers are all attention layers, or a PEFT model of
            one.
        args: an `EBFTConfig`, or a plain `TrainingArguments`, which gets the EBFT defaults.
        feature_network: frozen network phi with the policy's tokenizer. Default: the model at
            `feature_model_name_or_path` if set, else `model` as it is now, placed by
            `feature_placement`.
        peft_config: wraps `model` by PEFT first.
        **kwargs: everything else that `Trainer` takes. Without a `data_collator`,
            [`~hf_ebft.data.collator.EBFTDataCollator`] pads.

    Raises:
        ValueError: settings, model, feature network or dataset that cannot work.
    """

    model: nn.Module  # Trainer's own annotation admits None, which it never is here
    _corpus_whitening: CorpusWhitening | None
    _record: SamplingRecord | None

    # The Trainer has to divide the loss by the accumulation steps; see _share_of_step.
    loss_is_scaled_for_ga = False

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
        refuse_what_would_be_ignored(args, kwargs)
        refuse_empty(train_dataset, "train_dataset")
        refuse_empty(eval_dataset, "eval_dataset")
        refuse_missing_corpus(self.ebft, train_dataset)
        keep_one_device_per_process(args)
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
        # For transformers releases that do not know loss_is_scaled_for_ga.
        self.model_accepts_loss_kwargs = False
        self._prepare_networks(self.model)
        # Other processes may not hold the policy's weights yet.
        if self.ebft.verify_packing and self.accelerator.is_main_process:
            verify_packing(self.model, self._forward)

        device = self.args.device
        self._training_metrics = MetricAccumulator(device)
        self._evaluation_metrics = MetricAccumulator(device)
        self._stopwatch = Stopwatch(device)
        self.random_streams = RolloutStreams(self.args)
        self._keeps_record, self._record = False, None  # see _sample_with_record
        self._evaluation_batch: int | None = None  # None while training
        self._teacher_forced = False
        self._warned_of_no_blocks = False
        self._gather_for_sampling: bool | None = None
        if self.ebft.log_pictures_steps > 0:
            self.add_callback(
                PicturesCallback(self, self.ebft.log_pictures_steps, stride=self.ebft.stride)
            )
        self.averaging: EMACallback | None = None
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
        """The EBFT loss of a batch: sample, embed, reward, compare, score.

        Every process makes the same forward passes whatever its documents are: G for sampling and
        one with gradient. That is what keeps the collective calls of DDP and FSDP in step.

        Args:
            model: the wrapped policy.
            inputs: ``input_ids`` (rows, tokens) and what :class:`hf_ebft.rows.documents.Documents`
                reads.
            return_outputs: also return an [`EBFTOutput`].
            num_items_in_batch: documents of the whole optimizer step, over accumulation steps and
                processes, as :meth:`get_batch_samples` counts them; None: this batch is the step.

        Raises:
            FloatingPointError: the loss or the policy's logits are not finite.
            ValueError: a batch that cannot be read, or a document too long for the model.
        """
        if self._teacher_forced:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        settings = self.ebft
        with self._stopwatch.phase("rollout"):
            rollouts, record = self._sample_with_record(model, inputs)
        layout = rollouts.layout
        with self._stopwatch.phase("features"):
            rewards, advantages, reference = self._score(rollouts)
        log_probs = self._training_pass.log_probs(model, rollouts, record)
        rl_loss = policy_gradient_loss(log_probs.rollout, advantages, layout)
        loss, ce_loss, kl = settings.rl_coef * rl_loss, None, None
        if log_probs.document is not None:
            ce_loss = cross_entropy(log_probs.document, layout.documents)
            loss = loss + settings.ce_coef * ce_loss
        if reference is not None:
            penalty = kl_penalty(log_probs.rollout, reference, settings.kl_estimator)
            kl = per_rollout_token_mean(penalty, layout)
            loss = loss + settings.kl_coef * kl
        refuse_not_finite(loss, {"rl_loss": rl_loss, "ce_loss": ce_loss, "kl": kl})

        self._training_metrics.add(
            block_metrics(rewards, advantages, layout)
            | rollout_metrics(rollouts.tokens, layout)
            | token_metrics(log_probs, rl_loss, ce_loss, kl, layout)
        )
        self._warn_of_no_blocks(rollouts)
        outputs = EBFTOutput(rollouts, rewards, advantages, log_probs.rollout, rl_loss, ce_loss, kl)
        self._tell_callbacks(outputs)
        if num_items_in_batch is not None:
            loss = loss * self._share_of_step(layout.documents, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
        """Sample rollouts for a batch; override to supply others.

        A subclass may return `super().sample_rollouts(model, inputs).with_tokens(...)`.

        Args:
            model: the wrapped policy.
            inputs: the batch, on the policy's device.

        Returns:
            ``tokens`` (B, n, K, G), K the largest number of blocks in the batch (at least 1), and
            ``exists`` (B, K).
        """
        settings = self.ebft
        documents = self._read(inputs)
        blocks = find_blocks_for(
            settings,
            documents,
            pad_to_multiple_of=max(1, settings.pad_to_multiple_of // settings.stride),
        )
        layout = PackedLayout(
            documents, blocks, settings.n_samples_per_prompt, settings.generate_max_len
        )
        targets = None
        if self._keeps_record:
            targets = self._training_pass.targets_in_sampling(model, layout)
        with self._parameters_for_sampling(model):
            rollouts, record = sample_with_record(
                model,
                self._forward,
                layout,
                temperature=settings.temperature,
                top_p=settings.top_p,
                chunk_size=settings.log_prob_chunk_size,
                generator=self._generator(documents.input_ids.device),
                targets=targets,
            )
        if self._keeps_record:
            self._record = record
        return rollouts

    def _sample_with_record(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Rollouts, SamplingRecord | None]:
        """`sample_rollouts` for a loss, and what it computed beside the tokens, if it sampled."""
        self._keeps_record, self._record = True, None
        try:
            return self.sample_rollouts(model, inputs), self._record
        finally:
            self._keeps_record, self._record = False, None

    @property
    def _training_pass(self) -> TrainingPass:
        settings = self.ebft
        return TrainingPass(
            self._forward,
            temperature=settings.temperature,
            with_document=settings.ce_coef > 0,
            chunk_size=settings.log_prob_chunk_size,
            training_chunk_size=settings.training_chunk_size,
        )

    # ---- Scoring ------------------------------------------------------------------------------

    def _score(self, rollouts: Rollouts) -> tuple[Rewards, Tensor, Tensor | None]:
        """Rewards, advantages and, if there is a KL penalty, the reference's log-probabilities."""
        settings = self.ebft
        score = None
        if settings.kl_coef > 0 and not self._evaluating:
            score = partial(
                packed_log_probs,
                temperature=settings.temperature,
                with_document=False,
                chunk_size=settings.log_prob_chunk_size,
            )
        with torch.no_grad(), self.accelerator.autocast():
            features = self.feature_network.embed(rollouts, score)
        with torch.no_grad():
            rewards = rewards_from_settings(
                settings,
                features.generated,
                features.ground_truth,
                corpus_whitening=self.corpus_whitening(),
            )
            advantages = compute_advantages(rewards, settings.advantage_estimator)
        return rewards, advantages, features.reference_log_probs

    def corpus_whitening(self) -> CorpusWhitening | None:
        """What whitens features by corpus, measured at the first call; None where nothing asks it.

        A collective call: every process must make it together. Rows that fill up the last batches
        of the processes count twice.
        """
        settings = self.ebft
        if not settings.use_whitening or settings.whitening_space != "corpus":
            return None
        if self._corpus_whitening is None:
            rows = choose_rows(
                self.train_dataset,
                settings.corpus_whitening_documents,
                corpus_rows(self.args.seed),
            )
            # Iterating a DataLoader draws from torch's global generator.
            with torch.random.fork_rng(devices=[]):
                loader = self.get_test_dataloader(cast(Any, rows))
                measured = measure_corpus_whitening(
                    self.feature_network,
                    (self._read(self._prepare_inputs(inputs)) for inputs in loader),
                    settings,
                    sum_over_processes=self._sum_over_processes,
                    autocast=self.accelerator.autocast,
                )
            self._corpus_whitening = from_main_process(measured)
        return self._corpus_whitening

    def _read(self, inputs: dict[str, Any]) -> Documents:
        return Documents.from_inputs(
            inputs,
            document_masking=self.ebft.document_masking,
            eos_token_id=self._eos_token_id(),
            vocabulary_size=self._vocabulary_size,
            pad_to_multiple_of=self.ebft.pad_to_multiple_of,
        )

    def _eos_token_id(self) -> int | None:
        from_tokenizer = getattr(self.processing_class, "eos_token_id", None)
        if from_tokenizer is not None:
            return int(from_tokenizer)
        eos = bare_model(self.model).config.get_text_config(decoder=True).eos_token_id
        return eos[0] if isinstance(eos, list) else eos

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step and the number of documents in them, everywhere.

        `Trainer` counts label tokens here; EBFT's loss is a mean over documents.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(float(self._read(batch).count) for batch in batches)
        return batches, self._sum_over_processes(torch.tensor(count, device=device))

    def _share_of_step(self, documents: Documents, documents_of_step: Tensor | int) -> Tensor:
        """What turns a mean over this micro-batch into its part of the mean over the step.

        `Trainer` then divides by the accumulation steps, and DDP or FSDP by the processes. It is 1
        where all micro-batches hold equally many documents.
        """
        return documents.count * self._shares / documents_of_step

    @property
    def _shares(self) -> int:
        return self.current_gradient_accumulation_steps * self.accelerator.num_processes

    def _parameters_for_sampling(self, model: nn.Module) -> AbstractContextManager[None]:
        """Under FSDP2, keep parameters gathered over the decoding steps if there is room."""
        if not is_sharded(model):
            return nullcontext()
        if self._gather_for_sampling is None:  # decided once, together
            self._gather_for_sampling = self.ebft.gather_params_for_sampling == "true" or (
                self.ebft.gather_params_for_sampling == "auto"
                and gathering_fits(model, self.accelerator)
            )
        plugin = self.accelerator.state.fsdp_plugin
        if not self._gather_for_sampling or not plugin.reshard_after_forward:
            return nullcontext()
        return parameters_gathered(model, reshard_after=True)

    def _generator(self, device: torch.device) -> torch.Generator:
        if self._evaluation_batch is not None:
            return self.random_streams.for_evaluation(device, self._evaluation_batch)
        return self.random_streams.for_training(device, self.state.global_step)

    # ---- Evaluation ---------------------------------------------------------------------------

    @property
    def _evaluating(self) -> bool:
        return self._evaluation_batch is not None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Teacher-forced loss and logits as in `Trainer`, then rollouts for `ebft/*` metrics."""
        inputs = self._prepare_inputs(inputs)
        documents = self._read(inputs)
        self._teacher_forced = True
        try:
            result = super().prediction_step(
                model,
                teacher_forcing_inputs(inputs, documents, self._forward.recipe),
                prediction_loss_only,
                ignore_keys,
            )
        finally:
            self._teacher_forced = False
        if self.ebft.eval_rollouts and self._evaluating:
            for part in split_rows(inputs, self.ebft.rollout_batch_size):
                with torch.no_grad():
                    rollouts = self.sample_rollouts(model, part)
                    rewards, advantages, _ = self._score(rollouts)
                self._evaluation_metrics.add(
                    block_metrics(rewards, advantages, rollouts.layout)
                    | rollout_metrics(rollouts.tokens, rollouts.layout)
                )
                assert self._evaluation_batch is not None
                self._evaluation_batch += 1
        return result

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """`Trainer`'s loop, with `{prefix}_ebft/*` added from rollouts drawn with a fixed seed."""
        self._evaluation_batch = 0
        self._evaluation_metrics.clear()
        try:
            # Iterating a DataLoader draws from torch's global generator, which would change the
            # dropout of the training steps that follow.
            with torch.random.fork_rng(devices=[]):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self._evaluation_batch = None
        if self.ebft.eval_rollouts:
            assert output.metrics is not None
            for name, value in self._evaluation_metrics.take(self._sum_over_processes).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    # ---- Watching -----------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """`Trainer`'s, started afresh: no earlier run and no loss computed by hand counts."""
        if self.averaging is not None:
            unnamed = resume_from_checkpoint is None or isinstance(resume_from_checkpoint, bool)
            self.averaging.resume_from = None if unnamed else str(resume_from_checkpoint)
        self._training_metrics.clear()
        self._stopwatch.take()
        self.random_streams.restart()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """`Trainer`'s step, in parts of `rollout_batch_size` rows, timed by phase."""
        parts = split_rows(inputs, self.ebft.rollout_batch_size)
        if num_items_in_batch is None and len(parts) > 1:
            # This batch is the step; its parts are not.
            num_items_in_batch = self._read(inputs).count * self._shares
        losses = []
        with self._stopwatch.phase("training"):
            for part in parts:
                # FSDP2 adds up shards, and would have to keep whole gradients to do it later.
                later = part is not parts[-1] and not is_sharded(model)
                with self.accelerator.no_sync(model) if later else nullcontext():
                    losses.append(super().training_step(model, part, num_items_in_batch))
        self._training_metrics.add(
            {
                f"seconds_{phase}": Ratio(spent, 1.0)
                for phase, spent in self._stopwatch.take().items()
            }
        )
        return torch.stack(losses).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the `ebft/*` means since the last training log: means over all processes."""
        if "loss" in logs:
            logs = logs | self._training_metrics.take(self._sum_over_processes)
        super().log(logs, start_time)

    def _tell_callbacks(self, outputs: EBFTOutput) -> None:
        """Call ``on_ebft_outputs(args, state, control, outputs=...)`` where a callback defines it.

        Once per micro-batch of training, in every process. The tensors are the step's own: detach
        and copy what is to be kept.
        """
        for callback in self.callback_handler.callbacks:
            listen = getattr(callback, "on_ebft_outputs", None)
            if listen is not None:
                listen(self.args, self.state, self.control, outputs=outputs)

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    def _warn_of_no_blocks(self, rollouts: Rollouts) -> None:
        if self._warned_of_no_blocks or bool(rollouts.exists.any()):
            return
        self._warned_of_no_blocks = True
        settings, documents = self.ebft, rollouts.layout.documents
        logger.warning(
            "No document of a micro-batch has room for a block: the longest has %d tokens, a block "
            "needs context_length + generate_max_len = %d unmasked ones (after the prompt, if one "
            "is marked). Such documents contribute only their cross-entropy (ce_coef=%g); their "
            "share is logged as ebft/documents_without_blocks.",
            int(documents.length.max()),
            settings.context_length + settings.generate_max_len,
            settings.ce_coef,
        )

    # ---- Preparation --------------------------------------------------------------------------

    def _prepare_networks(self, policy: nn.Module) -> None:
        attention: str = self.ebft.packed_attention
        if self.args.torch_compile and attention == "auto":
            attention = "dense"  # TorchDynamo cannot carry the plan of split attention
        self._forward = PackedForward.for_model(policy, attention)
        self._vocabulary_size = vocabulary_size(policy)
        self.feature_network = build_feature_network(
            policy, self._given_feature_network, self.ebft, self.accelerator
        )
        self._corpus_whitening = None  # measured when first needed

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """`Trainer`'s; the new policy of each ``train()`` is prepared like the first one."""
        policy = super().call_model_init(trial)
        if self._constructed:  # else the constructor does it, once the policy is on its device
            self._prepare_networks(policy)
        return policy

    def _set_signature_columns_if_needed(self) -> None:
        # Private in transformers, and the only way to keep columns that the model does not take
        # while remove_unused_columns drops the others (TRL's trainers override it too).
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns = cast(list[str], self._signature_columns)
            columns += EBFT_COLUMNS
