"""What a training step leaves behind: metrics, seconds by phase, a warning, calls of callbacks."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

from transformers import Trainer

from hf_ebft.config import EBFTSettings
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training.metrics import (
    MetricAccumulator,
    Ratio,
    block_metrics,
    rollout_metrics,
    sum_over_processes,
    token_metrics,
)
from hf_ebft.training.outputs import EBFTOutput
from hf_ebft.training.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

# Shapes of packed rows that a run may meet without a word.
MOST_SHAPES = 16


class StepLog:
    """Records the steps of one trainer.

    Args:
        trainer: its device holds the sums, and its callbacks are told of every micro-batch.
        settings: for the warning.
        static_shapes: whether each shape of the rows is compiled by itself.
    """

    def __init__(
        self, trainer: Trainer, settings: EBFTSettings, *, static_shapes: bool = False
    ) -> None:
        self._static_shapes = static_shapes
        self._trainer = trainer
        self._settings = settings
        self._metrics = MetricAccumulator(trainer.args.device)
        self._stopwatch = Stopwatch(trainer.args.device)
        self._warned_of_no_blocks = False
        self._shapes: set[tuple[int, ...]] = set()
        self._warned_of_shapes = False

    def restart(self) -> None:
        """A new run begins: nothing recorded so far counts."""
        self._metrics.clear()
        self._stopwatch.take()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a block as a part of `rollout`, `features` or `training`."""
        return self._stopwatch.phase(name)

    def record(self, outputs: EBFTOutput) -> None:
        """A micro-batch: its metrics, a warning where it has no block, and the callbacks.

        Every callback that defines `on_ebft_outputs(args, state, control, outputs=...)` is called,
        in every process. The tensors are the step's own: detach and copy what is to be kept.
        """
        layout = outputs.rollouts.layout
        self._metrics.add(
            block_metrics(outputs.rewards, outputs.advantages, layout)
            | rollout_metrics(outputs.rollouts.tokens, layout)
            | token_metrics(outputs.log_probs, outputs.rl_loss, outputs.ce_loss, outputs.kl, layout)
            | self._shape_metrics(layout)
            | {name: Ratio(value, 1.0) for name, value in outputs.coefficients.moving().items()}
        )
        self._warn_of_no_blocks(outputs)
        trainer = self._trainer
        for callback in trainer.callback_handler.callbacks:
            listen = getattr(callback, "on_ebft_outputs", None)
            if listen is not None:
                listen(trainer.args, trainer.state, trainer.control, outputs=outputs)

    def end_batch(self) -> None:
        """Count the seconds that the phases of a batch took."""
        seconds = self._stopwatch.take()
        self._metrics.add(
            {f"seconds_{phase}": Ratio(spent, 1.0) for phase, spent in seconds.items()}
        )

    def take(self) -> dict[str, float]:
        """`ebft/...` means since the last call, over all processes: a collective call."""
        return self._metrics.take(sum_over_processes)

    def _shape_metrics(self, layout: PackedLayout) -> dict[str, Ratio]:
        """How many shapes rows have had in this process, and a warning where they are too many.

        Nothing where no shape costs anything: the number depends on how batches are split and on
        where a run was resumed, as no other metric does.
        """
        if not self._static_shapes:
            return {}
        self._shapes.add((*layout.rollout_shape, layout.document_width))
        if len(self._shapes) > MOST_SHAPES and not self._warned_of_shapes:
            self._warned_of_shapes = True
            logger.warning(
                "Packed rows have had %d shapes (rows, samples, blocks, tokens of a rollout, width "
                "of the documents), the last one %s. Each is compiled by itself, which takes "
                "seconds to minutes. Set pad_to_multiple_of to a large part of the longest "
                "document, cut documents to one length, and set dataloader_drop_last=True. "
                "Their number is logged as ebft/row_shapes.",
                len(self._shapes),
                (*layout.rollout_shape, layout.document_width),
            )
        return {"row_shapes": Ratio(float(len(self._shapes)), 1.0)}

    def _warn_of_no_blocks(self, outputs: EBFTOutput) -> None:
        rollouts = outputs.rollouts
        if self._warned_of_no_blocks or bool(rollouts.layout.blocks.before_choice.exists.any()):
            return
        self._warned_of_no_blocks = True
        settings, documents = self._settings, rollouts.layout.documents
        logger.warning(
            "No document of a micro-batch has room for a block: the longest has %d tokens, a block "
            "needs context_length + generate_max_len = %d unmasked ones (after the prompt, if one "
            "is marked). Such documents contribute only their cross-entropy (ce_coef=%g); their "
            "share is logged as ebft/documents_without_blocks.",
            int(documents.length.max()),
            settings.context_length + settings.generate_max_len,
            outputs.coefficients.ce,
        )
