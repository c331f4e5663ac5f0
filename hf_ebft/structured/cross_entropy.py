"""Cross-entropy of ground-truth completions, teacher-forced.

Dimension letters: B rows, L tokens of a row, P positions whose logits are kept, T targets in all
rows, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_ebft.packed.model_parts import bare_model
from hf_ebft.structured.encoding import Example

# Number of tokens whose logits exist in float32 at once.
CHUNK_SIZE = 1024


def ground_truth_nll(
    model: nn.Module, bare: nn.Module, examples: Sequence[Example], device: torch.device
) -> Tensor:
    """Mean of -log p over the targets of each ground truth, at temperature 1.

    One forward pass of the wrapped policy, padded on the right. Logits are computed from the end of
    the shortest prompt on.

    Args:
        model: the wrapped policy.
        bare: the policy without wrappers, whose signature is read.
        examples: B prompts with ground truths.
        device: the policy's device.

    Returns:
        (B,) float32, with gradient.
    """
    width = max(len(example.prompt_ids) + len(example.truth_ids) for example in examples)
    input_ids_BL = torch.zeros(len(examples), width, dtype=torch.long)
    attends_BL = torch.zeros(len(examples), width, dtype=torch.long)
    is_target_BL = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        start = len(example.prompt_ids)
        end = start + len(example.truth_ids)
        input_ids_BL[row, :end] = torch.tensor(example.prompt_ids + example.truth_ids)
        attends_BL[row, :end] = 1
        is_target_BL[row, start:end] = torch.tensor(example.is_target)
    is_target_BL[:, 0] = False  # nothing predicts a row's first token

    first = max(1, min(len(example.prompt_ids) for example in examples))
    places_P = torch.arange(first - 1, width - 1, device=device)
    inputs = {
        "input_ids": input_ids_BL.to(device),
        "attention_mask": attends_BL.to(device),
        "use_cache": False,
    }
    if "logits_to_keep" in inspect.signature(bare_model(bare).forward).parameters:
        logits_BPV = model(**inputs, logits_to_keep=places_P).logits
    else:
        logits_BPV = model(**inputs).logits[:, places_P]
    is_target_BP = is_target_BL[:, first:].to(device)
    logits_TV = logits_BPV[is_target_BP]
    targets_T = input_ids_BL[:, first:].to(device)[is_target_BP]
    nll_T = torch.cat(
        [
            checkpoint(_chunk_nll, logits, targets, use_reentrant=False, preserve_rng_state=False)
            for logits, targets in zip(
                logits_TV.split(CHUNK_SIZE), targets_T.split(CHUNK_SIZE), strict=True
            )
        ]
    )
    row_T = is_target_BP.nonzero()[:, 0]
    summed_B = torch.zeros(len(examples), device=device).index_add(0, row_T, nll_T)
    return summed_B / is_target_BP.sum(dim=1).clamp(min=1)


def _chunk_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, (T, V) and (T,) -> (T,) float32; recomputed in the backward pass."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")
