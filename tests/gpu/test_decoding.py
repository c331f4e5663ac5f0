"""Decoding steps as CUDA graphs: captured at the second batch of a shape, the same rollouts."""

import pytest
import torch

from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.sampling import make_generator, sample_rollouts
from hf_ebft.rows.layout import PackedLayout
from tests.support.accelerator import DEVICE, ON_CPU, needs_accelerator
from tests.support.architectures import tiny_model
from tests.support.exactness import Case, ragged_batch

pytestmark = [pytest.mark.gpu, needs_accelerator]


def layout(*lengths: int) -> PackedLayout:
    case = Case(ragged_batch(*lengths, seed=sum(lengths)), stride=8, context_length=8)
    return case.layout().to(torch.device(DEVICE))


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_rollouts_are_the_same_with_a_graph_and_without(attention: str) -> None:
    if attention == "flex_attention" and ON_CPU:
        pytest.skip("compiled for a GPU")
    model = tiny_model("llama", limit=4096, head_dim=16).to(DEVICE).eval()
    forward = PackedForward.for_model(model, attention)

    def tokens(batch: PackedLayout) -> torch.Tensor:
        return sample_rollouts(
            model,
            forward,
            batch,
            temperature=0.8,
            top_p=1.0,
            chunk_size=64,
            generator=make_generator(torch.device(DEVICE), 0),
        ).tokens

    first = tokens(layout(60, 50))
    for lengths in ((44, 60), (60, 50), (31, 60), (60, 50)):
        found = tokens(layout(*lengths))
    assert torch.equal(found, first)
    decoding = forward.decoding
    assert decoding.works and decoding.graphs.works
    # With static shapes all of these are one shape; on a CPU nothing is captured.
    assert len(decoding.graphs._captured) == (0 if ON_CPU else 1)
