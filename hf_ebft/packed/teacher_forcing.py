"""Model inputs for evaluating the plain cross-entropy of an EBFT batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_ebft.packed.masks import MaskRecipe
from hf_ebft.rows.documents import (
    EBFT_COLUMNS,
    IGNORE_INDEX,
    LABEL_MASKS,
    PROMPT_LENGTH,
    Documents,
    predicted_targets,
)
from hf_ebft.rows.visibility import document_coordinates


def teacher_forcing_inputs(
    inputs: Mapping[str, Any], documents: Documents, recipe: MaskRecipe
) -> dict[str, Any]:
    """The inputs with which a model's own forward returns a batch's teacher-forced cross-entropy.

    A batch that a plain Trainer could evaluate is passed on without the columns of EBFT. Otherwise
    (labels are missing, other columns mask labels, or rows pack several documents) equivalent
    right-padded inputs are made. Their labels are masked, and their positions and attention restart
    in every document.

    Args:
        inputs: the batch as collated.
        documents: the same batch, read by `Documents.from_inputs`.
        recipe: how the model's attention masks are made.
    """
    packed = bool((documents.document > 0).any())
    masked = any(inputs.get(name) is not None for name in (PROMPT_LENGTH, *LABEL_MASKS))
    if inputs.get("labels") is not None and not masked and not packed:
        return {name: value for name, value in inputs.items() if name not in EBFT_COLUMNS}
    rebuilt: dict[str, Any] = {
        "input_ids": documents.input_ids,
        "labels": torch.where(predicted_targets(documents), documents.input_ids, IGNORE_INDEX),
        "attention_mask": (documents.document >= 0).long(),
    }
    if packed:
        coordinates = document_coordinates(documents)
        rebuilt["position_ids"] = coordinates.position
        rebuilt["attention_mask"] = recipe.build(coordinates, coordinates)
    replaced = {*rebuilt, "position_ids", *EBFT_COLUMNS}
    return {name: value for name, value in inputs.items() if name not in replaced} | rebuilt
