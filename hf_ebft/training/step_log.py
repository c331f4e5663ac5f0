"""Records training steps: metrics, seconds by phase, warnings, and calls of callbacks."""

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

# A warning is logged if packed rows have had more shapes than this.
MOST_SHAPES = 16


class StepLog:
    """Records the steps of one trainer.

    Args:
        trainer: the trainer, whose device has the sums and whose callbacks get every micro-batch.
        settings: the settings, for warnings.
        static_shapes: whether each shape of the rows is compiled separately.
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
        """Begin a new run: forget everything recorded so far."""
        self._metrics.clear()
        self._stopwatch.take()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a block as a part of `rollout`, `features` or `training`."""
        return self._stopwatch.phase(name)

    def record(self, outputs: EBFTOutput) -> None:
        """Record a micro-batch: its metrics, a warning if it has no block, and calls of callbacks.

        Every callback that defines `on_ebft_outputs(args, state, control, outputs=...)` is called,
        on every process. Callbacks get the tensors of the step: they must detach and copy what they
        keep.
        """
        layout = outputs.rollouts.layout
        self._metrics.add(
            block_metrics(outputs.rewards, outputs.advantages, layout)
            | rollout_metrics(outputs.rollouts.tokens, layout)
            | token_metrics(outputs.log_probs, outputs.rl_loss, outputs.ce_loss, outputs.kl, layout)
            | self._shape_metrics(layout)
            | {
                name: Ratio(value, 1.0)
                for name, value in outputs.coefficients.scheduled_values().items()
            }
        )
        self._warn_of_no_blocks(outputs)
        trainer = self._trainer
        for callback in trainer.callback_handler.callbacks:
            on_ebft_outputs = getattr(callback, "on_ebft_outputs", None)
            if on_ebft_outputs is not None:
                on_ebft_outputs(trainer.args, trainer.state, trainer.control, outputs=outputs)

    def end_batch(self) -> None:
        """Record the seconds that the phases of a batch took."""
        seconds = self._stopwatch.take()
        self._metrics.add(
            {f"seconds_{phase}": Ratio(spent, 1.0) for phase, spent in seconds.items()}
        )

    def take(self) -> dict[str, float]:
        """`ebft/...` means since the last call, over all processes: a collective call."""
        return self._metrics.take(sum_over_processes)

    def _shape_metrics(self, layout: PackedLayout) -> dict[str, Ratio]:
        """The number of shapes that rows have had in this process; warns if there are too many.

        Nothing is logged if new shapes cost nothing, since the number, unlike other metrics,
        depends on how batches are split and on where a run was resumed.
        """
        if not self._static_shapes:
            return {}
        self._shapes.add((*layout.rollout_shape, layout.document_width))
        if len(self._shapes) > MOST_SHAPES and not self._warned_of_shapes:
            self._warned_of_shapes = True
            logger.warning(
                "Packed rows have had %d shapes (rows, samples, blocks, tokens of a rollout, width "
                "of the documents), the last one %s. Each shape is compiled separately, which "
                "takes seconds to minutes. Set pad_to_multiple_of to a large part of the longest "
                "document, cut documents to one length, and set dataloader_drop_last=True. "
                "The number of shapes is logged as ebft/row_shapes.",
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
            "No document of a micro-batch has room for a block: the longest has %d tokens, but a "
            "block needs context_length + generate_max_len = %d unmasked ones (after the prompt, "
            "if one is marked). Such documents contribute only their cross-entropy (ce_coef=%g); "
            "their share is logged as ebft/documents_without_blocks. Use longer documents, or "
            "lower these settings.",
            int(documents.length.max()),
            settings.context_length + settings.generate_max_len,
            outputs.coefficients.ce,
        )
