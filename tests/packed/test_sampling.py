"""Sampling is unbiased: whole rollouts follow exactly the distribution they are meant to follow.

A vocabulary of five tokens and three tokens a rollout make 125 rollouts per prefix, whose exact
probabilities come from plain causal forwards over every one of them. Thousands of sampled rollouts
are compared with these by Pearson's chi-square test. Beside each test stands one which shows that
samplers that are wrong in a plausible way would be rejected.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedModel

from hf_ebft.packed.drawing import nucleus, token_probabilities
from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.sampling import Rollouts, make_generator, sample_rollouts
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from tests.support.enumeration import all_continuations, continuation_logits
from tests.support.tiny import tiny_causal_lm

VOCABULARY, LENGTH, CONTEXT, STRIDE = 5, 3, 3, 3
# 13 tokens leave a remainder behind the last of 3 blocks, 9 tokens fit 2 blocks exactly.
DOCUMENTS = [[0, 3, 1, 4, 4, 2, 0, 1, 3, 3, 2, 0, 1], [2, 2, 4, 0, 1, 3, 0, 4, 1]]
PREFIX_ENDS = [(0, 3), (0, 6), (0, 9), (1, 3), (1, 6)]  # (document, e_k) of every block
# One in 10^4 right samplers would be rejected; wrong ones have to be rejected far more clearly.
SIGNIFICANCE, CLEARLY_WRONG = 1e-4, 1e-12

CONTINUATIONS = all_continuations(VOCABULARY, LENGTH)


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return tiny_causal_lm(LlamaConfig, vocabulary=VOCABULARY, seed=0, initializer_range=0.3)


# ---- Sampled and exact distributions -------------------------------------------------------------


def make_layout(copies: int, n: int) -> PackedLayout:
    """`copies` of both documents in one ragged, left-padded batch; even rows hold the first one."""
    width = max(map(len, DOCUMENTS))
    rows = [[0] * (width - len(document)) + document for document in DOCUMENTS]
    real = [[0] * (width - len(document)) + [1] * len(document) for document in DOCUMENTS]
    documents = Documents.from_inputs(
        {
            "input_ids": torch.tensor(rows).repeat(copies, 1),
            "attention_mask": torch.tensor(real).repeat(copies, 1),
        }
    )
    blocks = find_blocks(documents, stride=STRIDE, context_length=CONTEXT, generate_max_len=LENGTH)
    return PackedLayout(documents, blocks, n, LENGTH)


def sample(
    model: PreTrainedModel,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    copies: int = 160,
    n: int = 25,
) -> Rollouts:
    """`copies * n` rollouts of every block."""
    return sample_rollouts(
        model,
        PackedForward.for_model(model),
        make_layout(copies, n),
        temperature=temperature,
        top_p=top_p,
        chunk_size=1000,
        generator=make_generator(torch.device("cpu"), seed),
    )


def counts_by_block(rollouts: Rollouts) -> list[Tensor]:
    """(125,) how often each rollout was drawn, for each entry of `PREFIX_ENDS`."""
    powers = VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)
    code = (rollouts.tokens * powers).sum(dim=-1)  # index into CONTINUATIONS
    return [
        torch.bincount(
            code[document :: len(DOCUMENTS), :, (end - CONTEXT) // STRIDE].flatten(),
            minlength=len(CONTINUATIONS),
        )
        for document, end in PREFIX_ENDS
    ]


@torch.no_grad()
def exact_probabilities(
    model: PreTrainedModel, *, temperature: float = 1.0, top_p: float = 1.0, shift: int = 0
) -> list[Tensor]:
    """(125,) probability of each rollout after `doc[: e_k + shift]`, for each of `PREFIX_ENDS`."""
    by_block = []
    for document, end in PREFIX_ENDS:
        prefix = torch.tensor(DOCUMENTS[document][: end + shift])
        logits = continuation_logits(model, prefix, CONTINUATIONS).double() / temperature
        probabilities = [
            [truncated(token.softmax(dim=-1).tolist(), top_p) for token in continuation]
            for continuation in logits
        ]
        per_token = torch.tensor(probabilities, dtype=torch.float64)
        by_block.append(per_token.gather(-1, CONTINUATIONS[..., None]).squeeze(-1).prod(dim=-1))
    return by_block


def truncated(probabilities: list[float], top_p: float) -> list[float]:
    """The nucleus by its definition: most likely tokens first until their mass reaches `top_p`."""
    kept: set[int] = set()
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if sum(probabilities[other] for other in kept) >= top_p:
            break
        kept.add(token)
    mass = sum(probabilities[token] for token in kept)
    return [p / mass if token in kept else 0.0 for token, p in enumerate(probabilities)]


# ---- Statistics ----------------------------------------------------------------------------------


def p_value(statistic: float, degrees: int) -> float:
    """Probability that a chi-square variable is larger: the regularised upper incomplete gamma.

    A block with a single possible rollout leaves nothing to test and no degree of freedom: 1.
    """
    if degrees == 0:
        return 1.0
    halves = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom.

    Cells with fewer than five expected counts are pooled, the rarest first, until the pool expects
    five. Counts where the probability is zero make the statistic infinite.
    """
    if int(counts[probabilities == 0].sum()) > 0:
        return float("inf"), 1
    expected = probabilities * counts.sum()
    order = expected.argsort()
    expected, observed = expected[order], counts[order].double()
    pooled = int((expected < 5).sum())
    while pooled and expected[:pooled].sum() < 5:
        pooled += 1
    if pooled:
        expected = torch.cat([expected[:pooled].sum()[None], expected[pooled:]])
        observed = torch.cat([observed[:pooled].sum()[None], observed[pooled:]])
    return float(((observed - expected).square() / expected).sum()), len(expected) - 1


def fit(counts: list[Tensor], probabilities: list[Tensor]) -> list[float]:
    """p-value of each block's counts, then of all blocks together."""
    tests = [chi_square(c, p) for c, p in zip(counts, probabilities, strict=True)]
    total = (sum(statistic for statistic, _ in tests), sum(degrees for _, degrees in tests))
    return [p_value(*test) for test in [*tests, total]]


def test_chi_square_has_the_tabulated_quantiles() -> None:
    """The yardstick itself: 5 % and 0.1 % points of the chi-square distribution from the tables."""
    assert p_value(3.841, 1) == pytest.approx(0.05, rel=1e-3)
    assert p_value(18.307, 10) == pytest.approx(0.05, rel=1e-3)
    assert p_value(149.449, 100) == pytest.approx(0.001, rel=1e-3)


def test_chi_square_pools_rare_cells() -> None:
    counts = torch.tensor([50, 43, 4, 3, 0])
    probabilities = torch.tensor([0.5, 0.42, 0.05, 0.03, 0.0], dtype=torch.float64)
    # 100 draws: the cell of 3 expected counts and that of 0 are pooled with the one of 5.
    statistic, degrees = chi_square(counts, probabilities)
    assert degrees == 2
    assert statistic == pytest.approx(0 + 1 / 42 + 1 / 8)
    impossible = chi_square(torch.tensor([50, 42, 4, 3, 1]), probabilities)
    assert p_value(*impossible) == 0.0


# ---- Whole rollouts ------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (0.6, 0.7)])
def test_rollouts_follow_the_exact_distribution(
    policy: PreTrainedModel, temperature: float, top_p: float
) -> None:
    counts = counts_by_block(sample(policy, temperature=temperature, top_p=top_p))
    assert {int(count.sum()) for count in counts} == {4000}
    p_values = fit(counts, exact_probabilities(policy, temperature=temperature, top_p=top_p))
    assert min(p_values) > SIGNIFICANCE, p_values


def test_many_samples_in_one_row_follow_the_exact_distribution(policy: PreTrainedModel) -> None:
    """300 rollouts per block side by side in one packed row."""
    counts = counts_by_block(sample(policy, copies=10, n=300, seed=1))
    p_values = fit(counts, exact_probabilities(policy))
    assert min(p_values) > SIGNIFICANCE, p_values


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.75},
        {"top_p": 0.95},
        {"shift": -1},
        {"shift": 1},
    ],
    ids=str,
)
def test_a_wrong_distribution_is_rejected(policy: PreTrainedModel, wrong: dict[str, float]) -> None:
    """Power: another temperature, another nucleus, a prefix shifted by one token."""
    counts = counts_by_block(sample(policy))
    p_values = fit(counts, exact_probabilities(policy, **wrong))  # type: ignore[arg-type]
    assert max(p_values) < CLEARLY_WRONG, p_values


def test_blocks_taken_for_one_another_are_rejected(policy: PreTrainedModel) -> None:
    counts = counts_by_block(sample(policy))
    p_values = fit(counts, exact_probabilities(policy)[1:] + exact_probabilities(policy)[:1])
    assert max(p_values) < CLEARLY_WRONG, p_values


# ---- Independence --------------------------------------------------------------------------------


def largest_correlation(tokens: Tensor, probabilities: list[Tensor]) -> float:
    """Largest correlation among rollouts of one document, in standard errors.

    Over many copies of the document, every pair of rollouts (sample, block) is compared, also with
    the rollouts of the next copy in the batch. What is correlated is whether a token is the
    likeliest of its place, with its exact mean, for the first and for the last token of a rollout.

    Args:
        tokens: (copies, n, K, G).
        probabilities: K times (125,).
    """
    copies = tokens.shape[0]
    largest = 0.0
    for step in (0, LENGTH - 1):
        columns = []
        for block, exact in enumerate(probabilities):
            marginal = torch.zeros(VOCABULARY, dtype=torch.float64)
            marginal.scatter_add_(0, CONTINUATIONS[:, step], exact)
            mean, likeliest = marginal.max(dim=0)
            hit = (tokens[:, :, block, step] == likeliest).double()
            columns.append((hit - mean) / (mean * (1 - mean)).sqrt())
        slots = torch.stack(columns, dim=2).flatten(1)  # (copies, n * K)
        within = slots.T @ slots / copies**0.5
        neighbours = slots.T @ slots.roll(1, dims=0) / copies**0.5
        within.fill_diagonal_(0.0)
        largest = max(largest, float(within.abs().max()), float(neighbours.abs().max()))
    return largest


# About 800 pairs are compared; the largest of as many standard normals passes 5.5 once in 3 * 10^4.
MOST_STANDARD_ERRORS = 5.5


def test_rollouts_are_independent(policy: PreTrainedModel) -> None:
    """Of other samples of the same block, of other blocks, of other rows of the batch."""
    tokens = sample(policy, copies=1500, n=4).tokens[:: len(DOCUMENTS)]
    exact = exact_probabilities(policy)[:3]
    assert largest_correlation(tokens, exact) < MOST_STANDARD_ERRORS

    for description, copied in {
        "samples of a block share their noise": tokens[:, [0, 0, 2, 3]],
        "a row repeats the one before": torch.cat([tokens[::2], tokens[::2]], dim=1)
        .view(-1, 2, *tokens.shape[1:])
        .flatten(0, 1),
    }.items():
        assert largest_correlation(copied, exact) > 2 * MOST_STANDARD_ERRORS, description


# ---- Dropout and randomness ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def dropout_policy() -> PreTrainedModel:
    """A GPT-2 with dropout everywhere, in training mode."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
        resid_pdrop=0.5,
        embd_pdrop=0.5,
        attn_pdrop=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).train()


def test_sampling_sees_no_dropout(dropout_policy: PreTrainedModel) -> None:
    """In training mode, the distribution is that of evaluation mode, and the mode is kept."""
    evaluated = copy.deepcopy(dropout_policy).eval()
    counts = counts_by_block(sample(dropout_policy))
    p_values = fit(counts, exact_probabilities(evaluated))
    assert min(p_values) > SIGNIFICANCE, p_values
    assert all(module.training for module in dropout_policy.modules())

    in_training, in_evaluation = sample(dropout_policy, n=8), sample(evaluated, n=8)
    assert torch.equal(in_training.tokens, in_evaluation.tokens)


def test_sampling_with_dropout_would_be_rejected(
    dropout_policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power of the test above: the same sampler without the switch to evaluation mode."""
    monkeypatch.setattr("hf_ebft.packed.sampling.evaluation_mode", lambda model: torch.no_grad())
    counts = counts_by_block(sample(dropout_policy))
    p_values = fit(counts, exact_probabilities(copy.deepcopy(dropout_policy).eval()))
    assert max(p_values) < CLEARLY_WRONG, p_values


@pytest.mark.parametrize("which", ["policy", "dropout_policy"])
def test_randomness_is_the_generators_alone(which: str, request: pytest.FixtureRequest) -> None:
    """Equal generators give equal rollouts, others others; the global generators stay untouched."""
    model = request.getfixturevalue(which)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = sample(model, seed=7, n=4, copies=2).tokens
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)

    torch.manual_seed(123)  # what the global generator holds must not matter
    again = sample(model, seed=7, n=4, copies=2).tokens
    other = sample(model, seed=8, n=4, copies=2).tokens
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- One token: temperature and nucleus ----------------------------------------------------------


LOGITS = st.lists(st.floats(-6, 6, allow_nan=False, width=32), min_size=1, max_size=12).map(
    lambda values: torch.tensor(values, dtype=torch.float32)
)


def distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    return nucleus(token_probabilities(logits, temperature), top_p)


def softmax_by_hand(logits: Tensor, temperature: float) -> list[float]:
    scaled = [value / temperature for value in logits.tolist()]
    weights = [np.exp(value - max(scaled)) for value in scaled]
    return [float(weight / sum(weights)) for weight in weights]


@settings(deadline=None)  # machines may be busy
@given(logits=LOGITS, temperature=st.floats(0.3, 2), top_p=st.floats(0.01, 1))
def test_nucleus_equals_the_plain_loop(logits: Tensor, temperature: float, top_p: float) -> None:
    exact = softmax_by_hand(logits, temperature)
    descending = np.sort(exact)[::-1]
    # Where a sum of probabilities hits top_p up to rounding, both answers are right, and among
    # equally likely tokens any choice is.
    assume(np.abs(np.cumsum(descending) - top_p).min() > 1e-5)
    assume(len(exact) == 1 or np.abs(np.diff(descending)).min() > 1e-6)
    result = distribution(logits, temperature, top_p)
    torch.testing.assert_close(result, torch.tensor(truncated(exact, top_p)), rtol=1e-5, atol=1e-6)


@settings(deadline=None)  # machines may be busy
@given(logits=LOGITS, top_p=st.floats(1e-6, 1), data=st.data())
def test_nucleus_is_a_distribution_on_the_likeliest_tokens(
    logits: Tensor, top_p: float, data: st.DataObject
) -> None:
    """Whatever ties there are: it sums to 1, no excluded token is likelier than a kept one."""
    repeats = data.draw(st.integers(1, 3))
    logits = logits.repeat(repeats)  # ties
    full = torch.softmax(logits, dim=-1)
    result = distribution(logits, 1.0, top_p)
    assert float(result.sum()) == pytest.approx(1.0, abs=1e-6)
    kept = result > 0
    if bool((~kept).any()):
        assert full[~kept].max() <= full[kept].min()
    assert float(full[kept].sum()) >= top_p - 1e-6
    # Smallest such set: without its least likely token it falls short of top_p.
    assert float(full[kept].sum() - full[kept].min()) < top_p + 1e-6


@pytest.mark.parametrize(
    ("top_p", "n_kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)]
)
def test_ties_are_cut_to_the_number_that_is_needed(top_p: float, n_kept: int) -> None:
    """Four equally likely tokens: as many as reach the mass, with equal probabilities."""
    result = distribution(torch.zeros(4), 1.0, top_p)
    assert int((result > 0).sum()) == n_kept
    torch.testing.assert_close(result[result > 0], torch.full((n_kept,), 1 / n_kept))


def test_mass_that_reaches_top_p_exactly_is_enough() -> None:
    """With top_p the very probability of the likeliest token, that token is the nucleus.

    Taking a token's own probability off the cumulative sum again kept a second one in some cases,
    by rounding.
    """
    for logits in torch.randn(100, 6):
        likeliest = torch.softmax(logits, dim=-1).max()
        result = distribution(logits, 1.0, float(likeliest))
        assert int((result > 0).sum()) == 1


@pytest.mark.parametrize("logits", [[1.0, 3.0, 2.0], [2.0, 2.0, 2.0], [0.0, -1e4, 1e4]])
def test_a_tiny_nucleus_is_the_likeliest_token(logits: list[float]) -> None:
    result = distribution(torch.tensor(logits), 1.0, 1e-9)
    assert sorted(result.tolist()) == [0.0, 0.0, 1.0]
    assert logits[int(result.argmax())] == max(logits)


def test_the_whole_nucleus_is_the_softmax() -> None:
    logits = torch.randn(3, 4, 7)
    expected = [softmax_by_hand(row, 0.6) for row in logits.flatten(0, 1)]
    result = distribution(logits, 0.6, 1.0)
    torch.testing.assert_close(result, torch.tensor(expected).view_as(logits), rtol=1e-5, atol=1e-7)


def test_each_distribution_of_a_batch_has_its_own_nucleus() -> None:
    logits = torch.randn(3, 4, 7)
    result = distribution(logits, 0.6, 0.8)
    for index in np.ndindex(3, 4):
        alone = distribution(logits[index], 0.6, 0.8)
        torch.testing.assert_close(result[index], alone, rtol=1e-6, atol=0)


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = torch.randn(5, 9).bfloat16()
    result = distribution(logits, 0.6, 0.9)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, distribution(logits.float(), 0.6, 0.9))


def test_impossible_tokens_stay_impossible() -> None:
    """A logit of minus infinity (a banned token) is never kept."""
    logits = torch.tensor([0.0, -torch.inf, 1.0])
    for top_p in (1.0, 0.9, 0.1):
        assert float(distribution(logits, 1.0, top_p)[1]) == 0.0
