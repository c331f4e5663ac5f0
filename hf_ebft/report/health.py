"""Rules that detect signs of trouble in a run, with advice what to change.

Each rule is a function of a run. It looks at the last fifth of the run (or compares it with the
first fifth), and returns a finding with its evidence and advice, or None. The thresholds are the
constants below; docs/report.md says how they were tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from hf_ebft.report.runs import Run
from hf_ebft.training.metric_table import METRIC_BY_NAME, PHASES
from hf_ebft.watching.curves import FEWEST_POINTS, Change, ends, smooth

Severity = Literal["serious", "warning", "note"]

# Bounds for the share of rollouts that repeat another of their group, divided by (n - 1) / n.
MANY_DUPLICATES, NEARLY_ALL_DUPLICATES = 0.5, 0.8
# Bounds for the share of groups whose advantages are all zero.
MANY_ZERO_ADVANTAGES, NEARLY_ALL_ZERO_ADVANTAGES = 0.5, 0.95
# Smallest standard deviation of advantages; rewards are of order 1.
NO_SPREAD = 1e-3
# Rise of the cross-entropy above its best value, in nats per token.
RISE_OF_CROSS_ENTROPY, STEEP_RISE_OF_CROSS_ENTROPY = 0.2, 1.0
# Entropy in nats per token at the sampling temperature, and as a share of its first value.
HARDLY_ANY_ENTROPY, SMALL_SHARE_OF_ENTROPY = 0.1, 0.4
FALL_OF_ALIGNMENT = 0.05
RISE_OF_CFM_LOSS = RISE_OF_ENERGY_SCORE = 0.02
GROWTH_OF_GRADIENT = 10.0
LARGE_KL = 1.0  # nats per token
MOST_OF_THE_TIME = 0.7
MANY_DOCUMENTS_WITHOUT_BLOCKS = 0.2
# Diversity below this throughout a run is that of whitened, distinct rollouts.
NO_DIVERSITY = 0.02


@dataclass(frozen=True)
class Finding:
    """An observation about a run, with advice.

    Attributes:
        severity: "serious": the run is not learning what it should; "warning": it may not be;
            "note": normal, but good to know.
        title: a few words.
        evidence: the observed metrics.
        advice: what to change.
    """

    severity: Severity
    title: str
    evidence: str
    advice: str


Rule = Callable[[Run], Finding | None]


def examine(run: Run) -> list[Finding]:
    """The findings of all rules, the most serious first."""
    return by_severity(rule(run) for rule in RULES)


def by_severity(found: Iterable[Finding | None]) -> list[Finding]:
    """The findings that are not None, the most serious first."""
    order: list[Severity] = ["serious", "warning", "note"]
    return sorted(filter(None, found), key=lambda finding: order.index(finding.severity))


def no_ebft_metrics(run: Run) -> Finding | None:
    """The log has no EBFT metrics."""
    if any(name.startswith("ebft/") for name in run.series):
        return None
    return Finding(
        "note",
        "No EBFT metrics",
        "The log has no ebft/* metrics, so most rules cannot be applied.",
        "Was this run trained by EBFTTrainer? If logging_steps is too large, nothing may have been "
        "logged yet.",
    )


def few_points(run: Run) -> Finding | None:
    """Too little was logged to judge trends."""
    count = max((len(s) for name, s in run.series.items() if name.startswith("ebft/")), default=0)
    if count == 0 or count >= FEWEST_POINTS:
        return None
    return Finding(
        "note",
        "Too few points for trends",
        f"The log has {count} points; trends are judged from {FEWEST_POINTS} on.",
        "Lower logging_steps, or train for longer.",
    )


def not_finite(run: Run) -> Finding | None:
    """NaN or infinite metrics."""
    bad: dict[str, list[int]] = {}
    for name, series in run.series.items():
        for step, value in zip(series.steps, series.values, strict=True):
            if not math.isfinite(value):
                bad.setdefault(name, []).append(step)
    if not bad:
        return None
    listed = "; ".join(
        f"{name} at step {', '.join(map(str, steps[:5]))}{' ...' if len(steps) > 5 else ''}"
        for name, steps in list(bad.items())[:4]
    )
    return Finding(
        "serious",
        "Metrics that are not finite",
        f"{listed}.",
        "Lower learning_rate, raise warmup_steps or set max_grad_norm; with fp16, train in bf16. "
        "Resume from a checkpoint before the first such step.",
    )


def duplicate_rollouts(run: Run) -> Finding | None:
    """Rollouts of a group repeat each other."""
    change = _ends(run, "ebft/duplicate_rollouts")
    if change is None or not _trains_on_rewards(run):
        return None
    n_samples, temperature = (
        run.arguments.get(name) for name in ("n_samples_per_prompt", "temperature")
    )
    return repeated_rollouts(change.last, n_samples, temperature)


def repeated_rollouts(
    share: float, n_samples: int | None, temperature: float | None
) -> Finding | None:
    """A finding about a share of rollouts that repeat an earlier one of their group, or None."""
    most = (n_samples - 1) / n_samples if n_samples and n_samples > 1 else 1.0
    if share < MANY_DUPLICATES * most:
        return None
    now = f" (now {temperature:g})" if temperature else ""
    return Finding(
        "serious" if share >= NEARLY_ALL_DUPLICATES * most else "warning",
        "Rollouts repeat each other",
        f"{share:.0%} of the rollouts equal an earlier one of their group"
        + (f"; in groups of {n_samples}, at most {most:.0%} can." if n_samples else "."),
        f"Raise temperature{now}, or generate_max_len. If the share grew during the run, look at "
        "the entropy: lower learning_rate or raise ce_coef.",
    )


def zero_advantages(run: Run) -> Finding | None:
    """Groups give no gradient, since their rollouts all have the same reward."""
    if not _trains_on_rewards(run):
        return None
    idle, spread = _ends(run, "ebft/zero_advantage_groups"), _ends(run, "ebft/advantages_std")
    return few_advantages(
        None if idle is None else idle.last, None if spread is None else spread.last
    )


def few_advantages(idle: float | None, spread: float | None = None) -> Finding | None:
    """A finding about groups without advantage, or None.

    Args:
        idle: share of the groups whose advantages are all zero.
        spread: standard deviation of advantages.
    """
    no_spread = spread is not None and spread < NO_SPREAD
    many = idle is not None and idle >= MANY_ZERO_ADVANTAGES
    if not no_spread and not many:
        return None
    nearly_all = no_spread or (idle is not None and idle >= NEARLY_ALL_ZERO_ADVANTAGES)
    evidence = [f"{idle:.0%} of the groups have no advantage" if idle is not None else ""]
    evidence.append(f"the standard deviation is {spread:.2g}" if spread is not None else "")
    return Finding(
        "serious" if nearly_all else "warning",
        "Hardly any advantages",
        f"{'; '.join(part for part in evidence if part)}.",
        "Such groups give no gradient. Raise temperature or n_samples_per_prompt. If rollouts "
        "differ but advantages do not, look at feature_layers and embed_method.",
    )


def diverging_cross_entropy(run: Run) -> Finding | None:
    """The text itself becomes less likely under the policy."""
    for name in ("eval_loss", "eval_ebft/ce_loss", "ebft/ce_loss"):
        series = run.series.get(name)
        if series is None or len(series.finite()) < 2:
            continue
        finite, change = series.finite(), ends(series)
        best = min(value for value in smooth(finite.values))
        noise = 0.0 if math.isnan(change.noise) else 2 * change.noise
        rise = change.last - best
        if rise <= max(RISE_OF_CROSS_ENTROPY, noise):
            return None
        where = "held-out text" if name.startswith("eval_") else "the training text"
        return Finding(
            "serious" if rise > STEEP_RISE_OF_CROSS_ENTROPY else "warning",
            "The cross-entropy rises",
            f"On {where} it is {change.last:.3g} nats per token, {rise:.2g} above its best value "
            f"(perplexity times {math.exp(min(rise, 50.0)):.3g}). The CFM loss may still fall: a "
            "sharper policy lowers it.",
            "Raise ce_coef (the paper tries 0.03 and 0.1) or kl_coef, lower learning_rate, or use "
            "more documents per step. Per-group whitening raises it more than "
            "use_whitening=false does in small runs.",
        )
    return None


def collapsed_entropy(run: Run) -> Finding | None:
    """The policy has become almost deterministic."""
    change = _ends(run, "ebft/entropy")
    if change is None or not _trains_on_rewards(run):
        return None
    fell = change.first > 0 and change.last < SMALL_SHARE_OF_ENTROPY * change.first
    # The entropy of predictable text also falls by learning: then the CFM loss falls, and the
    # cross-entropy does not rise. (Sharpening alone lowers the first and raises the second.)
    cfm_loss = _ends(run, "ebft/cfm_loss")
    learning = (
        cfm_loss is not None
        and cfm_loss.verdict(METRIC_BY_NAME["ebft/cfm_loss"]) == "better"
        and diverging_cross_entropy(run) is None
    )
    if change.last >= HARDLY_ANY_ENTROPY and (not fell or learning):
        return None
    return Finding(
        "serious" if change.last < HARDLY_ANY_ENTROPY else "warning",
        "The entropy has collapsed",
        f"The entropy of rollouts is {change.last:.2g} nats per token; it was {change.first:.2g} "
        "at the start.",
        "If it was low from the start, raise temperature. If it fell: lower learning_rate, raise "
        "ce_coef, diversity_coef or n_samples_per_prompt, or set use_whitening=false (whitened "
        "rollouts have no diversity term until they repeat).",
    )


def falling_alignment(run: Run) -> Finding | None:
    """The alignment of rollouts with the truth falls."""
    change = _ends(run, "ebft/alignment")
    if change is None or not _trains_on_rewards(run):
        return None
    if change.difference > -FALL_OF_ALIGNMENT or not change.beyond_noise:
        return None
    return Finding(
        "warning",
        "Alignment falls",
        f"From {change.first:.3g} to {change.last:.3g}.",
        "The policy gradient does not improve the reward: lower learning_rate, use more documents "
        "per step or more n_samples_per_prompt. Check alignment_coef against diversity_coef.",
    )


def rising_cfm_loss(run: Run) -> Finding | None:
    """The CFM loss rises."""
    change = _ends(run, "ebft/cfm_loss")
    if change is None or not _trains_on_rewards(run):
        return None
    if change.difference < RISE_OF_CFM_LOSS or not change.beyond_noise:
        return None
    return Finding(
        "warning",
        "The CFM loss rises",
        f"From {change.first:.3g} to {change.last:.3g}.",
        "Lower learning_rate or use more documents per step. With whitening the reward is not the "
        "gradient of this loss: compare use_whitening=false or whitening_space=corpus.",
    )


def only_sharper(run: Run) -> Finding | None:
    """The proper score of the features becomes worse while the CFM loss does not."""
    change, cfm_loss = _ends(run, "ebft/energy_score"), _ends(run, "ebft/cfm_loss")
    if change is None or cfm_loss is None or not _trains_on_rewards(run):
        return None
    if change.difference < RISE_OF_ENERGY_SCORE or not change.beyond_noise:
        return None
    if cfm_loss.difference >= RISE_OF_CFM_LOSS:
        return None  # rising_cfm_loss reports this
    return Finding(
        "warning",
        "The policy only becomes sharper",
        f"The energy score went from {change.first:.3g} to {change.last:.3g}, the CFM loss from "
        f"{cfm_loss.first:.3g} to {cfm_loss.last:.3g}.",
        "Rollouts lose variety that the truth has: raise ce_coef or diversity_coef, lower "
        "learning_rate, or set use_whitening=false.",
    )


def growing_gradient(run: Run) -> Finding | None:
    """The gradient's norm grows by orders of magnitude."""
    change = _ends(run, "grad_norm")
    if change is None or change.first <= 0 or change.last < GROWTH_OF_GRADIENT * change.first:
        return None
    return Finding(
        "warning",
        "The gradient grows",
        f"Its norm went from {change.first:.3g} to {change.last:.3g} (before clipping).",
        "Lower learning_rate; keep max_grad_norm at 1 or below.",
    )


def large_kl(run: Run) -> Finding | None:
    """The policy is far from where it started, in spite of a penalty."""
    change = _ends(run, "ebft/kl")
    if change is None or change.last < LARGE_KL:
        return None
    return Finding(
        "warning",
        "Far from the reference",
        f"The KL divergence to the feature network is {change.last:.3g} nats per token.",
        "Raise kl_coef or lower learning_rate.",
    )


def rollouts_take_the_time(run: Run) -> Finding | None:
    """Sampling is most of a step."""
    spent = [_ends(run, name) for name in PHASES]
    if any(change is None for change in spent):
        return None
    seconds = [change.last for change in spent if change is not None]
    share = seconds[0] / sum(seconds) if sum(seconds) > 0 else 0.0
    if share < MOST_OF_THE_TIME:
        return None
    return Finding(
        "note",
        "Sampling takes most of the time",
        f"{share:.0%} of a micro-batch ({seconds[0]:.2g} of {sum(seconds):.2g} s).",
        "Each token of a rollout costs a forward pass, whatever the number of blocks: lower "
        "generate_max_len, or raise per_device_train_batch_size, so that a pass does more. Under "
        "FSDP2, set gather_params_for_sampling=true.",
    )


def documents_without_blocks(run: Run) -> Finding | None:
    """Many documents are too short for a rollout."""
    change = _ends(run, "ebft/documents_without_blocks")
    return None if change is None else too_short_documents(change.last)


def too_short_documents(share: float) -> Finding | None:
    """A finding about a share of documents without blocks, or None."""
    if share < MANY_DOCUMENTS_WITHOUT_BLOCKS:
        return None
    return Finding(
        "warning",
        "Documents without blocks",
        f"{share:.0%} of the documents are too short for a rollout.",
        "Only the cross-entropy trains on them (nothing with ce_coef=0). Lower context_length, "
        "min_completion_prefix or generate_max_len, or leave such documents out.",
    )


def no_diversity_term(run: Run) -> Finding | None:
    """Whitening per group makes the diversity term a constant zero."""
    series = run.series.get("ebft/diversity")
    settings = run.arguments
    whitens = settings.get("use_whitening") and settings.get("whitening_space") != "corpus"
    if series is None or not whitens or not settings.get("diversity_coef"):
        return None
    values = series.finite().values
    if not values or max(map(abs, values)) > NO_DIVERSITY:
        return None
    return Finding(
        "note",
        "The diversity term is zero throughout",
        f"At most {max(map(abs, values)):.2g}: whitened rollouts that differ are orthonormal.",
        "This is normal with per-group whitening: only alignment is rewarded. To reward diversity "
        "as well, compare use_whitening=false or whitening_space=corpus.",
    )


RULES: tuple[Rule, ...] = (
    no_ebft_metrics,
    few_points,
    not_finite,
    duplicate_rollouts,
    zero_advantages,
    diverging_cross_entropy,
    collapsed_entropy,
    falling_alignment,
    rising_cfm_loss,
    only_sharper,
    growing_gradient,
    large_kl,
    rollouts_take_the_time,
    documents_without_blocks,
    no_diversity_term,
)


def _ends(run: Run, name: str) -> Change | None:
    series = run.series.get(name)
    return None if series is None or not len(series.finite()) else ends(series)


def _trains_on_rewards(run: Run) -> bool:
    weights = (run.arguments.get("rl_coef", 1.0), run.arguments.get("rl_coef_final"))
    return any(weights)
