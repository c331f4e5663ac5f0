"""Judges the measurements of a preflight, and says what to change.

Each rule is a function of a preflight, like the rules for a run (`hf_ebft.report.health`): it
returns a finding with its evidence and advice, or None. Where there are intervals, rules use them:
a rule makes no finding that the measured documents cannot support.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from hf_ebft.objective.noise_scale import NoiseScale
from hf_ebft.preflight.ladder import OTHER, RANDOM, RUNGS, TRUTH
from hf_ebft.preflight.result import Preflight
from hf_ebft.report.health import (
    Finding,
    by_severity,
    few_advantages,
    repeated_rollouts,
    too_short_documents,
)

# Bounds for the noise scale divided by the documents of a step: below the first a step is mostly
# signal, above the second it is nearly all noise.
MOSTLY_NOISE, NEARLY_ALL_NOISE = 1.0, 10.0
# An excess below this share of the CFM loss is little.
LITTLE_EXCESS = 0.05
# A fall of the CFM loss by sharpening alone is large above this share of the excess.
MUCH_BY_SHARPENING = 0.25
# Pairwise accuracies: of guessing, and of a reward that is hardly better.
CHANCE, HARDLY_BETTER = 0.5, 0.6
# A step that uses more than this share of the memory hardly fits.
NEARLY_ALL_MEMORY = 0.9
LONG_RUN = 24.0  # hours


Rule = Callable[[Preflight], Finding | None]


def judge(found: Preflight) -> list[Finding]:
    """The findings of all rules, the most serious first."""
    return by_severity(rule(found) for rule in RULES)


def no_signal(found: Preflight) -> Finding | None:
    """The EBFT gradient cannot be distinguished from zero with the measured documents."""
    ebft, unit = found.signal.ebft, found.settings.unit
    if math.isfinite(ebft.high):
        return None
    step, low = found.cost.rows_per_step, at_least(ebft)
    far = low >= NEARLY_ALL_NOISE * step
    # If the lower bound is below a step, there is no evidence that a larger step is needed.
    change = f"{_more_documents(found, low)} " if low > step else ""
    return Finding(
        "serious" if far else "warning",
        "No signal can be seen",
        f"With {found.signal.rows} {unit} the EBFT gradient cannot be distinguished from zero: "
        f"signal equals noise at {low:,.0f} {unit} per step or more; yours has {step:,}.",
        f"{change}For a more accurate number, measure more {unit} (--documents).",
    )


def mostly_noise(found: Preflight) -> Finding | None:
    """A step has far fewer documents than its signal needs."""
    ebft, unit = found.signal.ebft, found.settings.unit
    step = found.cost.rows_per_step
    if not math.isfinite(ebft.high) or ebft.documents < MOSTLY_NOISE * step:
        return None
    return Finding(
        "serious" if ebft.low >= NEARLY_ALL_NOISE * step else "warning",
        "Steps are mostly noise",
        f"Signal equals noise at {ebft.documents:,.0f} {unit} per step "
        f"[{ebft.low:,.0f}, {ebft.high:,.0f}]; yours has {step:,}. So a step makes "
        f"{100 * step / (step + ebft.documents):.2g} % of the progress of a step without noise: "
        f"expect no progress before about {_steps_for_one(ebft.documents, step):,} steps.",
        _more_documents(found, ebft.documents),
    )


def enough_signal(found: Preflight) -> Finding | None:
    """The batch is large enough."""
    ebft, unit = found.signal.ebft, found.settings.unit
    step = found.cost.rows_per_step
    if ebft.documents >= MOSTLY_NOISE * step or not math.isfinite(ebft.high):
        return None
    return Finding(
        "note",
        "Steps are mostly signal",
        f"Signal equals noise at {ebft.documents:,.0f} {unit} per step "
        f"[{ebft.low:,.0f}, {ebft.high:,.0f}]; yours has {step:,}.",
        f"Far more {unit} per step would be wasted: take more steps instead. The number grows "
        "while the model learns.",
    )


def cross_entropy_first(found: Preflight) -> Finding | None:
    """The cross-entropy still has far more signal than EBFT."""
    ebft, text = found.signal.ebft, found.signal.cross_entropy
    if not math.isfinite(text.high) or at_least(ebft) < NEARLY_ALL_NOISE * text.high:
        return None
    unit = found.settings.unit
    return Finding(
        "note",
        "Cross-entropy has more signal",
        f"Its signal equals its noise at {text.documents:,.0f} {unit} per step "
        f"[{text.low:,.0f}, {text.high:,.0f}]; EBFT needs {at_least(ebft):,.0f} or more.",
        "Fine-tune with cross-entropy (SFT) until its loss stops falling, then start EBFT from "
        "that model. Until then, SFT learns the same text at a lower cost.",
    )


def opposed(found: Preflight) -> Finding | None:
    """The EBFT gradient makes the text less likely."""
    cosine = found.signal.cosine
    if not cosine.high < 0:  # NaN: unknown
        return None
    return Finding(
        "warning",
        "EBFT and cross-entropy have opposite gradients",
        f"The cosine of the two gradients is {cosine.value:.2f} "
        f"[{cosine.low:.2f}, {cosine.high:.2f}].",
        "The text becomes less likely when the reward rises. Set ce_coef (the paper tries 0.03 and "
        "0.1), and compare use_whitening=false, whose reward is the gradient of the CFM loss.",
    )


def no_headroom(found: Preflight) -> Finding | None:
    """The CFM loss consists almost entirely of the model's own spread."""
    at = found.headroom.lengths[0]
    if at.excess.high >= LITTLE_EXCESS * at.cfm_loss.mean:
        return None
    return Finding(
        "note",
        "The CFM loss shows no headroom at this length",
        f"The CFM loss at {at.length} tokens is {at.cfm_loss.mean:.3f}, of which "
        f"{at.excess.mean:.3f} [{at.excess.low:.3f}, {at.excess.high:.3f}] is beyond the model's "
        "own spread.",
        "This is 0 if the model writes like the text, and below 0 if its rollouts vary more. The "
        "CFM loss can then fall simply by a narrower spread. Judge the run by the energy score and "
        "the cross-entropy. " + _longer(found),
    )


def sharpening(found: Preflight) -> Finding | None:
    """A lower temperature alone lowers the CFM loss."""
    at = found.headroom.lengths[0]
    cfm_loss, energy = at.sharpened["cfm_loss"], at.sharpened["energy_score"]
    if not (cfm_loss.high < 0 and -cfm_loss.difference >= MUCH_BY_SHARPENING * at.excess.mean):
        return None
    headroom = found.headroom
    return Finding(
        "note",
        "Sharpening alone lowers the CFM loss",
        f"At temperature {headroom.control_temperature:.2g} instead of {headroom.temperature:g}, "
        f"the untrained model has a CFM loss of {cfm_loss.after:.3f} instead of "
        f"{cfm_loss.before:.3f} ({cfm_loss.difference:+.3f}), and an energy score of "
        f"{energy.after:.3f} instead of {energy.before:.3f}.",
        "So a fall of this size in training is no evidence of learning. Judge the run by the "
        "energy score and the cross-entropy.",
    )


def blind_reward(found: Preflight) -> Finding | None:
    """The reward does not prefer better continuations."""
    checks = [(TRUTH, worse) for worse in RUNGS[1:]]
    worst = min(checks, key=lambda pair: found.rewards.accuracy(*pair).mean)
    accuracy = found.rewards.accuracy(*worst)
    if accuracy.mean >= HARDLY_BETTER:
        return None
    return Finding(
        "serious" if accuracy.low <= CHANCE else "warning",
        "The reward does not distinguish better from worse",
        f"It prefers {worst[0]} to {worst[1]} in {accuracy.mean:.0%} of the groups "
        f"[{accuracy.low:.0%}, {accuracy.high:.0%}]; chance is 50%.",
        "Compare embed_method=mean_pooling, other feature_layers, use_whitening=false or a better "
        "feature network (feature_model_name_or_path). " + _longer(found),
    )


def no_better_than_other_text(found: Preflight) -> Finding | None:
    """Rollouts are rewarded no more than unrelated text."""
    worst = min((OTHER, RANDOM), key=lambda worse: found.rewards.accuracy(RUNGS[2], worse).mean)
    accuracy = found.rewards.accuracy(RUNGS[2], worst)
    if accuracy.low > CHANCE:
        return None
    alignments = found.rewards.alignments
    return Finding(
        "note",
        f"Rollouts get no more reward than {worst}",
        f"A rollout is rewarded more in {accuracy.mean:.0%} of the groups [{accuracy.low:.0%}, "
        f"{accuracy.high:.0%}]; its mean alignment is {alignments[RUNGS[2]].mean:.2f}, against "
        f"{alignments[worst].mean:.2f}.",
        "This is normal if the CFM loss shows no headroom: the diversity term then cancels "
        "alignment on average, and the signal is within groups only. If the alignments are equal, "
        "too, try other feature_layers and embed_method, or fine-tune on this kind of text with "
        "SFT first.",
    )


def duplicates(found: Preflight) -> Finding | None:
    """Rollouts of a group repeat each other."""
    settings = found.settings
    return repeated_rollouts(
        found.rewards.duplicates, settings.n_samples_per_prompt, settings.temperature
    )


def idle_groups(found: Preflight) -> Finding | None:
    """Groups have no advantages."""
    return few_advantages(found.rewards.zero_advantages)


def short_documents(found: Preflight) -> Finding | None:
    """Many documents are too short."""
    return too_short_documents(found.rewards.without_blocks)


def memory(found: Preflight) -> Finding | None:
    """A step does not fit into memory, or hardly fits."""
    cost = found.cost
    share = cost.memory / cost.memory_there
    if cost.fits and share < NEARLY_ALL_MEMORY:
        return None
    used = f"{_gigabytes(cost.memory)} of {_gigabytes(cost.memory_there)} ({cost.memory_of})"
    return Finding(
        "warning" if cost.fits else "serious",
        "A step hardly fits into memory" if cost.fits else "A step does not fit into memory",
        f"It used {used}{'' if cost.fits else ' when memory ran out'}.",
        "Set rollout_batch_size (rows processed at once, with the same gradient), then lower "
        "training_chunk_size or set gradient_checkpointing, or train adapters (use_peft).",
    )


def long_run(found: Preflight) -> Finding | None:
    """The run takes days."""
    hours = found.cost.hours
    if hours is None or not hours >= LONG_RUN:
        return None
    return Finding(
        "note",
        "A long run",
        f"{found.cost.steps:,} steps of {found.cost.seconds:.3g} s take {hours:,.0f} hours on "
        f"{found.cost.processes} process(es).",
        "Set max_steps to what you can afford, set save_steps so that the run can be resumed, and "
        "look at hf-ebft report early.",
    )


RULES: tuple[Rule, ...] = (
    no_signal,
    mostly_noise,
    enough_signal,
    cross_entropy_first,
    opposed,
    no_headroom,
    sharpening,
    blind_reward,
    no_better_than_other_text,
    duplicates,
    idle_groups,
    short_documents,
    memory,
    long_run,
)


def at_least(scale: NoiseScale) -> float:
    """The estimated noise scale, or its lower bound if the interval has no upper bound."""
    return scale.documents if math.isfinite(scale.high) else scale.low


def _steps_for_one(noise_scale: float, step: float) -> int:
    """Number of steps that together make the progress of one step without noise.

    It is 1 + noise scale / documents (McCandlish et al. 2018, eq. 2.7).
    """
    return math.ceil(1 + noise_scale / step)


def _more_documents(found: Preflight, noise_scale: float) -> str:
    """Advice for a step with as much signal as noise: more documents, or other settings."""
    settings = found.settings
    step = found.cost.rows_per_step
    wanted = math.ceil(settings.gradient_accumulation_steps * noise_scale / max(1, step))
    text = (
        f"Raise gradient_accumulation_steps (now {settings.gradient_accumulation_steps}; "
        f"{wanted:,} would have as much signal as noise"
    )
    if math.isfinite(found.cost.seconds):
        hours = found.cost.seconds * noise_scale / max(1, step) / 3600
        text += f", at about {_duration(hours)} per step"
    text += (
        f") or n_samples_per_prompt (now {settings.n_samples_per_prompt}; the noise of rollouts "
        "falls like 1 / n)"
    )
    if settings.ce_coef == 0:
        text += ", or add the signal of the cross-entropy by ce_coef (0.1)"
    return text + "."


def _longer(found: Preflight) -> str:
    """Advice about longer rollouts: whether they have more excess."""
    lengths = found.headroom.lengths
    best = max(lengths, key=lambda at: at.excess.mean)
    if best is lengths[0] or best.excess.low <= 0:
        return "None of the longer rollouts that were measured is better."
    return (
        f"Longer rollouts have more headroom: at {best.length} tokens the excess is "
        f"{best.excess.mean:.3f} (generate_max_len={best.length})."
    )


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def _duration(hours: float) -> str:
    seconds = 3600 * hours
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} minutes" if seconds < 7200 else f"{hours:.3g} hours"
