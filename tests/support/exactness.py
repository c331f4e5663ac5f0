"""Measures how far the library's block-parallel computation is from plain causal forward passes.

Dimension letters: B rows, n samples, K blocks, G rollout length, S document tokens, R packed row,
V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import hf_ebft.packed.drawing
from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.packed.deferred import TrainingPass, can_defer
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.packed.model_parts import decoder_layers
from hf_ebft.packed.sampling import (
    Rollouts,
    SamplingRecord,
    make_generator,
    sample_rollouts,
    sample_with_record,
)
from hf_ebft.packed.targets import KeptPlaces, Targets
from hf_ebft.packed.verification import verify_packing
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from tests.support.architectures import VOCABULARY, tiny_model
from tests.support.plain_forwards import Batch, last_token_embedding, plain_blocks, plain_pass

# Rounding alone, in float32, over models with weights of unit gain.
TOLERANCE = 1e-4
FEATURE_LAYERS = (0.0, 0.5, 1.0)
CHUNK = 10_000  # rows of logits, rollout tokens: all of them at once


@dataclass(frozen=True)
class Case:
    """A batch, where its blocks start, and how many rollouts each block gets."""

    batch: Batch
    stride: int = 5
    context_length: int = 3
    generate_max_len: int = 4
    n_samples: int = 2
    min_completion_prefix: int = 0

    @property
    def anchors(self) -> dict[str, int]:
        return {
            "stride": self.stride,
            "context_length": self.context_length,
            "generate_max_len": self.generate_max_len,
            "min_completion_prefix": self.min_completion_prefix,
        }

    def layout(self) -> PackedLayout:
        documents = Documents.from_inputs(self.batch)
        blocks = find_blocks(documents, **self.anchors)
        return PackedLayout(documents, blocks, self.n_samples, self.generate_max_len)


@dataclass
class Differences:
    """Largest differences to plain forward passes.

    Attributes:
        training: of log-probabilities over the vocabulary, in the training pass.
        sampling: of log-probabilities over the vocabulary, in the cached sampler.
        features: of the embeddings of rollouts and windows.
        deferred: of a gradient made chunk by chunk from that of one pass over the row, relative to
            the largest entry; and of the log-probabilities.
    """

    training: float = 0.0
    sampling: float = 0.0
    features: float = 0.0
    deferred: float = 0.0
    blocks: int = field(default=0, compare=False)

    @property
    def largest(self) -> float:
        return max(self.training, self.sampling, self.features, self.deferred)


def ragged_batch(*lengths: int, left: bool = False, seed: int = 1) -> Batch:
    """Random documents of these lengths, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    # Ids from 5 on: the low ones stand for padding, images and the like in the tiny models.
    input_ids = torch.randint(5, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if left else mask
    return {"input_ids": input_ids * mask, "attention_mask": mask.long()}


def packed_documents(*rows: list[int], seed: int = 1) -> Batch:
    """Rows that hold several random documents of these lengths each, padded on the right."""
    batch = ragged_batch(*[sum(lengths) for lengths in rows], seed=seed)
    document_ids = torch.full_like(batch["input_ids"], -1)
    for row, lengths in enumerate(rows):
        ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        document_ids[row, : len(ids)] = ids
    return batch | {"document_ids": document_ids}


def masked_labels(batch: Batch, *masked: slice) -> Batch:
    """The batch with labels that are masked in these columns."""
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    for columns in masked:
        labels[:, columns] = -100
    return batch | {"labels": labels}


def lora_model(architecture: str) -> nn.Module:
    """A model with adapters that do something."""
    adapted = get_peft_model(
        tiny_model(architecture), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


@contextmanager
def recorded_distributions() -> Iterator[list[Tensor]]:
    """The distributions (B * K * n, V) that the sampler draws from, one tensor per step."""
    steps: list[Tensor] = []
    original = hf_ebft.packed.drawing.draw

    def recording(probabilities: Tensor, uniform: Tensor) -> Tensor:
        steps.append(probabilities.repeat_interleave(uniform.shape[1], dim=0))
        return original(probabilities, uniform)

    hf_ebft.packed.drawing.draw = recording
    try:
        yield steps
    finally:
        hf_ebft.packed.drawing.draw = original


def sample(
    model: nn.Module, forward: PackedForward, layout: PackedLayout
) -> tuple[Rollouts, Tensor]:
    """Rollouts, and the log-probabilities (B, n, K, G, V) of what each token was drawn from."""
    with recorded_distributions() as steps:
        rollouts = sample_rollouts(
            model,
            forward,
            layout,
            temperature=1.0,
            top_p=1.0,
            chunk_size=CHUNK,
            generator=make_generator(torch.device("cpu"), 0),
        )
    _, n_samples, n_blocks, _ = layout.rollout_shape
    # The tokens of a step stand block after block.
    by_block = [step.unflatten(0, (-1, n_blocks, n_samples)) for step in steps]
    return rollouts, torch.stack(by_block, dim=3).transpose(1, 2).log()


def row_log_probs(
    model: nn.Module, forward: PackedForward, rollouts: Rollouts, *, whole_document: bool = False
) -> Tensor:
    """(B, n, K, G, V) from one forward pass over the packed row, with gradient if it is on."""
    layout = rollouts.layout
    kept = KeptPlaces.for_layout(layout, whole_document=whole_document)
    logits = forward.logits(model, layout.input_ids(rollouts.tokens), layout.row_part, kept.places)
    rows = torch.arange(logits.shape[0])[:, None, None, None]
    return logits.float().log_softmax(-1)[rows, kept.index_of[layout.predictor]]


def deferral_difference(model: nn.Module, forward: PackedForward, rollouts: Rollouts) -> float:
    """How far log-probabilities and gradients are apart, made block by block and all at once.

    0 for a model whose rows are always computed at once.
    """
    if not can_defer(model, forward):
        return 0.0
    weight = torch.randn(rollouts.tokens.shape, generator=torch.Generator().manual_seed(0))
    weight = weight * rollouts.exists[:, None, :, None]
    scoring: dict[str, Any] = {"temperature": 1.0, "with_document": False, "chunk_size": CHUNK}
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = packed_log_probs(model, forward, rollouts, **scoring).rollout
    expected = torch.autograd.grad((weight * whole).sum(), weights, allow_unused=True)
    scale = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    exists = weight.abs().sign()  # blocks that do not exist have no log-probabilities
    worst = 0.0
    targets = Targets(rollouts.layout.document_part, **scoring)
    for batch, record in (
        (rollouts, None),
        _sampled_again(model, forward, rollouts, targets),
    ):
        training_pass = TrainingPass(forward, training_chunk_size=1, **scoring)
        deferred = training_pass.log_probs(model, batch, record)
        found = torch.autograd.grad((weight * deferred.rollout).sum(), weights, allow_unused=True)
        worst = _worse(worst, exists * deferred.rollout.detach(), exists * whole.detach())
        for ours, reference in zip(found, expected, strict=True):
            assert (ours is None) == (reference is None)
            if ours is not None and reference is not None:
                worst = _worse(worst, ours / scale, reference / scale)
    return worst


def _sampled_again(
    model: nn.Module, forward: PackedForward, rollouts: Rollouts, targets: Targets
) -> tuple[Rollouts, SamplingRecord]:
    """The same rollouts, with the pass over the documents kept for training."""
    again, record = sample_with_record(
        model,
        forward,
        rollouts.layout,
        temperature=1.0,
        top_p=1.0,
        chunk_size=CHUNK,
        generator=make_generator(torch.device("cpu"), 0),
        targets=targets,
    )
    assert torch.equal(again.tokens, rollouts.tokens)
    assert record.document_pass is not None
    return again, record


def measure(
    model: nn.Module,
    case: Case,
    *,
    with_features: bool = True,
    with_gradients: bool = True,
    packed_attention: str = "auto",
) -> Differences:
    """Run a case through sampler, training pass and feature network, and against the oracle.

    Raises:
        ValueError: the library refuses the model, or the batch for being too long for it.
        AssertionError: it finds other blocks than the definition does.
    """
    forward, layout = PackedForward.for_model(model, packed_attention), case.layout()
    rollouts, sampled = sample(model, forward, layout)
    found = Differences()
    model.train()
    with torch.no_grad():
        trained = row_log_probs(model, forward, rollouts)
    if with_gradients:
        found.deferred = deferral_difference(model, forward, rollouts)
    model.eval()
    if with_features:
        network = FeatureNetwork(
            copy.deepcopy(model),
            feature_layers=FEATURE_LAYERS,
            embed_method="last_token",
            normalization="per_layer",
            packed_attention=packed_attention,
        )
        features = []
        for chunk_size in (CHUNK, 1):  # all at once, and block by block
            network.chunk_size = chunk_size
            features.append(network.embed(rollouts))

    for row, blocks in enumerate(plain_blocks(case.batch, **case.anchors)):
        assert layout.blocks.exists[row].tolist() == [
            index < len(blocks) for index in range(layout.blocks.exists.shape[1])
        ]
        for index, block in enumerate(blocks):
            window = torch.tensor([block.window])
            own = torch.cat([rollouts.tokens[row, :, index], window])
            with torch.no_grad():
                plain = plain_pass(model, block.prefix, own, hidden=with_features)
            found.blocks += 1
            expected = plain.log_probs[:-1]
            found.training = _worse(found.training, trained[row, :, index], expected)
            found.sampling = _worse(found.sampling, sampled[row, :, index], expected)
            if with_features:
                embeddings = last_token_embedding(plain.hidden, network.layer_indices)
                for way in features:
                    embedded = torch.cat(
                        [way.generated[row, :, index], way.ground_truth[row, index, None]]
                    )
                    found.features = _worse(found.features, embedded, embeddings)
    return found


def _worse(so_far: float, found: Tensor, expected: Tensor) -> float:
    difference = float((found - expected).abs().max())
    # NaN compares as neither larger nor smaller, and must not pass for small.
    return float("inf") if difference != difference else max(so_far, difference)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a model.

    Attributes:
        outcome: "exact", "refused" (at construction), "limited" (at the batch) or "wrong".
        differences: what was measured, if anything.
        reason: the message of a refusal.
        forward: how the model runs packed rows, unless it is refused.
        without_features: why it cannot be a feature network, if so.
    """

    outcome: str
    differences: Differences = field(default_factory=Differences)
    reason: str = ""
    forward: PackedForward | None = None
    without_features: str = ""


def judge(model: nn.Module, case: Case, packed_attention: str = "auto") -> Verdict:
    """Pass a model through everything that a trainer asks of it, and measure it if it passes."""
    try:
        forward = PackedForward.for_model(model, packed_attention)
        verify_packing(model, forward)
    except ValueError as error:
        return Verdict("refused", reason=str(error))
    without_features = ""
    try:
        decoder_layers(model)
    except ValueError as error:
        without_features = str(error)
    try:
        found = measure(
            model,
            case,
            with_features=not without_features,
            # flex_attention has no backward pass on a CPU.
            with_gradients=packed_attention != "flex_attention",
            packed_attention=packed_attention,
        )
    except ValueError as error:
        return Verdict("limited", reason=str(error), forward=forward)
    outcome = "exact" if found.largest < TOLERANCE else "wrong"
    return Verdict(outcome, found, forward=forward, without_features=without_features)
