"""`hf-ebft evaluate`: measure one or several models on held-out text, side by side.

    hf-ebft evaluate --models out/ebft                               # on text that Python carries
    hf-ebft evaluate --models base=M sft=out/sft ebft=out/ebft \\
        --dataset_name_or_path held_out.jsonl --output_dir evaluation
    hf-ebft evaluate --help                                          # every option

It measures cross-entropy and perplexity of the text (and of completions, if there are prompts), and
CFM loss, alignment, diversity, rewards, duplicates and entropy of rollouts of several lengths. All
models continue the same prefixes with the same random numbers. One frozen feature network, by
default the first model, embeds all rollouts. Intervals are by bootstrap over documents; differences
are to the first model, paired by document. Results are written as JSON, Markdown and, with
matplotlib, PNG.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ebft.commands.runs.data import DATA_SEED, is_stdlib, load_split
from hf_ebft.commands.runs.ending import documents_of
from hf_ebft.commands.runs.help import command_help
from hf_ebft.commands.runs.model import read_tokenizer
from hf_ebft.commands.runs.options import STDLIB, DataArguments
from hf_ebft.commands.runs.parsing import OptionParser
from hf_ebft.commands.runs.text import raw_text, tokenize
from hf_ebft.config import EBFTSettings
from hf_ebft.data import TokenizedRows
from hf_ebft.evaluation import ModelMeasurements, compare_models, measure_model
from hf_ebft.feature_network.loading import naming_option
from hf_ebft.feature_network.network import FeatureNetwork

ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class EvaluationArguments:
    """What to measure, on what, and how."""

    models: list[str] = field(
        metadata={
            "help": "Models as name=path or path: hub names or folders, also of adapters. "
            "Differences are to the first one."
        }
    )
    dataset_name_or_path: str = field(
        default=STDLIB + "topics",
        metadata={"help": "Held-out text, named as for hf-ebft train."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a hub dataset that has several."}
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column with the text. Default: prompt and completion, else text."},
    )
    split: str | None = field(
        default=None,
        metadata={
            "help": "Split to measure on. Default: 'report' for text that comes with Python, else "
            "'train'."
        },
    )
    sequence_len: int = field(default=512, metadata={"help": "Largest number of tokens of a row."})
    rows: int = field(
        default=64, metadata={"help": "Rows to measure, from as many documents as possible."}
    )
    lengths: list[int] = field(
        default_factory=lambda: [8, 16, 32, 64, 128, 256],
        metadata={"help": "Lengths of the rollouts in tokens, ascending."},
    )
    stride: int = field(
        default=64, metadata={"help": "Tokens between the ends of neighbouring prefixes of a row."}
    )
    context_length: int = field(default=8, metadata={"help": "Tokens of the shortest prefix."})
    n_samples: int = field(default=4, metadata={"help": "Rollouts for each prefix."})
    draws: int = field(
        default=1,
        metadata={"help": "Groups of rollouts for each prefix; averaged, for less noise."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    tempered: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Also measure the first model with its logits divided by each of these, such "
            "as 0.9 0.8. This control shows what sharpening alone does to every measurement."
        },
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 truncates nothing."})
    feature_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Feature network that embeds the rollouts of all models. Default: the first "
            "model."
        },
    )
    feature_layers: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 0.75],
        metadata={"help": "Depths whose hidden states make up the features."},
    )
    second_feature_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Second network that embeds the same rollouts, as a control: one that gave no "
            "reward. Default: none, or the feature network if second_feature_layers is set."
        },
    )
    second_feature_layers: list[float] | None = field(
        default=None,
        metadata={"help": "Depths of the second network. Default: those of feature_layers."},
    )
    feature_normalization: Literal["per_layer", "joint"] = field(
        default="per_layer", metadata={"help": "Like the setting of training."}
    )
    embed_method: Literal["last_token", "mean_pooling", "concat"] = field(
        default="last_token",
        metadata={"help": "How the token features of a rollout are pooled into one embedding."},
    )
    whitening: Literal["feature", "sample", "none"] = field(
        default="feature",
        metadata={"help": "Whitening of the metrics 'as rewarded'; others are never whitened."},
    )
    diversity_coef: float = field(
        default=1.0, metadata={"help": "Weight of diversity in the reward."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Data type of the weights."}
    )
    device: str = field(
        default="auto", metadata={"help": "cpu or cuda:1, for example. Default: the accelerator."}
    )
    tokens_at_once: int = field(
        default=4096,
        metadata={"help": "Rollout tokens in one forward pass; bounds the memory."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that comes with a checkpoint."}
    )
    output_dir: str = field(
        default="evaluation", metadata={"help": "Folder of evaluation.json, .md and .png."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the rollouts and the bootstrap."})


def main(argv: Sequence[str]) -> None:
    """Parse, load, measure each model, compare, write."""
    args = parse_arguments(argv)
    models = named_models(args.models)
    device = choose_device(args.device)
    tokenizer = read_tokenizer(
        "models", next(iter(models.values())), trust_remote_code=args.trust_remote_code
    )
    rows = load_rows(args, tokenizer)
    settings = evaluation_settings(args)
    phi_path = args.feature_model_name_or_path or next(iter(models.values()))
    phi_option = "feature_model_name_or_path" if args.feature_model_name_or_path else "models"
    phi = make_network(load_model(phi_path, args, device, phi_option), args.feature_layers, args)
    measure = partial(
        measure_model,
        feature_network=phi,
        rows=rows,
        settings=settings,
        lengths=args.lengths,
        n_draws=args.draws,
        seed=args.seed,
        tokens_at_once=args.tokens_at_once,
        eos_token_id=tokenizer.eos_token_id,
        second_network=second_network(phi, args, device),
    )
    measured: dict[str, ModelMeasurements] = {}
    for name, path in models.items():
        print(f"Measuring {name} ({path}) on {len(rows)} rows ...", flush=True)
        model = load_model(path, args, device)
        require_same_tokenizer(path, tokenizer, args)
        temperatures = args.tempered if not measured else []
        measured[name] = measure(model)
        for temperature in temperatures:
            control = f"{name} at temperature {temperature:g}"
            measured[control] = measure(model, tempered=temperature)
        del model  # free its memory for the next one
        gc.collect()
    documents, by_document = documents_of(rows, next(iter(measured.values())).row)
    comparison = compare_models(
        measured,
        groups=documents if by_document else None,
        seed=args.seed,
        settings=dataclasses.asdict(args) | {"feature_network": phi_path},
    )
    print("\n" + comparison.to_markdown())
    png = importlib.util.find_spec("matplotlib") is not None
    paths = comparison.save(args.output_dir, png=png)
    print(f"Written: {', '.join(map(str, paths))}.")
    if not png:
        print("matplotlib is not installed, so no PNG was drawn.")


def make_network(model: Any, layers: list[float], args: EvaluationArguments) -> FeatureNetwork:
    """A feature network with the pooling and normalisation of the arguments."""
    return FeatureNetwork(
        model,
        feature_layers=layers,
        embed_method=args.embed_method,
        normalization=args.feature_normalization,
    )


def second_network(
    phi: FeatureNetwork, args: EvaluationArguments, device: torch.device
) -> FeatureNetwork | None:
    """Another model, other layers of the first network, or none.

    Raises:
        ValueError: it would be the first network again.
    """
    path, layers = args.second_feature_model_name_or_path, args.second_feature_layers
    if path is None and layers is None:
        return None
    option = "second_feature_model_name_or_path"
    model = phi.model if path is None else load_model(path, args, device, option)
    second = make_network(model, layers or args.feature_layers, args)
    if path is None and second.layer_indices == phi.layer_indices:
        raise ValueError(
            f"second_feature_layers={layers} are the layers of the feature network itself, so both "
            "would measure the same. Choose other layers, such as 1.0, or set "
            "second_feature_model_name_or_path to another model."
        )
    return second


def parse_arguments(argv: Sequence[str]) -> EvaluationArguments:
    """Parse the command line.

    Raises:
        ValueError: an unknown option; the message names the nearest known one.
    """
    parser = _Parser(EvaluationArguments, prog="hf-ebft evaluate")
    parser.refuse_unread(argv)
    (args,) = parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
    return args


class _Parser(OptionParser):
    def format_help(self) -> str:
        about = str(__doc__).split(": ", maxsplit=1)[1].split("\n", maxsplit=1)[0]
        usage = "hf-ebft evaluate --models NAME=PATH ... [--option value ...]"
        return command_help(usage, about.capitalize(), self._actions)


def named_models(models: Sequence[str]) -> dict[str, str]:
    """Names and paths of models given as name=path or path.

    Raises:
        ValueError: two models have the same name.
    """
    named: dict[str, str] = {}
    for text in models:
        name, _, path = text.rpartition("=")
        name = name or Path(path).name
        if name in named:
            raise ValueError(
                f"Two models have the name {name!r}: {named[name]} and {path}; give one of them "
                f"another name, as in other_name={path}."
            )
        named[name] = path
    return named


def choose_device(name: str) -> torch.device:
    """The device to measure on."""
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def evaluation_settings(args: EvaluationArguments) -> EBFTSettings:
    """The settings of rollouts and rewards."""
    whitens = args.whitening != "none"
    several = args.n_samples > 1
    return EBFTSettings(
        stride=args.stride,
        context_length=args.context_length,
        generate_max_len=max(args.lengths),
        n_samples_per_prompt=args.n_samples,
        temperature=args.temperature,
        top_p=args.top_p,
        feature_layers=args.feature_layers,
        feature_normalization=args.feature_normalization,
        embed_method=args.embed_method,
        use_whitening=whitens,
        whitening_space="sample" if args.whitening == "sample" else "feature",
        diversity_coef=args.diversity_coef if several else 0.0,
        advantage_estimator="rloo" if several else "reinforce",
    )


def load_rows(args: EvaluationArguments, tokenizer: Any) -> TokenizedRows:
    """Rows of held-out text, from many documents.

    Rows too short for a block are kept, since their cross-entropy is measured.
    """
    name = args.dataset_name_or_path
    split = args.split or ("report" if is_stdlib(name) else "train")
    data = DataArguments(
        dataset_name_or_path=[name],
        dataset_config_name=args.dataset_config_name,
        text_column=args.text_column,
        sequence_len=args.sequence_len,
        keep_short=True,
    )
    raw = raw_text(load_split(name, split, data), data, tokenizer)
    settings: Any = evaluation_settings(args)
    rows = tokenize(raw, tokenizer, data, settings)
    print(f"Held-out text, {raw.name}: {rows.counts}", flush=True)
    return rows.spread(args.rows, DATA_SEED)


def load_model(
    path: str, args: EvaluationArguments, device: torch.device, option: str = "models"
) -> Any:
    """Load a model, or adapters with their base model. `option` names it, for errors."""
    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": args.trust_remote_code}
    if Path(path, ADAPTER_CONFIG).is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(path, **options).to(device)
    with naming_option(option, path):
        model: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    return model.to(device)


def require_same_tokenizer(path: str, tokenizer: Any, args: EvaluationArguments) -> None:
    """Raise if the model was saved with a tokenizer of another vocabulary.

    Raises:
        ValueError: to that tokenizer, the token ids of the rows are another text.
    """
    if not any(Path(path).glob("tokenizer*")):  # adapters and checkpoints may come without one
        return
    own = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{path} has another vocabulary than the first model, so the two cannot be compared "
            "on the same token ids; measure them in separate runs."
        )
