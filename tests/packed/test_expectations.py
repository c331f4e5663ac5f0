"""Expectations over the next token, against plain forward passes by plain loops."""

import pytest
import torch

from hf_ebft.packed.drawing import nucleus
from hf_ebft.packed.expectations import expected_over_tokens
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.sampling import Rollouts
from tests.support.tiny import ragged_layout, tiny_llama

VOCABULARY = 11


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("rows_of_table", [11, 9, 13])
def test_expectations_equal_sums_over_plain_forwards(top_p: float, rows_of_table: int) -> None:
    layout = ragged_layout(vocabulary=VOCABULARY)
    policy = tiny_llama(vocabulary=VOCABULARY, attention_dropout=0.5)
    tokens = torch.randint(VOCABULARY, layout.rollout_shape)
    table = torch.randn(rows_of_table, 4)
    rollouts = Rollouts(tokens, layout.blocks.exists, layout)
    found = expected_over_tokens(
        policy,
        PackedForward.for_model(policy),
        rollouts,
        table,
        temperature=0.7,
        top_p=top_p,
        chunk_size=5,
    )
    assert policy.training
    assert not found.requires_grad
    policy.eval()
    shared = min(VOCABULARY, rows_of_table)
    for row, block in layout.blocks.exists.nonzero().tolist():
        end = int(layout.blocks.column[row, block])
        start = end - int(layout.blocks.position[row, block])
        prefix = layout.documents.input_ids[row, start:end]
        for sample in range(tokens.shape[1]):
            own = tokens[row, sample, block]
            for t in range(len(own)):
                with torch.no_grad():
                    logits = policy(input_ids=torch.cat([prefix, own[:t]])[None]).logits[0, -1]
                p = nucleus((logits / 0.7).softmax(dim=-1), top_p)
                torch.testing.assert_close(
                    found[row, sample, block, t], p[:shared] @ table[:shared], rtol=0, atol=1e-5
                )
