"""A `Trainer` that writes a model card and its arguments beside every model that it saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ebft.config import EBFTSettings
from hf_ebft.watching.model_card import CardOptions, may_write_card, write_arguments, write_card
from hf_ebft.watching.tensorboard import ShownGroup, decoder_of, show_groups

if TYPE_CHECKING:
    from hf_ebft.training.outputs import EBFTOutput

logger = logging.getLogger(__name__)


class LastRollouts(TrainerCallback):
    """Keeps rollouts of the last logged step as text, for the card.

    Args:
        trainer: the trainer, whose tokenizer decodes them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.groups: list[ShownGroup] = []

    def on_ebft_outputs(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        outputs: EBFTOutput,
        **kwargs: Any,
    ) -> None:
        """Decode some rollouts of a micro-batch, at steps that wait for the device anyway."""
        wanted = getattr(self._trainer, "card_samples", 0)
        step = state.global_step + 1
        if wanted and state.is_world_process_zero and step % max(1, state.logging_steps) == 0:
            self.groups = show_groups(outputs, decoder_of(self._trainer), wanted) or self.groups


class CardTrainer(Trainer):
    """A `Trainer` that writes model cards. A card that cannot be written is logged and skipped.

    Attributes:
        ebft: the settings that the card describes.
        card_samples: number of rollouts of training text that the card shows; with 0 it shows none.
    """

    ebft: EBFTSettings
    card_samples: int = 2
    _card_options = CardOptions()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last_rollouts = LastRollouts(self)
        self.add_callback(self._last_rollouts)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer` does, with a model card and the arguments as JSON beside the model.

        A README.md that this trainer did not write is not changed.
        """
        folder = Path(str(output_dir or self.args.output_dir))
        # Checked before saving: PEFT writes its own card while saving, and ours replaces it.
        writes_card = self.is_world_process_zero() and may_write_card(folder)
        with _peft_card_may_fail(self.accelerator.unwrap_model(self.model)):
            super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero() and folder.is_dir():
            with _logged_failure("training arguments", folder):
                write_arguments(folder, self.ebft, self.args)
            if writes_card:
                self._write_card(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card into `output_dir`, unless it contains a README.md that is not ours.

        The arguments are those of `Trainer.create_model_card`; they are kept for later cards.
        """
        self._card_options = self._card_options.updated(CardOptions(*args, **kwargs))
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        if may_write_card(folder):
            self._write_card(folder)
        else:
            logger.warning("The README.md in %s is not ours, so it is not replaced.", folder)

    def _write_card(self, folder: Path) -> None:
        with _logged_failure("model card", folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_card(
                folder,
                self.accelerator.unwrap_model(self.model),
                self.ebft,
                self.args,
                self.state.log_history,
                self._card_options,
                self.train_dataset,
                self._last_rollouts.groups[: self.card_samples],
            )


@contextmanager
def _logged_failure(what: str, folder: Path) -> Iterator[None]:
    """Log an exception and continue: a failing card must not prevent saving the model."""
    try:
        yield
    except Exception as error:
        logger.warning(
            "The %s in %s could not be written: %s: %s", what, folder, type(error).__name__, error
        )


@contextmanager
def _peft_card_may_fail(model: Any) -> Iterator[None]:
    """Let PEFT save the adapter's weights even if its card, which it writes first, fails."""
    write: Callable[[str], None] | None = getattr(model, "create_or_update_model_card", None)
    if write is None:
        yield
        return

    def write_or_log(output_dir: str) -> None:
        with _logged_failure("model card", Path(output_dir)):
            write(output_dir)

    model.create_or_update_model_card = write_or_log
    try:
        yield
    finally:
        del model.create_or_update_model_card
