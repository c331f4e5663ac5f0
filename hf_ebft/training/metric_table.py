"""Every metric of the package: what it is, which way is better, its unit, and where it is shown.

The training log, the progress bar, TensorBoard, the report, the evaluation tables and the docs
select from these tables. `python -m hf_ebft.training.metric_table` prints them as Markdown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Direction = Literal["higher", "lower"]
Mode = Literal["both", "strided", "structured"]

#: Names of EBFT's own metrics begin with this in every log.
PREFIX = "ebft/"


@dataclass(frozen=True)
class Metric:
    """The description of a metric.

    Attributes:
        name: its name in `log_history`, without the `eval_` of an evaluation.
        label: its name in tables and charts.
        better: the desired direction; None if neither is good in itself.
        unit: unit of its values; empty for plain numbers.
        meaning: its definition, with the paper's equation if there is one.
        advice: what to look for; empty if the meaning says so.
        matters: changes smaller than this are not reported.
        mode: the mode that logs it; None if `Trainer` itself does.
        short: its name on the progress bar; empty if it is not shown there.
        in_summary: whether it is in the table at the end of a run, and in the model card.
        in_overview: whether it may be in the report's overview picture.
    """

    name: str
    label: str
    better: Direction | None = None
    unit: str = ""
    meaning: str = ""
    advice: str = ""
    matters: float = 0.0
    mode: Mode | None = "both"
    short: str = ""
    in_summary: bool = False
    in_overview: bool = False


#: The metrics that a run logs, the most informative first.
METRICS = (
    Metric(
        "ebft/cfm_loss",
        "CFM loss",
        "lower",
        meaning="Squared distance between the mean feature of rollouts and the feature of the "
        "truth, unwhitened, estimated without bias for n >= 2 (paper, eq. 2).",
        advice="Read it together with the energy score and the cross-entropy: a policy that only "
        "becomes sharper, or that overfits, can also lower it.",
        short="cfm_loss",
        in_summary=True,
        in_overview=True,
    ),
    Metric(
        "ebft/energy_score",
        "energy score",
        "lower",
        meaning="Mean distance of rollouts to the truth minus half their mean distance to each "
        "other, in unwhitened features, unbiased for n >= 2. Strictly proper (Gneiting & Raftery "
        "2007): it is lowest only if the policy's features have the distribution of the truth's.",
        advice="If the CFM loss falls and the energy score rises, the policy only becomes sharper.",
        in_summary=True,
    ),
    Metric(
        "ebft/excess_over_spread",
        "excess over own spread",
        meaning="CFM loss minus the variance of the rollouts' features, unbiased for n >= 2.",
        advice="0 if rollouts vary as much as the truth. Above 0 the policy is overconfident, "
        "below 0 underconfident.",
        in_summary=True,
    ),
    Metric(
        "ebft/alignment",
        "alignment",
        "higher",
        meaning="Twice the cosine between a rollout's feature and the truth's, whitened if "
        "whitening is on (paper, eq. 7).",
        short="alignment",
        in_summary=True,
        in_overview=True,
    ),
    Metric(
        "ebft/mean_reward",
        "mean reward",
        "higher",
        meaning="`alignment_coef` * alignment - `diversity_coef` * diversity (paper, eq. 7).",
        in_summary=True,
    ),
    Metric(
        "ebft/diversity",
        "diversity",
        meaning="Twice the mean dot product among a group's rollouts (paper, eq. 7). It measures "
        "similarity: a low value means diverse rollouts. Per-group whitening makes it 0 unless "
        "rollouts repeat.",
        short="diversity",
        in_summary=True,
    ),
    Metric(
        "ebft/ce_loss",
        "cross-entropy",
        "lower",
        "nats/token",
        "Teacher-forced. Logged at steps with `ce_coef` > 0.",
        short="ce",
        in_summary=True,
        in_overview=True,
    ),
    Metric(
        "loss",
        "loss",
        meaning="In training the policy-gradient surrogate, whose gradient matters and whose value "
        "does not; in evaluation the teacher-forced cross-entropy.",
        mode=None,
    ),
    Metric(
        "ebft/entropy",
        "entropy of rollouts",
        unit="nats/token",
        meaning="Mean -log p of the sampled tokens at the sampling temperature.",
        advice="A fast fall means collapse: raise `ce_coef` or lower the learning rate. A fall "
        "together with the cross-entropy means learning.",
        mode="strided",
        short="entropy",
        in_summary=True,
        in_overview=True,
    ),
    Metric(
        "ebft/duplicate_rollouts",
        "duplicate rollouts",
        "lower",
        "share",
        "Rollouts equal to an earlier one of their group. At most (n - 1) / n.",
        "If it is near this maximum, raise `temperature`.",
        matters=0.05,
        in_summary=True,
        in_overview=True,
    ),
    Metric(
        "ebft/zero_advantage_groups",
        "groups without advantage",
        "lower",
        "share",
        "Groups whose rollouts all have advantage 0: they give no gradient.",
        matters=0.05,
        in_summary=True,
    ),
    Metric(
        "ebft/advantages_std",
        "spread of advantages",
        meaning="Standard deviation of the advantages. At 0 the policy gradient is 0.",
    ),
    Metric(
        "ebft/kl",
        "KL to the feature network",
        unit="nats/token",
        meaning="KL divergence of the policy from the feature network. Logged at steps with "
        "`kl_coef` > 0.",
        mode="strided",
        in_summary=True,
    ),
    Metric(
        "ebft/rl_loss",
        "policy-gradient loss",
        meaning="A surrogate: its gradient matters, its value does not.",
    ),
    Metric(
        "ebft/ce_coef",
        "weight of the cross-entropy",
        meaning="Logged if `ce_coef_schedule` changes it.",
    ),
    Metric(
        "ebft/kl_coef",
        "weight of the KL penalty",
        meaning="Logged if `kl_coef_schedule` changes it.",
        mode="strided",
    ),
    Metric(
        "ebft/rl_coef",
        "weight of the policy gradient",
        meaning="Logged if `rl_coef_schedule` changes it.",
        mode="strided",
    ),
    Metric(
        "policy_loss",
        "policy loss",
        meaning="GRPO's loss on held-out prompts, which it calls `eval_loss`; its value does not "
        "matter. The cross-entropy of structured mode is `ce_loss`.",
        mode=None,
    ),
    Metric("grad_norm", "gradient norm", meaning="Before clipping.", mode=None),
    Metric("learning_rate", "learning rate", meaning="As scheduled.", mode=None),
    Metric(
        "ebft/documents_without_blocks",
        "documents without blocks",
        "lower",
        "share",
        "Documents too short for a rollout. Only a cross-entropy term trains on them.",
        mode="strided",
    ),
    Metric(
        "ebft/replies_without_blocks",
        "replies without blocks",
        "lower",
        "share",
        "Replies without a rollout, because they are too short or lie between two block starts. "
        "Logged if completions are marked.",
        "Lower `stride` or `generate_max_len` to reach more of them.",
        mode="strided",
    ),
    Metric(
        "ebft/blocks_per_document",
        "blocks per document",
        meaning="Mean number of positions that rollouts start from.",
        mode="strided",
    ),
    Metric(
        "ebft/without_answer",
        "rollouts without an answer",
        "lower",
        "share",
        "Completions that end before their thinking does.",
        "Raise `max_completion_length`.",
        mode="structured",
    ),
    Metric(
        "ebft/ground_truth_length",
        "length of ground truths",
        unit="tokens",
        meaning="Mean over the batch.",
        mode="structured",
    ),
    Metric(
        "ebft/ground_truths_over_budget",
        "ground truths over budget",
        "lower",
        "share",
        "Ground truths longer than the longest possible completion.",
        "Raise `max_completion_length`.",
        mode="structured",
    ),
    Metric(
        "ebft/seconds_rollout",
        "time, rollouts",
        unit="seconds",
        meaning="Per micro-batch.",
        mode="strided",
    ),
    Metric(
        "ebft/seconds_features",
        "time, features",
        unit="seconds",
        meaning="Per micro-batch.",
    ),
    Metric(
        "ebft/seconds_training",
        "time, training",
        unit="seconds",
        meaning="Per micro-batch.",
        mode="strided",
    ),
    Metric(
        "ebft/row_shapes",
        "shapes of packed rows",
        meaning="Number of different shapes so far, in this process. Logged on CUDA and with "
        "`torch_compile`, where each shape is compiled separately.",
        advice="If it keeps growing, set `pad_to_multiple_of` higher.",
        mode="strided",
    ),
)
METRIC_BY_NAME = {metric.name: metric for metric in METRICS}
#: Seconds of a micro-batch, by phase.
PHASES = ("ebft/seconds_rollout", "ebft/seconds_features", "ebft/seconds_training")

#: `Trainer` calls the cross-entropy of an evaluation its loss.
EVALUATION_LOSS = Metric(
    "loss",
    "cross-entropy, held-out",
    "lower",
    "nats/token",
    "Teacher-forced, on the evaluation set.",
    mode=None,
)


def metric_of(name: str) -> Metric | None:
    """The table's entry of a logged name, `eval_` or not; None if it is not in the table."""
    if name == "eval_loss":
        return EVALUATION_LOSS
    return METRIC_BY_NAME.get(name.removeprefix("eval_"))


def label_of(name: str) -> str:
    """The label of a logged name, for tables and charts."""
    metric = metric_of(name)
    if metric is None:
        return name
    held_out = name.startswith("eval_") and metric is not EVALUATION_LOSS
    return f"{metric.label}, held-out" if held_out else metric.label


#: Held-out measurements of the text itself, by teacher forcing at temperature 1: means over tokens.
TEXT_METRICS = {
    "cross_entropy": Metric(
        "cross_entropy",
        "cross-entropy, nats/token",
        "lower",
        "nats/token",
        "teacher-forced, temperature 1, mean over all tokens",
    ),
    "cross_entropy_completion": Metric(
        "cross_entropy_completion",
        "cross-entropy of completions",
        "lower",
        "nats/token",
        "the same, over completions only, if prompts are marked",
    ),
}
#: Held-out measurements of rollouts: means over the blocks of a document, then over documents.
ROLLOUT_METRICS = {
    "cfm_loss": Metric(
        "cfm_loss",
        "CFM loss",
        "lower",
        meaning="`‖E[φ(rollout)] − φ(truth)‖²` (paper, eq. 2), unbiased for n ≥ 2, so it can be "
        "negative. Proper but not strictly proper: sharpening or overfitting can lower it while "
        "energy score and cross-entropy rise",
    ),
    "energy_score": Metric(
        "energy_score",
        "energy score",
        "lower",
        meaning="`E‖φ(rollout) − φ(truth)‖ − ½ E‖φ(rollout) − φ(rollout′)‖` (Gneiting & Raftery, "
        "2007), unbiased for n ≥ 2. Strictly proper: sharpening or spreading lowers it only if the "
        "distribution of features comes nearer to the truth's",
    ),
    "excess_over_spread": Metric(
        "excess_over_spread",
        "excess over own spread",
        meaning="CFM loss minus the variance of the rollouts' features, unbiased for n ≥ 2: 0 if "
        "rollouts vary as much as the truth, above 0 if the policy is overconfident",
    ),
    "cosine_alignment": Metric(
        "cosine_alignment",
        "alignment, 2 cos unwhitened",
        "higher",
        meaning="2 cos of rollout and truth, unwhitened, mean of n",
    ),
    "cosine_alignment_best": Metric(
        "cosine_alignment_best",
        "alignment unwhitened, best of n",
        "higher",
        meaning="the same, best of n",
    ),
    "dot_diversity": Metric(
        "dot_diversity",
        "diversity, 2 dot unwhitened",
        meaning="twice the mean dot product of a group's rollouts, unwhitened",
    ),
    "reward": Metric(
        "reward",
        "reward as trained, mean",
        "higher",
        meaning="the reward of a rollout in training with these settings, mean of n",
    ),
    "reward_best": Metric(
        "reward_best", "reward as trained, best of n", "higher", meaning="the same, best of n"
    ),
    "alignment": Metric(
        "alignment",
        "alignment as rewarded",
        "higher",
        meaning="the alignment in `reward`, whitened if the settings say so",
    ),
    "diversity": Metric(
        "diversity", "diversity as rewarded", meaning="the diversity in `reward`, whitened likewise"
    ),
    "duplicates": Metric(
        "duplicates",
        "share of duplicate rollouts",
        "lower",
        "share",
        "rollouts equal to an earlier one of their group",
    ),
    "entropy": Metric(
        "entropy",
        "entropy of rollouts, nats/token",
        unit="nats/token",
        meaning="mean −log p of the sampled tokens, at the sampling temperature",
    ),
}
#: Prefix of the metrics that a second feature network measures on the same rollouts.
SECOND_NETWORK = "second_"
SECOND_NETWORK_METRICS = {
    SECOND_NETWORK + name: replace(
        ROLLOUT_METRICS[name],
        name=SECOND_NETWORK + name,
        label=f"{ROLLOUT_METRICS[name].label}, second feature network",
        meaning=f"`{name}` in the features of a second network, if there is one",
    )
    for name in (
        "cfm_loss",
        "energy_score",
        "excess_over_spread",
        "cosine_alignment",
        "dot_diversity",
    )
}
#: Metrics of which exp is shown as well.
PERPLEXITIES = {
    "cross_entropy": Metric("perplexity", "perplexity", "lower", meaning="exp of `cross_entropy`"),
    "cross_entropy_completion": Metric(
        "perplexity_completion",
        "perplexity of completions",
        "lower",
        meaning="exp of `cross_entropy_completion`",
    ),
}
HELD_OUT_METRICS = (
    TEXT_METRICS
    | {metric.name: metric for metric in PERPLEXITIES.values()}
    | ROLLOUT_METRICS
    | SECOND_NETWORK_METRICS
)


def training_table() -> str:
    """The table of logged metrics in docs/metrics.md."""
    lines = ["| metric | better | what it is, and what to look for |", "|---|---|---|"]
    for metric in METRICS:
        if metric.mode is None:
            continue
        name = f"`{metric.name.removeprefix(PREFIX)}`"
        if metric.mode != "both":
            name += f" ({metric.mode})"
        text = f"{metric.meaning} {metric.advice}".strip()
        if metric.unit:
            text = f"{metric.unit}. {text}"
        lines.append(f"| {name} | {metric.better or ''} | {text} |")
    return "\n".join(lines) + "\n"


def measurement_table() -> str:
    """The table of held-out measurements in docs/evaluation.md."""
    lines = ["| measurement | better | what it is |", "|---|---|---|"]
    lines += [
        f"| `{metric.name}` | {metric.better or ''} | {metric.meaning} |"
        for metric in HELD_OUT_METRICS.values()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(training_table())
    print(measurement_table(), end="")
