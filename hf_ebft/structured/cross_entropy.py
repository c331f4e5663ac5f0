"""Cross-entropy of ground-truth completions, teacher-forced.

Dimension letters: B rows, L tokens of a row, P places whose logits are kept, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_ebft.losses import log_normalizer
from hf_ebft.structured.encoding import Example
from hf_ebft.support import bare_model

# Rows of logits that exist in float32 at once.
CHUNK_SIZE = 1024


def ground_truth_nll(
    model: nn.Module, bare: nn.Module, examples: Sequence[Example], device: torch.device
) -> Tensor:
    """Mean of -log p over the targets of each ground truth, at temperature 1.

    One forward pass of the wrapped policy, padded on the right; logits are computed from the
    shortest prompt on.

    Args:
        model: the wrapped policy.
        bare: the policy without wrappers, to read its signature from.
        examples: B of them.
        device: the policy's.

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
    next_ids_BP = input_ids_BL[:, first:].to(device)
    is_target_BP = is_target_BL[:, first:].to(device)
    chosen_BP = logits_BPV.gather(-1, next_ids_BP[..., None]).squeeze(-1).float()
    nll_BP = log_normalizer(logits_BPV, 1.0, CHUNK_SIZE) - chosen_BP
    counts_B = is_target_BP.sum(dim=1).clamp(min=1)
    return torch.where(is_target_BP, nll_BP, 0.0).sum(dim=1) / counts_B
