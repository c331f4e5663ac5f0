"""What is written beside a saved model for people: its card (README.md) and training_args.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import TrainingArguments

from hf_ebft.config import EBFTSettings
from hf_ebft.watching.curves import changes, figure, label_of, metric_of, series_of

if TYPE_CHECKING:
    from peft import PeftModel

CARD_NAME = "README.md"
ARGUMENTS_NAME = "training_args.json"
TAGS = ("ebft", "hf_ebft", "generated_from_trainer")
#: A card with this line in it is replaced by the next save; any other is left alone.
MARK = (
    "<!-- Written by hf_ebft when the model was saved, and again at every save. Delete this line "
    "to keep your edits. -->"
)
PAPER = "https://arxiv.org/abs/2603.12248"
CITATION = """@article{jelassi2026matching,
  title={Matching Features, Not Tokens: Energy-Based Fine-Tuning of Language Models},
  author={Jelassi, Samy and Kwun, Mujin and Zhao, Rosie and Li, Yuanzhi and Fusi, Nicolo and
          Du, Yilun and Kakade, Sham M. and Domingo-Enrich, Carles},
  journal={arXiv preprint arXiv:2603.12248},
  year={2026}
}"""
# Of the two hundred TrainingArguments, those that say what was trained how.
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
PACKAGES = ("hf_ebft", "transformers", "torch", "accelerate", "peft")


@dataclasses.dataclass
class CardOptions:
    """What the trainer cannot know, or what a user wants to say otherwise.

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
        """These, with what ``new`` says instead where it says something."""
        said = {name: value for name, value in vars(new).items() if value is not None}
        return dataclasses.replace(self, **said)


def may_write_card(folder: Path) -> bool:
    """Whether there is no card in the folder, or one that we wrote and nobody claimed."""
    path = folder / CARD_NAME
    return not path.exists() or MARK in path.read_text(encoding="utf-8")


def write_card(
    folder: Path,
    model: nn.Module,
    settings: EBFTSettings,
    args: TrainingArguments,
    log_history: Sequence[Mapping[str, Any]],
    options: CardOptions,
    train_dataset: Any = None,
) -> None:
    """Write the card of a model into its folder, which exists, over whatever card is there.

    Args:
        folder: of the model.
        model: not wrapped; of a PEFT model, PEFT adds what it has to say.
        settings: of EBFT.
        args: of the trainer.
        log_history: of its state; both ends of its curves go into the card.
        options: what the trainer does not know.
        train_dataset: for its name, if it is a `datasets.Dataset` with one.
    """
    from peft import PeftModel

    base_model = options.finetuned_from or hub_name(model)
    datasets = _listed(options.dataset_tags)
    data = ModelCardData(
        language=options.language,
        license=options.license,
        base_model=base_model,
        datasets=datasets or None,
        tags=sorted({*TAGS, *_listed(options.tags)}),
        library_name="transformers",
        pipeline_tag=next(iter(_listed(options.tasks)), "text-generation"),
    )
    text = "\n\n".join(
        [
            MARK,
            f"# {options.model_name or Path(str(args.output_dir)).resolve().name}",
            _introduction(model, base_model, _dataset_names(options, train_dataset)),
            _method(settings, isinstance(model, PeftModel)),
            _results(log_history),
            "## Training procedure",
            _settings_table(settings),
            _arguments_list(args),
            "### Framework versions",
            "\n".join(f"- {name} {version(name)}" for name in PACKAGES),
            f"## Citation\n\n```bibtex\n{CITATION}\n```",
        ]
    )
    path = folder / CARD_NAME
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    card.save(path)
    if isinstance(model, PeftModel):
        _let_peft_add(path, model, data)


def write_arguments(folder: Path, settings: EBFTSettings, args: TrainingArguments) -> None:
    """Write every argument as JSON: what training_args.bin holds, for people and for reports.

    Tokens are left out, as `TrainingArguments.to_dict` does.
    """
    values = args.to_dict() | dataclasses.asdict(_only_settings(settings))
    (folder / ARGUMENTS_NAME).write_text(
        json.dumps(values, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )


def hub_name(model: Any) -> str | None:
    """The name on the hub of what the model was loaded from; None for a folder or a new model."""
    name = str(model.config.name_or_path)
    return None if not name or Path(name).is_dir() or name.startswith((".", "/")) else name


def _let_peft_add(path: Path, model: PeftModel, ours: ModelCardData) -> None:
    """What PEFT puts into a card: library, base model, its version, quantization."""
    model.create_or_update_model_card(str(path.parent))
    card = ModelCard.load(path)
    card.data["tags"] = sorted({*(ours.tags or []), *(card.data.get("tags") or [])})
    # Of a model that does not come from the hub PEFT names the folder, which the hub refuses.
    card.data["base_model"] = ours.base_model
    card.save(path)


def _introduction(model: Any, base_model: str | None, datasets: list[str]) -> str:
    local = Path(str(model.config.name_or_path)).name
    if base_model is not None:
        origin = f"a fine-tuned version of [{base_model}](https://huggingface.co/{base_model})"
    elif local:
        origin = f"a fine-tuned version of a local model (`{local}`)"
    else:
        origin = "a language model, trained from the weights it was given"
    text = f" on {', '.join(f'`{name}`' for name in datasets)}" if datasets else ""
    return (
        f"This is {origin}{text}. It was trained by Energy-Based Fine-Tuning "
        f"([EBFT]({PAPER})) with hf_ebft."
    )


def _method(settings: EBFTSettings, adapters: bool) -> str:
    network = (
        f"`{settings.feature_model_name_or_path}`, frozen"
        if settings.feature_model_name_or_path
        else "a frozen copy of the model as it was before training"
    )
    sentences = [
        f"From many places of each document the model wrote {settings.n_samples_per_prompt} "
        f"continuations of {settings.generate_max_len} tokens.",
        f"They were rewarded for having features like the true continuation's and unlike each "
        f"other's, in the hidden states of {network}.",
        "The policy gradient of these rewards is the training signal"
        + (
            f", with the cross-entropy on the text added at weight {settings.ce_coef:g}."
            if settings.ce_coef > 0
            else ", without a cross-entropy term."
        ),
    ]
    if adapters:
        sentences.append("Only adapters were trained.")
    return "## Method\n\n" + " ".join(sentences)


def _results(log_history: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for name, change in changes(series_of(log_history)).items():
        verdict = change.verdict(metric_of(name)) or ""
        cells = [label_of(name), f"`{name}`", figure(change.first), figure(change.last), verdict]
        rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return "## Results\n\nThe run logged too little to tell."
    return "\n".join(
        [
            "## Results",
            "",
            "Means over the first and the last fifth of what the run logged. A change counts from "
            "two standard errors on, judged by how much neighbouring points differ; one run says "
            "nothing about other seeds.",
            "",
            "| figure | logged as | first | last | |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def _settings_table(settings: EBFTSettings) -> str:
    head = [
        "Settings of EBFT (bold where not the default):",
        "",
        "| setting | value |",
        "|---|---|",
    ]
    rows = []
    for name, default in dataclasses.asdict(EBFTSettings()).items():
        value = getattr(settings, name)
        shown = f"`{value}`" if value == default else f"**`{value}`**"
        rows.append(f"| `{name}` | {shown} |")
    return "\n".join([*head, *rows])


def _arguments_list(args: TrainingArguments) -> str:
    values = args.to_dict() | {"world_size": args.world_size}
    names = [*ARGUMENTS, "max_steps" if args.max_steps > 0 else "num_train_epochs"]
    return "Training arguments:\n\n" + "\n".join(f"- {name}: {values[name]}" for name in names)


def _dataset_names(options: CardOptions, dataset: Any) -> list[str]:
    named = _listed(options.dataset) or _listed(options.dataset_tags)
    if named:
        return named
    info = getattr(dataset, "info", None)  # of a datasets.Dataset
    name = getattr(info, "dataset_name", None)
    # What `datasets` calls a file that it reads is no dataset's name.
    return [name] if name and name not in ("csv", "json", "parquet", "text", "generator") else []


def _only_settings(settings: EBFTSettings) -> EBFTSettings:
    names = [field.name for field in dataclasses.fields(EBFTSettings)]
    return EBFTSettings(**{name: getattr(settings, name) for name in names})


def _listed(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
