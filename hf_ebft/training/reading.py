"""Reads batches into documents, and keeps the columns that this needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import Trainer

from hf_ebft.config import EBFTSettings
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.model_parts import end_of_text_id
from hf_ebft.rows.anchors import find_blocks_for
from hf_ebft.rows.buckets import Buckets, buckets_for
from hf_ebft.rows.documents import EBFT_COLUMNS, DocumentReader
from hf_ebft.rows.layout import PackedLayout


class ReadingMixin(Trainer):
    """The part of `EBFTTrainer` that reads batches.

    Attributes:
        ebft: `document_masking` and `pad_to_multiple_of`.
    """

    model: nn.Module  # Trainer's own annotation admits None, which it never is here
    ebft: EBFTSettings
    _vocabulary_size: int
    _model_inputs: frozenset[str]
    _forward: PackedForward

    @property
    def static_shapes(self) -> bool:
        """Whether each shape of the packed rows is compiled separately, or captured in a graph."""
        return self.accelerator.device.type == "cuda" or self._forward.compiler is not None

    @property
    def _buckets(self) -> tuple[Buckets, Buckets]:
        """The sizes to which the tokens of a row, and its blocks, are rounded up."""
        settings = self.ebft
        return buckets_for(
            settings.pad_to_multiple_of, settings.stride, static_shapes=self.static_shapes
        )

    @property
    def document_reader(self) -> DocumentReader:
        """The reader of batches, in training and in evaluation."""
        return DocumentReader(
            document_masking=self.ebft.document_masking,
            eos_token_id=end_of_text_id(self.model, self.processing_class),
            vocabulary_size=self._vocabulary_size,
            widths=self._buckets[0],
            model_inputs=self._model_inputs,
        )

    def read_layout(self, inputs: Mapping[str, Any]) -> PackedLayout:
        """The layout of a batch: where its documents and their rollouts are in the packed row.

        Args:
            inputs: the batch, on the policy's device.
        """
        settings, documents = self.ebft, self.document_reader.read(inputs)
        blocks = find_blocks_for(settings, documents, counts=self._buckets[1])
        return PackedLayout(
            documents, blocks, settings.n_samples_per_prompt, settings.generate_max_len
        )

    def _set_signature_columns_if_needed(self) -> None:
        # Private in transformers, but the only way to keep columns that are not arguments of the
        # model while remove_unused_columns drops the others (TRL's trainers override it, too).
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns = cast(list[str], self._signature_columns)
            columns += EBFT_COLUMNS
