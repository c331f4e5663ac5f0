"""A `Trainer` that leaves a model card and its arguments beside every model that it saves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_ebft.config import EBFTSettings
from hf_ebft.watching.model_card import CardOptions, may_write_card, write_arguments, write_card

logger = logging.getLogger(__name__)


class CardTrainer(Trainer):
    """`Trainer`, with cards.

    Attributes:
        ebft: the settings that the card describes.
    """

    ebft: EBFTSettings
    _card_options = CardOptions()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer`'s, with a model card and the arguments as JSON beside every saved model.

        A README.md that this trainer did not write is left as it is.
        """
        folder = Path(str(output_dir or self.args.output_dir))
        # Asked first: PEFT writes a card of its own while saving, which ours replaces.
        writes_card = self.is_world_process_zero() and may_write_card(folder)
        super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero() and folder.is_dir():
            write_arguments(folder, self.ebft, self.args)
            if writes_card:
                self._write_card(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card into ``output_dir``, unless a README.md is there that is not ours.

        Takes what `Trainer.create_model_card` takes, and keeps it for the cards of later saves.
        """
        self._card_options = self._card_options.updated(CardOptions(*args, **kwargs))
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        if may_write_card(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._write_card(folder)
        else:
            logger.warning("The README.md in %s is not ours, so it stays as it is.", folder)

    def _write_card(self, folder: Path) -> None:
        write_card(
            folder,
            self.accelerator.unwrap_model(self.model),
            self.ebft,
            self.args,
            self.state.log_history,
            self._card_options,
            self.train_dataset,
        )
