"""What a policy writes after a few prefixes, to be looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hf_ebft.anchors import Blocks, find_blocks
from hf_ebft.config import EBFTSettings
from hf_ebft.data.collator import EBFTDataCollator
from hf_ebft.documents import Documents
from hf_ebft.evaluation.figures import STREAM, Collator, Rows
from hf_ebft.layout import PackedLayout
from hf_ebft.policy import PackedForward
from hf_ebft.rollouts import make_generator, sample_rollouts


@dataclass(frozen=True)
class Continuation:
    """Token ids of a prefix, of what the policy wrote after it, and of what the document says."""

    prefix: list[int]
    rollout: list[int]
    ground_truth: list[int]


def sample_continuations(
    model: nn.Module,
    rows: Rows,
    settings: EBFTSettings,
    *,
    length: int | None = None,
    data_collator: Collator | None = None,
    eos_token_id: int | None = None,
    seed: int = 0,
) -> list[Continuation]:
    """One rollout after a prefix in the middle of each row.

    Args:
        model: the policy.
        rows: tokenized rows, sampled in one batch; a row without room for a block is left out.
        settings: where blocks lie and how rollouts are sampled.
        length: tokens of a rollout; default ``generate_max_len``.
        data_collator: default [`EBFTDataCollator`].
        eos_token_id: ends documents if ``document_masking`` is True and rows mark no boundaries.
        seed: of the rollouts; the same seed gives two policies the same random numbers.
    """
    length = settings.generate_max_len if length is None else length
    device = next(model.parameters()).device
    batch = (data_collator or EBFTDataCollator())([rows[i] for i in range(len(rows))])
    documents = Documents.from_inputs(
        {name: value.to(device) for name, value in batch.items()},
        document_masking=settings.document_masking,
        eos_token_id=eos_token_id,
    )
    blocks = _middle_block(
        find_blocks(
            documents,
            stride=settings.stride,
            context_length=settings.context_length,
            generate_max_len=length,
            min_completion_prefix=settings.min_completion_prefix,
        )
    )
    rollouts = sample_rollouts(
        model,
        PackedForward.of(model, settings.packed_attention),
        PackedLayout(documents, blocks, n_samples=1, length=length),
        temperature=settings.temperature,
        top_p=settings.top_p,
        chunk_size=settings.log_prob_chunk_size,
        generator=make_generator(device, seed, STREAM),
    )
    continuations = []
    for row in blocks.exists[:, 0].nonzero()[:, 0].tolist():
        ids = documents.input_ids[row].tolist()
        end, prefix_length = int(blocks.column[row, 0]), int(blocks.position[row, 0])
        continuations.append(
            Continuation(
                prefix=ids[end - prefix_length : end],
                rollout=rollouts.tokens[row, 0, 0].tolist(),
                ground_truth=ids[end : end + length],
            )
        )
    return continuations


def _middle_block(blocks: Blocks) -> Blocks:
    """Of each row, the block in the middle: fields (B, 1)."""
    middle = (blocks.exists.sum(dim=1, keepdim=True) // 2).clamp(max=blocks.exists.shape[1] - 1)
    return Blocks(
        column=blocks.column.gather(1, middle),
        position=blocks.position.gather(1, middle),
        document=blocks.document.gather(1, middle),
        exists=torch.gather(blocks.exists, 1, middle),
    )
