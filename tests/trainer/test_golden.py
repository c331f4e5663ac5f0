"""A whole training step against the figures of the released code (tests/golden, step_*).

B documents, S tokens, n samples, K blocks, G rollout tokens. Its packed row holds one sample of
each block, which is the layout of this package at n = 1.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ebft import EBFTTrainer, Rollouts
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.rows.visibility import sees
from hf_ebft.training.outputs import EBFTOutput
from tests.support.golden_files import GoldenFile, golden_names, load_golden
from tests.support.tiny import config, gradient_of

STEPS = golden_names("step_*")
RELATIVE = 1e-4
SETTINGS = (
    "stride",
    "context_length",
    "generate_max_len",
    "n_samples_per_prompt",
    "temperature",
    "ce_coef",
    "rl_coef",
    "alignment_coef",
    "diversity_coef",
    "use_whitening",
    "embed_method",
)


class GoldenTrainer(EBFTTrainer):
    """Takes its rollouts from the golden file."""

    golden_rollouts: Tensor

    def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
        """Sample, then put the golden tokens in their place."""
        rollouts = super().sample_rollouts(model, inputs)
        return dataclasses.replace(rollouts, tokens=self.golden_rollouts)


@dataclasses.dataclass
class Step:
    """A golden file, the trainer built from it, and what its step gave."""

    golden: GoldenFile
    trainer: GoldenTrainer
    loss: Tensor
    output: EBFTOutput


def network_of(golden: GoldenFile, prefix: str) -> LlamaForCausalLM:
    network = LlamaForCausalLM(LlamaConfig(**golden.case["llama_config"]))
    missing, unexpected = network.load_state_dict(golden.under(prefix), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return network


@pytest.fixture(scope="module", params=STEPS)
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Step:
    golden = load_golden(request.param)
    args = config(
        tmp_path_factory.mktemp("golden"),
        feature_normalization="joint",
        whitening_space="sample",
        feature_layers=layer_fractions(golden),
        **{name: golden.case[name] for name in SETTINGS},
    )
    policy = network_of(golden, "actor.")
    phi = network_of(golden, "feature_network.")
    trainer = GoldenTrainer(policy, args, feature_network=phi)
    trainer.golden_rollouts = golden["rollouts"]
    loss, output = trainer.compute_loss(
        policy, {"input_ids": golden["documents"]}, return_outputs=True
    )
    loss.backward()
    return Step(golden, trainer, loss, output)


def layer_fractions(golden: GoldenFile) -> list[float]:
    """Fractions of depth that select the file's layers: the middle of each interval."""
    depth = golden.case["llama_config"]["num_hidden_layers"]
    return [min(1.0, (index + 0.5) / depth) for index in golden.case["feature_layer_indices"]]


def assert_agrees(actual: Tensor, expected: Tensor, *, scale: float | None = None) -> None:
    """Within 1e-4 of the largest figure of the tensor, or of `scale`."""
    assert actual.shape == expected.shape
    scale = float(expected.abs().max()) if scale is None else scale
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=RELATIVE * scale)


def test_every_step_is_here() -> None:
    assert len(STEPS) == 5


def test_feature_layers(step: Step) -> None:
    assert step.trainer.feature_network.layer_indices == step.golden.case["feature_layer_indices"]


def test_embeddings(step: Step) -> None:
    features = step.trainer.feature_network.embed(step.output.rollouts)
    assert_agrees(features.generated, step.golden["generated_embeddings"])
    assert_agrees(features.ground_truth, step.golden["ground_truth_embeddings"])


def test_rewards_and_advantages(step: Step) -> None:
    assert_agrees(step.output.rewards.alignment, step.golden["alignment"])
    # Whitening leaves nothing but rounding of it: compare on the scale of a dot product.
    assert_agrees(step.output.rewards.diversity, step.golden["diversity"], scale=1.0)
    assert_agrees(step.output.rewards.reward, step.golden["reward"])
    assert_agrees(step.output.advantages, step.golden["rloo_advantage"])


def test_rollout_log_probs(step: Step) -> None:
    assert_agrees(step.output.log_probs, step.golden["rollout_log_probs"])


def test_document_log_probs_and_cross_entropy(step: Step) -> None:
    rollouts, trainer = step.output.rollouts, step.trainer
    log_probs = packed_log_probs(
        trainer.model,
        trainer._forward,
        rollouts,
        temperature=trainer.ebft.temperature,
        with_document=True,
        chunk_size=7,
    )
    assert log_probs.document is not None
    assert_agrees(log_probs.document[:, 1:], step.golden["document_log_probs"])
    if trainer.ebft.ce_coef > 0:
        assert step.output.ce_loss is not None
        assert_agrees(step.output.ce_loss, step.golden["ce_loss"])
    else:
        assert step.output.ce_loss is None


def test_gradient_of_every_weight(step: Step) -> None:
    expected = step.golden.under("grad.")
    actual = gradient_of(step.trainer.model)
    assert expected.keys() <= actual.keys()
    compared = 0
    for name, gradient in expected.items():
        assert_agrees(actual[name], gradient)
        compared += int(gradient.abs().max() > 0)
    assert compared > len(expected) // 2
    # What the file does not list (a head tied to the embedding) has no gradient of its own.
    assert all(not actual[name].any() for name in actual.keys() - expected.keys())


def test_positions_and_visibility_of_the_packed_row(step: Step) -> None:
    golden = step.golden
    documents = Documents.from_inputs({"input_ids": golden["documents"]})
    blocks = find_blocks(
        documents,
        stride=golden.case["stride"],
        context_length=golden.case["context_length"],
        generate_max_len=golden.case["generate_max_len"],
    )
    layout = PackedLayout(documents, blocks, 1, golden.case["generate_max_len"])
    coordinates = layout.coordinates
    allowed = sees(
        coordinates.map(lambda field: field[:, :, None]),
        coordinates.map(lambda field: field[:, None, :]),
    )
    for row in range(len(golden["documents"])):
        torch.testing.assert_close(
            coordinates.position[row], golden[f"position_ids.{row}"].flatten().long()
        )
        expected = golden[f"attention_allowed.{row}"].bool().view(allowed[row].shape)
        assert torch.equal(allowed[row], expected)
