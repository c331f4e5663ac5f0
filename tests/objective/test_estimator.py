"""The estimator points the right way: its expected gradient is that of the true objective.

What is to be minimised is the expected feature-matching loss (paper eq. 2): the mean over
documents, and over the blocks of a document, of

    CFM_k = || E_p[phi(rollout)] - phi(ground truth) ||^2,    p the policy at the temperature.

With unit features x_j of the n rollouts, y of the ground truth, and both coefficients 1,

    grad CFM_k = 2 (E x - y) . grad E x = 2 E[(E x - y) . x  grad log p(x)].

A reward is r_j = 2 x_j . y - 2/(n-1) sum over j' != j of x_j . x_j'. The other rollouts are
independent of rollout j, so E[r_j grad log p_j] = 2 E[(y - E x) . x grad log p(x)] = -grad CFM_k.
The library's loss of a block is -mean over its n rollouts and their G tokens of r_j log p(token),
and the log p(token) of a rollout add up to log p_j: the mean over tokens leaves a factor 1/G. Hence

    G * expected gradient of the loss = gradient of the objective,

and the same for advantages r_j - b_j with any b_j that does not depend on rollout j.

A vocabulary of three tokens and G = 2 make C = 9 rollouts per prefix and C ** n joint samples of a
block, few enough to take every expectation exactly. Blocks are independent of each other given
their document, so each is enumerated on its own.

Dimension letters: D documents, M = C ** n joint samples, n, K, G as everywhere, F width of a
feature, W policy weights.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedModel

from hf_ebft.config import AdvantageEstimator, EmbedMethod
from hf_ebft.feature_network.network import FeatureNetwork
from hf_ebft.objective.advantages import compute_advantages
from hf_ebft.objective.fitted import TokenKnowledge, fitted_advantages
from hf_ebft.objective.losses import policy_gradient_loss
from hf_ebft.objective.rewards import Rewards, feature_matching_rewards
from hf_ebft.packed.expectations import expected_over_tokens
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.packed.sampling import Rollouts
from hf_ebft.rows.anchors import Blocks, find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from tests.support.enumeration import all_continuations, continuation_probabilities
from tests.support.tiny import tiny_causal_lm

VOCABULARY, LENGTH, CONTEXT, STRIDE = 3, 2, 2, 2
# Three blocks, and one: documents weigh the same.
DOCUMENTS = [[0, 2, 1, 1, 0, 2, 2, 1, 0], [1, 0, 2, 2, 1]]
PREFIX_ENDS = [[2, 4, 6], [2]]  # e_k by document
FEATURE_LAYERS = [0.25, 0.5, 0.75]

CONTINUATIONS = all_continuations(VOCABULARY, LENGTH)
C = len(CONTINUATIONS)
# The library's log-probabilities and features are float32 whatever the model is.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class World:
    """A policy, another network as phi, and the settings both sides of a comparison share."""

    policy: PreTrainedModel
    phi: PreTrainedModel
    temperature: float = 1.0
    embed_method: EmbedMethod = "last_token"
    alignment_coef: float = 1.0
    diversity_coef: float = 1.0

    @property
    def weights(self) -> list[Tensor]:
        return list(self.policy.parameters())


def make_world(seed: int) -> World:
    return World(
        # Layer norms that keep float64, as finite differences need; Llama's turn it into float32.
        policy=tiny_causal_lm(
            GPTNeoXConfig,
            vocabulary=VOCABULARY,
            seed=seed,
            initializer_range=0.4,
            hidden_size=8,
            intermediate_size=12,
        ).double(),
        phi=tiny_causal_lm(
            LlamaConfig,
            vocabulary=VOCABULARY,
            seed=seed + 1,
            initializer_range=0.4,
            num_hidden_layers=4,
        ).double(),
    )


@pytest.fixture(scope="module")
def world() -> World:
    """Rollouts are more like each other than like the ground truth: rewards below zero."""
    return make_world(10)


@pytest.fixture(scope="module")
def balanced_world() -> World:
    """Rollouts are about as like the ground truth as like each other: rewards around zero."""
    return make_world(0)


# ---- The objective, from its definition ----------------------------------------------------------


def features(world: World, texts: Tensor) -> Tensor:
    """(rows, F): phi of the last G tokens of `texts` (rows, tokens), from plain causal forwards."""
    with torch.no_grad():
        hidden = world.phi(input_ids=texts, output_hidden_states=True).hidden_states
    per_layer = []
    for fraction in FEATURE_LAYERS:
        states = hidden[int(fraction * world.phi.config.num_hidden_layers)][:, -LENGTH:]
        per_layer.append(states / states.norm(dim=-1, keepdim=True))
    tokens = torch.cat(per_layer, dim=-1) / math.sqrt(len(FEATURE_LAYERS))
    if world.embed_method == "last_token":
        return tokens[:, -1]
    # concat: the tokens at 25, 50 and 75 % of two tokens are the first, the second, the second.
    return torch.cat([tokens[:, 0], tokens[:, 1], tokens[:, 1]], dim=-1) / math.sqrt(3)


def block_objective(world: World, document: list[int], end: int) -> Tensor:
    """The block's feature-matching loss, exact, with gradient.

    With other coefficients than 1: diversity_coef * ||E x||^2 - 2 alignment_coef * E x . y + y . y.
    """
    text = torch.tensor(document)
    probabilities = continuation_probabilities(
        world.policy, text[:end], CONTINUATIONS, world.temperature
    )
    x = features(world, torch.cat([text[:end].expand(C, -1), CONTINUATIONS], dim=1))
    y = features(world, text[None, : end + LENGTH])[0]
    mean = probabilities @ x
    return world.diversity_coef * mean @ mean - 2 * world.alignment_coef * mean @ y + y @ y


def objective(world: World) -> Tensor:
    """Mean over documents of the mean over their blocks."""
    per_document = [
        torch.stack([block_objective(world, document, end) for end in ends]).mean()
        for document, ends in zip(DOCUMENTS, PREFIX_ENDS, strict=True)
    ]
    return torch.stack(per_document).mean()


def flat_gradient(scalar: Tensor, world: World, **settings: Any) -> Tensor:
    """(W,) gradient with respect to every weight of the policy, float64."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, world.weights, **settings)])


def finite_difference(world: World, direction: Tensor, step: float = 1e-4) -> float:
    """Central difference of the objective along `direction` (W,)."""
    parts = direction.split([weight.numel() for weight in world.weights])
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):  # forth, back, and home again
            for weight, part in zip(world.weights, parts, strict=True):
                weight += sign * step * part.view_as(weight)
            values.append(float(objective(world)))
    return (values[0] - values[1]) / (2 * step)


# ---- The library's estimator, over every joint sample --------------------------------------------


@dataclass(frozen=True)
class Enumeration:
    """Every joint sample of n rollouts of every block, one a row of a batch.

    Rows 0 to M - 1 hold the first document, each with another joint sample, which all blocks of the
    row use; the next M rows the second.

    Attributes:
        rollouts: tokens (D * M, n, K, G).
        probability: (D * M, K) of each joint sample under the policy; 0 where no block exists.
        choice: (M, n) index into CONTINUATIONS.
    """

    rollouts: Rollouts
    probability: Tensor
    choice: Tensor


@torch.no_grad()
def enumerate_joint_samples(world: World, n: int) -> Enumeration:
    choice = torch.tensor(list(itertools.product(range(C), repeat=n)))
    width, n_blocks = max(map(len, DOCUMENTS)), max(map(len, PREFIX_ENDS))
    copies = len(choice)
    padded = torch.tensor([document + [0] * (width - len(document)) for document in DOCUMENTS])
    lengths = torch.tensor([len(document) for document in DOCUMENTS])
    documents = Documents.from_inputs(
        {
            "input_ids": padded.repeat_interleave(copies, dim=0),
            "attention_mask": (torch.arange(width) < lengths[:, None]).repeat_interleave(
                copies, dim=0
            ),
        }
    )
    blocks = find_blocks(documents, stride=STRIDE, context_length=CONTEXT, generate_max_len=LENGTH)
    tokens = CONTINUATIONS[choice][:, :, None].expand(-1, -1, n_blocks, -1)
    probability = torch.zeros(len(DOCUMENTS), copies, n_blocks, dtype=torch.float64)
    for d, (document, ends) in enumerate(zip(DOCUMENTS, PREFIX_ENDS, strict=True)):
        for k, end in enumerate(ends):
            single = continuation_probabilities(
                world.policy, torch.tensor(document[:end]), CONTINUATIONS, world.temperature
            )
            probability[d, :, k] = single[choice].prod(dim=1)
    return Enumeration(
        rollouts=Rollouts(
            tokens=tokens.repeat(len(DOCUMENTS), 1, 1, 1),
            exists=blocks.exists,
            layout=PackedLayout(documents, blocks, n, LENGTH),
        ),
        probability=probability.flatten(0, 1),
        choice=choice,
    )


def feature_network(world: World) -> FeatureNetwork:
    return FeatureNetwork(
        world.phi,
        feature_layers=FEATURE_LAYERS,
        embed_method=world.embed_method,
        normalization="per_layer",
    )


def library_rewards(world: World, rollouts: Rollouts) -> Rewards:
    embedded = feature_network(world).embed(rollouts)
    return feature_matching_rewards(
        embedded.generated,
        embedded.ground_truth,
        alignment_coef=world.alignment_coef,
        diversity_coef=world.diversity_coef,
        use_whitening=False,
    )


def library_log_probs(world: World, rollouts: Rollouts, temperature: float) -> Tensor:
    return packed_log_probs(
        world.policy,
        PackedForward.for_model(world.policy),
        rollouts,
        temperature=temperature,
        with_document=False,
        chunk_size=1000,
    ).rollout


def expected_gradient(
    world: World,
    joint: Enumeration,
    advantages: Tensor,
    *,
    score_temperature: float | None = None,
) -> Tensor:
    """(W,) expectation of the gradient of the library's loss over every joint sample.

    The loss is linear in the advantages and a mean over the D * M documents of the batch, so one
    backward pass with every advantage times M times the probability of its sample gives it.
    """
    log_probs = library_log_probs(world, joint.rollouts, score_temperature or world.temperature)
    probability = joint.probability[:, None]
    probability = probability if advantages.dim() == 3 else probability[..., None]
    weighted = len(joint.choice) * probability * advantages
    return flat_gradient(policy_gradient_loss(log_probs, weighted, joint.rollouts.layout), world)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


# ---- The mean ------------------------------------------------------------------------------------


UNBIASED: tuple[AdvantageEstimator, ...] = ("reinforce", "rloo")
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "concat": {"embed_method": "concat"},
    "coefficients": {"alignment_coef": 0.9, "diversity_coef": 0.4},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_objective_gradient_equals_finite_differences(
    world: World, settings: dict[str, Any]
) -> None:
    """The reference itself: differentiated automatically and by central differences."""
    world = replace(world, **settings)
    gradient = flat_gradient(objective(world), world)
    for _ in range(5):
        direction = torch.randn_like(gradient)
        expected = finite_difference(world, direction / direction.norm())
        assert float(gradient @ direction / direction.norm()) == pytest.approx(
            expected, rel=1e-5, abs=1e-8
        )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("n", [2, 3])
def test_expected_gradient_is_that_of_the_objective(
    world: World, n: int, settings: dict[str, Any]
) -> None:
    world = replace(world, **settings)
    expected = flat_gradient(objective(world), world)
    joint = enumerate_joint_samples(world, n)
    rewards = library_rewards(world, joint.rollouts)
    for estimator in UNBIASED:
        advantages = compute_advantages(rewards, estimator)
        result = LENGTH * expected_gradient(world, joint, advantages)
        assert relative_error(result, expected) < TOLERANCE, estimator


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_expected_cfm_metric_is_the_objective(world: World, temperature: float) -> None:
    """The logged `cfm_loss` of a block is an unbiased estimate of its feature-matching loss."""
    world = replace(world, temperature=temperature)
    joint = enumerate_joint_samples(world, 3)
    cfm_loss = library_rewards(world, joint.rollouts).cfm_loss
    per_block = (
        (joint.probability * cfm_loss).view(len(DOCUMENTS), -1, cfm_loss.shape[1]).sum(dim=1)
    )
    for d, (document, ends) in enumerate(zip(DOCUMENTS, PREFIX_ENDS, strict=True)):
        for k, end in enumerate(ends):
            expected = float(block_objective(world, document, end).detach())
            assert float(per_block[d, k]) == pytest.approx(expected, rel=1e-5)


def test_enumeration_covers_every_sample(world: World) -> None:
    """The test's own footing: blocks where expected, probabilities of each that sum to 1."""
    joint = enumerate_joint_samples(world, 2)
    blocks = joint.rollouts.layout.blocks
    for d, ends in enumerate(PREFIX_ENDS):
        rows = slice(d * len(joint.choice), (d + 1) * len(joint.choice))
        assert blocks.position[rows][0, : len(ends)].tolist() == ends
        assert int(blocks.exists[rows].sum()) == len(joint.choice) * len(ends)
        torch.testing.assert_close(
            joint.probability[rows].sum(dim=0)[: len(ends)],
            torch.ones(len(ends), dtype=torch.float64),
        )


# ---- Regressions of tokens: whatever they say, the mean stays ------------------------------------


def token_knowledge(world: World, rollouts: Rollouts, *, temperature: float) -> TokenKnowledge:
    """States and tokens in a random basis of three directions."""
    network = feature_network(world)
    generator = torch.Generator().manual_seed(5)
    table = network.token_features(VOCABULARY)
    basis = torch.randn(table.shape[1], 3, generator=generator)
    states = network.embed_with_states(rollouts, basis).states
    assert states is not None
    expected = expected_over_tokens(
        world.policy,
        PackedForward.for_model(world.policy),
        rollouts,
        table @ basis,
        temperature=temperature,
        top_p=1.0,
        chunk_size=1000,
    )
    return TokenKnowledge(states, (table @ basis)[rollouts.tokens], expected)


def advantages_by_token(
    world: World, joint: Enumeration, knowledge: TokenKnowledge | None = None
) -> Tensor:
    """With coefficients that were fitted to nothing, and are as large as the features."""
    embedded = feature_network(world).embed(joint.rollouts)
    width = embedded.generated.shape[-1]
    coefficients = 0.3 * torch.randn(LENGTH, 7, width, generator=torch.Generator().manual_seed(6))
    return fitted_advantages(
        embedded.generated,
        embedded.ground_truth,
        knowledge or token_knowledge(world, joint.rollouts, temperature=world.temperature),
        coefficients,
        alignment_coef=world.alignment_coef,
        diversity_coef=world.diversity_coef,
    )


LAST_TOKEN_SETTINGS = {name: s for name, s in SETTINGS.items() if name != "concat"}


@pytest.mark.parametrize("settings", LAST_TOKEN_SETTINGS.values(), ids=LAST_TOKEN_SETTINGS.keys())
@pytest.mark.parametrize("n", [2, 3])
def test_any_regression_of_tokens_leaves_the_expected_gradient(
    world: World, n: int, settings: dict[str, Any]
) -> None:
    world = replace(world, **settings)
    joint = enumerate_joint_samples(world, n)
    advantages = advantages_by_token(world, joint)
    plain = compute_advantages(library_rewards(world, joint.rollouts), "reinforce")
    assert float((advantages - plain[..., None]).std()) > 0.3  # they do say something
    expected = flat_gradient(objective(world), world)
    result = LENGTH * expected_gradient(world, joint, advantages)
    assert relative_error(result, expected) < TOLERANCE


def test_expectations_of_another_policy_give_another_gradient(world: World) -> None:
    joint = enumerate_joint_samples(world, 2)
    wrong = token_knowledge(world, joint.rollouts, temperature=0.6)
    result = LENGTH * expected_gradient(world, joint, advantages_by_token(world, joint, wrong))
    assert relative_error(result, flat_gradient(objective(world), world)) > 0.03


def test_a_baseline_that_depends_on_its_own_token_gives_another_gradient(world: World) -> None:
    joint = enumerate_joint_samples(world, 2)
    right = token_knowledge(world, joint.rollouts, temperature=1.0)
    wrong = replace(right, states=right.tokens)
    result = LENGTH * expected_gradient(world, joint, advantages_by_token(world, joint, wrong))
    assert relative_error(result, flat_gradient(objective(world), world)) > 0.03


# ---- What would be wrong -------------------------------------------------------------------------


def test_scoring_at_another_temperature_gives_another_gradient(world: World) -> None:
    """Sampled at 0.6 and scored at 1, the gradient is that of no objective of ours."""
    world = replace(world, temperature=0.6)
    joint = enumerate_joint_samples(world, 2)
    advantages = compute_advantages(library_rewards(world, joint.rollouts), "reinforce")
    result = LENGTH * expected_gradient(world, joint, advantages, score_temperature=1.0)
    assert relative_error(result, flat_gradient(objective(world), world)) > 0.1


def test_advantages_of_another_block_give_another_gradient(world: World) -> None:
    joint = enumerate_joint_samples(world, 2)
    advantages = compute_advantages(library_rewards(world, joint.rollouts), "reinforce")
    swapped = advantages[:, :, [1, 0, 2]]
    result = LENGTH * expected_gradient(world, joint, swapped)
    assert relative_error(result, flat_gradient(objective(world), world)) > 0.1


@pytest.mark.parametrize("n", [2, 3])
def test_plain_leave_one_out_of_diversity_shrinks_it(world: World, n: int) -> None:
    """Why eq. 94 takes 2 d_j off: each of the others' diversities holds a pair with rollout j.

    The plain (sum d - d_j) / (n - 1) is d_j / (n - 1) and something independent of j, so the
    diversity part of the gradient comes out (n - 2) / (n - 1) as large as it should: half for
    n = 3, nothing at all for n = 2.
    """
    joint = enumerate_joint_samples(world, n)
    diversity = library_rewards(world, joint.rollouts).diversity
    right = expected_gradient(world, joint, -diversity)
    others = (diversity.sum(dim=1, keepdim=True) - diversity) / (n - 1)
    naive = expected_gradient(world, joint, -(diversity - others))
    assert relative_error(naive, right) > 0.4
    torch.testing.assert_close(
        naive, (n - 2) / (n - 1) * right, rtol=TOLERANCE, atol=TOLERANCE * float(right.norm())
    )


# ---- The variance --------------------------------------------------------------------------------


def gram_matrices(world: World) -> Tensor:
    """(D, K, C, C) dot products of the gradients of the rollouts' log-probabilities."""
    single = enumerate_joint_samples(world, 1).rollouts
    log_probs = library_log_probs(world, single, world.temperature).sum(dim=(1, 3))  # (D * C, K)
    gradients = [
        flat_gradient(log_prob, world, retain_graph=True) for log_prob in log_probs.flatten()
    ]
    scores = torch.stack(gradients).view(len(DOCUMENTS), C, log_probs.shape[1], -1).transpose(1, 2)
    return scores @ scores.mT


@dataclass(frozen=True)
class Moments:
    """What one step's gradient looks like over all draws of its rollouts, up to a common factor.

    Attributes:
        by_rollout: (D, K, C) the mean gradient, as coefficients of the rollouts' own gradients.
        squared_mean: its squared norm, summed over blocks.
        variance: trace of the covariance; blocks are independent, so theirs add up.
    """

    by_rollout: Tensor
    squared_mean: float
    variance: float


def moments(world: World, gram: Tensor, n: int, estimator: AdvantageEstimator) -> Moments:
    """Exact moments of sum over j of advantage_j * grad log p_j, divided by n."""
    choice = torch.tensor(list(itertools.product(range(C), repeat=n)))  # (M, n)
    single = enumerate_joint_samples(world, 1)
    embedded = feature_network(world).embed(single.rollouts)
    n_blocks = single.probability.shape[1]
    x = embedded.generated[:, 0].view(len(DOCUMENTS), C, n_blocks, -1)
    y = embedded.ground_truth.view(len(DOCUMENTS), C, n_blocks, -1)[:, 0]
    p = single.probability.view(len(DOCUMENTS), C, n_blocks)
    by_rollout = torch.zeros(len(DOCUMENTS), n_blocks, C, dtype=torch.float64)
    squared_mean = variance = 0.0
    for d, ends in enumerate(PREFIX_ENDS):
        rewards = feature_matching_rewards(
            x[d][choice],  # (M, n, K, F): each joint sample takes the place of a document
            y[d].expand(len(choice), -1, -1),
            alignment_coef=world.alignment_coef,
            diversity_coef=world.diversity_coef,
            use_whitening=False,
        )
        advantages = compute_advantages(rewards, estimator).double() / n
        for k in range(len(ends)):
            probability = p[d, :, k][choice].prod(dim=1)  # (M,)
            weighted = probability[:, None] * advantages[..., k]
            mean = by_rollout[d, k].scatter_add_(0, choice.flatten(), weighted.flatten())
            dots = gram[d, k][choice[:, :, None], choice[:, None, :]]  # (M, n, n)
            second_moment = torch.einsum("mi,mj,mij->", weighted, advantages[..., k], dots)
            square = float(mean @ gram[d, k] @ mean)
            squared_mean += square / len(ends) ** 2
            variance += (float(second_moment) - square) / len(ends) ** 2
    return Moments(by_rollout, squared_mean, variance)


def variance_ratio(world: World, gram: Tensor, n: int) -> float:
    """Variance of `rloo` over that of `reinforce`, after making sure that the means agree."""
    plain, rloo = (moments(world, gram, n, estimator) for estimator in UNBIASED)
    difference = rloo.by_rollout - plain.by_rollout
    squared_difference = torch.einsum("dkc,dkce,dke->", difference, gram, difference)
    assert float(squared_difference) < TOLERANCE**2 * plain.squared_mean
    return rloo.variance / plain.variance


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("n", [3, 4])
def test_rloo_has_the_mean_of_reinforce_and_less_variance(
    world: World, n: int, temperature: float
) -> None:
    world = replace(world, temperature=temperature)
    ratio = variance_ratio(world, gram_matrices(world), n)
    assert ratio < 1


@pytest.mark.parametrize("n", [2, 3, 4])
def test_rloo_removes_the_variance_of_the_mean_alignment(balanced_world: World, n: int) -> None:
    """Where alignment alone is rewarded, most of the variance is that of its mean."""
    alignment_only = replace(balanced_world, diversity_coef=0.0)
    ratio = variance_ratio(alignment_only, gram_matrices(alignment_only), n)
    assert ratio < 0.1


def test_rloo_adds_variance_if_rewards_are_already_centred(balanced_world: World) -> None:
    """A limit worth knowing, and no fault: a baseline is an estimate, with a variance of its own.

    Without whitening, alignment and diversity are dot products of unit features both, and their
    means all but cancel in the reward. With n = 2 the baseline has no diversity part: rloo then
    gives the reward back the mean that it had lost.
    """
    gram = gram_matrices(balanced_world)
    assert variance_ratio(balanced_world, gram, 2) > 2


# ---- Documents weigh the same --------------------------------------------------------------------


def test_the_weight_of_a_document_does_not_depend_on_its_number_of_blocks() -> None:
    """The loss against plain loops: packed and ragged rows, documents with 0 to 4 blocks."""
    lengths = [[12, 5, 2], [3], [7, 6]]  # tokens of the documents of each row
    width = max(map(sum, lengths))
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    owner = torch.full((len(lengths), width), -1)
    for row, of_row in enumerate(lengths):
        owner[row, : sum(of_row)] = torch.arange(len(of_row)).repeat_interleave(
            torch.tensor(of_row)
        )
    documents = Documents.from_inputs(
        {"input_ids": ids, "attention_mask": (owner >= 0).long(), "document_ids": owner}
    )
    blocks: Blocks = find_blocks(documents, stride=2, context_length=3, generate_max_len=2)
    layout = PackedLayout(documents, blocks, n_samples=3, length=2)
    log_probs = torch.randn(layout.rollout_shape, dtype=torch.float64)
    advantages = torch.randn(layout.rollout_shape[:3], dtype=torch.float64)

    losses, counts = [], []
    for row, of_row in enumerate(lengths):
        for document in range(len(of_row)):
            own = [
                k
                for k in range(blocks.exists.shape[1])
                if blocks.exists[row, k] and blocks.document[row, k] == document
            ]
            terms = [
                -float(advantages[row, i, k] * log_probs[row, i, k, t])
                for i, k, t in itertools.product(range(3), own, range(2))
            ]
            counts.append(len(own))
            losses.append(sum(terms) / len(terms) if terms else 0.0)
    assert counts == [4, 1, 0, 0, 2, 1]
    result = policy_gradient_loss(log_probs, advantages, layout)
    assert float(result) == pytest.approx(sum(losses) / len(losses), rel=1e-6)
