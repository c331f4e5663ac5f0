"""Writes the model card (README.md) and training_args.json beside a saved model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from transformers import TrainingArguments

from hf_ebft.config import EBFTSettings
from hf_ebft.training.metric_table import label_of, metric_of
from hf_ebft.version import __version__
from hf_ebft.watching.curves import Series, changes, format_number, series_of, smooth
from hf_ebft.watching.tensorboard import ShownGroup, visible

if TYPE_CHECKING:
    from peft import PeftModel

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

CARD_NAME = "README.md"
ARGUMENTS_NAME = "training_args.json"
TAGS = ("ebft", "hf_ebft", "generated_from_trainer")
#: A card that contains this line is replaced at the next save; others are not changed.
MARK = (
    "<!-- Written by hf_ebft when the model was saved, and again at every save. Delete this line "
    "to keep your edits. -->"
)
PAPER = "https://arxiv.org/abs/2603.12248"
TITLE = "Matching Features, Not Tokens: Energy-Based Fine-Tuning of Language Models"
CITATION = """@article{jelassi2026matching,
  title={Matching Features, Not Tokens: Energy-Based Fine-Tuning of Language Models},
  author={Jelassi, Samy and Kwun, Mujin and Zhao, Rosie and Li, Yuanzhi and Fusi, Nicolo and
          Du, Yilun and Kakade, Sham M. and Domingo-Enrich, Carles},
  journal={arXiv preprint arXiv:2603.12248},
  year={2026}
}"""
# The most important of the two hundred TrainingArguments.
ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "max_grad_norm",
    "weight_decay",
    "optim",
    "seed",
    "bf16",
    "fp16",
    "gradient_checkpointing",
)
PACKAGES = ("transformers", "torch", "accelerate", "peft")
# Entries of the model index, from the last evaluation: logged name and the index's metric type.
INDEXED = {
    "eval_loss": "cross_entropy",
    "eval_ebft/cfm_loss": "cfm_loss",
    "eval_ebft/alignment": "alignment",
}
# Characters for the points of a curve in the card, from low to high.
LEVELS = "▁▂▃▄▅▆▇█"
CURVE_POINTS = 24


@dataclasses.dataclass
class CardOptions:
    """Information that the trainer does not know, or that the user wants to replace.

    The fields are the arguments of `Trainer.create_model_card`.
    """

    language: str | None = None
    license: str | None = None
    tags: str | list[str] | None = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: str | list[str] | None = None
    dataset_tags: str | list[str] | None = None
    dataset: str | list[str] | None = None
    dataset_args: str | list[str] | None = None

    def updated(self, new: CardOptions) -> CardOptions:
        """A copy in which values that `new` sets replace these."""
        said = {name: value for name, value in vars(new).items() if value is not None}
        return dataclasses.replace(self, **said)


def may_write_card(folder: Path) -> bool:
    """Whether the folder has no card, or one that we wrote and that still has our mark."""
    path = folder / CARD_NAME
    try:
        return MARK in path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):  # not written by us
        return False


def write_card(
    folder: Path,
    model: nn.Module,
    settings: EBFTSettings,
    args: TrainingArguments,
    log_history: Sequence[Mapping[str, Any]],
    options: CardOptions,
    train_dataset: Any = None,
    samples: Sequence[ShownGroup] = (),
) -> None:
    """Write the card of a model into its folder, which must exist, and replace an existing card.

    Args:
        folder: folder of the model.
        model: the unwrapped model; PEFT adds its own information for a PEFT model.
        settings: EBFT's settings.
        args: the training arguments.
        log_history: the log; first and last values of its curves are shown in the card.
        options: information that the trainer does not know.
        train_dataset: the training data, for its name if it is a `datasets.Dataset` with one.
        samples: groups of rollouts; the rollout with the highest reward of each is shown.
    """
    from peft import PeftModel

    base_model = options.finetuned_from or hub_name(model)
    adapters = isinstance(model, PeftModel)
    title = options.model_name or Path(str(args.output_dir)).resolve().name
    datasets = _dataset_names(options, train_dataset)
    data = ModelCardData(
        language=options.language,
        license=options.license,
        base_model=base_model,
        datasets=_listed(options.dataset_tags) or None,
        tags=sorted({*TAGS, *_listed(options.tags)}),
        library_name="transformers",
        pipeline_tag=next(iter(_listed(options.tasks)), "text-generation"),
        model_name=title,
        eval_results=_last_evaluation(log_history, datasets, _listed(options.dataset_tags)) or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        mark=MARK,
        title=title,
        model_id=args.hub_model_id or title,
        prompt=_prompt(samples),
        origin=_origin(model, base_model),
        datasets=datasets,
        paper=PAPER,
        settings=settings,
        adapters=adapters,
        results=_results(log_history),
        samples=[_sample(group) for group in samples if group.rollouts],
        setting_rows=_setting_rows(settings),
        arguments=_arguments(args),
        versions=versions(),
        citation=CITATION,
    )
    path = folder / CARD_NAME
    card.save(path)
    if isinstance(model, PeftModel):
        _let_peft_add(path, model, data)


def versions() -> list[tuple[str, str]]:
    """Names and versions of this package and of its main dependencies.

    A package that is on the path but not installed has no version.
    """
    found = [("hf_ebft", __version__)]
    for name in PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, "(not installed as a package)"))
    return found


def sparkline(series: Series) -> str:
    """A smoothed curve as a line of text, from its lowest to its highest value."""
    values = [value for value in smooth(series.values) if math.isfinite(value)]
    count = min(CURVE_POINTS, len(values))
    if count < 2:
        return ""
    shown = [values[round(place * (len(values) - 1) / (count - 1))] for place in range(count)]
    low, high = min(shown), max(shown)
    span = (high - low) or math.inf  # a constant curve is drawn at the bottom
    return "".join(LEVELS[round((value - low) / span * (len(LEVELS) - 1))] for value in shown)


def write_arguments(folder: Path, settings: EBFTSettings, args: TrainingArguments) -> None:
    """Write every argument as JSON: the contents of training_args.bin, readable by people.

    Tokens are left out, as in `TrainingArguments.to_dict`.
    """
    values = args.to_dict() | dataclasses.asdict(_only_settings(settings))
    (folder / ARGUMENTS_NAME).write_text(
        json.dumps(values, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )


def hub_name(model: Any) -> str | None:
    """The hub name of the model that was loaded; None for a folder or a new model."""
    name = str(model.config.name_or_path)
    return None if not name or Path(name).is_dir() or name.startswith((".", "/")) else name


def _let_peft_add(path: Path, model: PeftModel, ours: ModelCardData) -> None:
    """Add PEFT's information to a card: library, base model, its version, quantization."""
    model.create_or_update_model_card(str(path.parent))
    card = ModelCard.load(path)
    card.data["tags"] = sorted({*(ours.tags or []), *(card.data.get("tags") or [])})
    # If the model does not come from the hub, PEFT names the folder, which the hub refuses.
    card.data["base_model"] = ours.base_model
    card.save(path)


def _origin(model: Any, base_model: str | None) -> str:
    local = Path(str(model.config.name_or_path)).name
    if base_model is not None:
        return f"a fine-tuned version of [{base_model}](https://huggingface.co/{base_model})"
    if local:
        return f"a fine-tuned version of a local model (`{local}`)"
    return "a language model, trained from the weights it was given"


def _last_evaluation(
    log_history: Sequence[Mapping[str, Any]], datasets: list[str], tags: list[str]
) -> list[EvalResult]:
    series, results = series_of(log_history), []
    for name, kind in INDEXED.items():
        values = series[name].values if name in series else ()
        if values and math.isfinite(values[-1]):
            results.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Text generation",
                    dataset_type=next(iter(tags), "text"),
                    dataset_name=next(iter(datasets), "held-out text"),
                    metric_type=kind,
                    metric_name=label_of(name),
                    metric_value=values[-1],
                )
            )
    return results


def _results(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    series = series_of(log_history)
    return [
        {
            "label": label_of(name),
            "name": name,
            "first": format_number(change.first),
            "last": format_number(change.last),
            "verdict": change.verdict(metric_of(name)) or "",
            "curve": sparkline(series[name]),
        }
        for name, change in changes(series).items()
    ]


def _prompt(samples: Sequence[ShownGroup]) -> str:
    """A prompt like the text that the model was trained on, as a Python literal."""
    prefixes = [group.prefix for group in samples if group.prefix.strip()]
    text = prefixes[0] if prefixes else "Once upon a time"
    # As JSON, so that no character can end the literal or the code block around it.
    return json.dumps(text).replace("`", "\\u0060")


def _sample(group: ShownGroup) -> dict[str, str]:
    best = max(group.rollouts, key=lambda rollout: rollout.reward)
    texts = {
        "prefix": visible(group.prefix),
        "truth": visible(group.ground_truth),
        "rollout": visible(best.text),
    }
    # Longer than any fence in the texts, so that no text ends the block.
    ticks = max((len(run) for text in texts.values() for run in re.findall("`+", text)), default=0)
    return texts | {"fence": "`" * max(3, ticks + 1)}


def _setting_rows(settings: EBFTSettings) -> list[tuple[str, Any, bool]]:
    return [
        (name, getattr(settings, name), getattr(settings, name) == default)
        for name, default in dataclasses.asdict(EBFTSettings()).items()
    ]


def _arguments(args: TrainingArguments) -> list[tuple[str, Any]]:
    values = args.to_dict() | {"world_size": args.world_size}
    names = [*ARGUMENTS, "max_steps" if args.max_steps > 0 else "num_train_epochs"]
    return [(name, values[name]) for name in names]


def _dataset_names(options: CardOptions, dataset: Any) -> list[str]:
    named = _listed(options.dataset) or _listed(options.dataset_tags)
    if named:
        return named
    info = getattr(dataset, "info", None)  # of a datasets.Dataset
    name = getattr(info, "dataset_name", None)
    # `datasets` gives files that it reads these names, which are not names of data sets.
    return [name] if name and name not in ("csv", "json", "parquet", "text", "generator") else []


def _only_settings(settings: EBFTSettings) -> EBFTSettings:
    names = [field.name for field in dataclasses.fields(EBFTSettings)]
    return EBFTSettings(**{name: getattr(settings, name) for name in names})


def _listed(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
