"""Fine-tune a causal language model by matching features of its rollouts, from the command line.

    accelerate launch examples/run_ebft.py                          # the demo, nothing to fetch
    accelerate launch examples/run_ebft.py --config examples/configs/demo.yaml --max_steps 20
    accelerate launch examples/run_ebft.py --model_name_or_path M --dataset_name_or_path D.jsonl \\
        --sequence_len 1024 --output_dir out --report_to tensorboard
    python examples/run_ebft.py --help                                   # every option

The options are those of the four groups below, of `hf_ebft.EBFTConfig` and of
`transformers.TrainingArguments`. `--config run.yaml` holds the same names; the command line wins.

Held-out text is measured before and after training on the same rows, with the same random numbers
and the same frozen feature network, and the differences come with bootstrap intervals.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import stdlib_text
import torch
import transformers
import yaml
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from hf_ebft import EBFTConfig, EBFTTrainer
from hf_ebft.callbacks import use_compact_progress
from hf_ebft.data import (
    RawDataset,
    TokenizedRows,
    hold_out,
    load_text_dataset,
    tokenize_and_cut,
    tokenize_prompt_completion,
)
from hf_ebft.evaluation import (
    Continuation,
    DocumentFigures,
    compare,
    evaluate_documents,
    format_samples,
    format_table,
    sample_continuations,
)

EXAMPLES = Path(__file__).parent
DEMO_CONFIG = EXAMPLES / "configs" / "demo.yaml"
STDLIB = "stdlib:"
# The data must not depend on --seed, or runs with different seeds could not be compared.
DATA_SEED = 0
# With fewer documents than this behind the measured rows, rows are resampled instead.
FEWEST_DOCUMENTS = 8


@dataclass
class DataArguments:
    """What text to train on."""

    _argument_group_name = "data"

    config: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with any of these options, by the same names. The command line wins."
        },
    )
    dataset_name_or_path: str = field(
        default=STDLIB + "topics",
        metadata={
            "help": "A .txt, .md or .py file, a folder of them, a .jsonl, .json or .parquet file, "
            "a dataset's name on the hub, or 'stdlib:' and a domain of examples/stdlib_text.py: "
            "text that comes with Python."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a hub dataset that has several."}
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the text. Default: 'prompt' with 'completion' if there are both "
            "(only completions are trained on then), else 'text', 'content' or 'code'."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Where the held-out text is. Default: in the training dataset."},
    )
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split with the held-out text. Default: 'report' for 'stdlib:', 'train' of "
            "eval_dataset_name_or_path if that is given, else eval_fraction of train_split."
        },
    )
    eval_fraction: float = field(
        default=0.05,
        metadata={
            "help": "Share of the training documents that is held out where no other held-out text "
            "is named. 0: none, for which report_rows must be 0 too."
        },
    )
    sequence_len: int = field(default=512, metadata={"help": "Most tokens of a row of text."})
    pack: bool = field(
        default=False,
        metadata={
            "help": "Put several short documents into one row for training; they do not see each "
            "other. Held-out text is never packed."
        },
    )
    keep_short: bool = field(
        default=False,
        metadata={
            "help": "Keep pieces of text too short for a block, to train by cross-entropy only "
            "(ce_coef). Default: drop them. Both are counted."
        },
    )
    max_train_rows: int | None = field(
        default=None,
        metadata={"help": "Train on at most so many rows, of documents chosen at random."},
    )
    max_eval_rows: int | None = field(
        default=None,
        metadata={"help": "Hold out at most so many rows, of as many documents as possible."},
    )


@dataclass
class ModelArguments:
    """What model to train."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default=str(EXAMPLES / "tiny_model"),
        metadata={"help": "Model to train: a hub name or a folder. Default: the small one here."},
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a model on the hub."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not with the model."}
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "Name of a GGUF file in the model's folder (needs gguf)."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={
            "help": "Type of the weights; 'auto' is that of the checkpoint. On GPUs, float32 with "
            "--bf16 is mixed precision."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention to load the model with; see packed_attention, too."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that comes with a checkpoint."}
    )


@dataclass
class LoraArguments:
    """Adapters instead of full fine-tuning."""

    _argument_group_name = "LoRA"

    use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters; the model itself stays as it is."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(
        default=32, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the adapters, in the training pass only."}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the modules that get adapters, or 'all-linear'."},
    )
    lora_merge: bool = field(
        default=False,
        metadata={"help": "Save the whole model with the adapters merged in, not the adapters."},
    )


@dataclass
class ReportArguments:
    """What is measured on held-out text before and after training."""

    _argument_group_name = "report"

    report_rows: int = field(
        default=64,
        metadata={"help": "Rows of held-out text to measure, of many documents. 0: no report."},
    )
    report_stride: int | None = field(
        default=None, metadata={"help": "Tokens between blocks there. Default: stride."}
    )
    report_n_samples: int | None = field(
        default=None,
        metadata={
            "help": "Rollouts in a group there. Default: n_samples_per_prompt, with which "
            "alignment as rewarded is on the scale of the training curves."
        },
    )
    report_draws: int = field(
        default=2, metadata={"help": "Groups of rollouts for each block, averaged: less noise."}
    )
    report_samples: int = field(
        default=3, metadata={"help": "How many rollouts to print before and after."}
    )
    report_sample_len: int = field(default=24, metadata={"help": "Tokens of these."})


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, measure, train, measure, save, report."""
    data, names, lora, report, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    check(names, lora, report)
    show_library_log()
    set_seed(args.seed)  # adapters start at random
    tokenizer = load_tokenizer(names, args)
    with args.main_process_first(desc="loading the text"):
        train_rows, eval_rows = load_rows(
            data, tokenizer, args, wants_eval=report.report_rows > 0 or args.do_eval
        )
    trainer = EBFTTrainer(
        model=load_model(names, len(tokenizer)),
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=lora_config(lora),
    )
    use_compact_progress(trainer)

    comparison = Comparison(trainer, tokenizer, eval_rows, report)
    comparison.measure()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    comparison.measure()
    save(trainer, lora, data)
    comparison.show()
    say_where(trainer)


# ---- Options --------------------------------------------------------------------------------


class Parser(HfArgumentParser):
    """Takes whole option names only, and keeps 200 options of usage out of error messages."""

    def __init__(self) -> None:
        groups: Any = (DataArguments, ModelArguments, LoraArguments, ReportArguments, EBFTConfig)
        super().__init__(groups, description=__doc__.split("\n")[0], allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Exit with the message."""
        self.exit(2, f"{self.prog}: error: {message}\n--help explains every option.\n")

    def refuse_unknown(self, names: Iterable[str], where: str) -> None:
        """Exit if one of the names is no option, with the names that it may have been meant for."""
        known = {action.dest for action in self._actions}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                hint = f"; did you mean {' or '.join(near)}?" if near else "."
                self.error(f"{where}: there is no option {name!r}{hint}")


def parse_arguments(
    argv: Sequence[str],
) -> tuple[DataArguments, ModelArguments, LoraArguments, ReportArguments, EBFTConfig]:
    """Options from the file that `--config` names and from the command line, which wins.

    Without any option it is the demo.
    """
    parser = Parser()
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=None if argv else str(DEMO_CONFIG))
    config = finder.parse_known_args(argv)[0].config
    from_file = [] if config is None else file_arguments(config, parser)
    *groups, unread = parser.parse_args_into_dataclasses(
        [*from_file, *argv], return_remaining_strings=True, look_for_args_file=False
    )
    options = [text[2:].partition("=")[0] for text in unread if text.startswith("--")]
    parser.refuse_unknown((name.replace("-", "_") for name in options), "command line")
    if unread:
        parser.error(f"command line: {' '.join(unread)!r} belongs to no option.")
    return tuple(groups)  # type: ignore[return-value]


def file_arguments(path: str, parser: Parser) -> list[str]:
    """The options of a YAML file as command-line arguments, so that both are read in one way."""
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(options, dict):
        parser.error(f"--config {path} must hold lines of the form 'option: value'.")
    parser.refuse_unknown(map(str, options), path)
    if "config" in options:
        parser.error(f"--config {path} names another config file; put all options into one.")
    arguments: list[str] = []
    for name, value in options.items():
        if value is None:  # as if it were not there
            continue
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            arguments.append(f"--{name}={text}")
    return arguments


def check(names: ModelArguments, lora: LoraArguments, report: ReportArguments) -> None:
    """Refuse combinations that would only fail, or be ignored, after training."""
    if lora.lora_merge and not lora.use_peft:
        raise ValueError("lora_merge=True has nothing to merge; add use_peft, or drop lora_merge.")
    if lora.use_peft and names.gguf_file and not lora.lora_merge:
        raise ValueError(
            f"Adapters of a model from a GGUF file ({names.gguf_file}) cannot be loaded by "
            "AutoModelForCausalLM, which would look for the model without gguf_file; add "
            "lora_merge."
        )
    for name, least in (("report_rows", 0), ("report_samples", 0), ("report_sample_len", 1)):
        if getattr(report, name) < least:
            raise ValueError(f"{name}={getattr(report, name)} must be at least {least}.")


# ---- Text and model ---------------------------------------------------------------------------


def load_rows(
    data: DataArguments, tokenizer: Any, args: EBFTConfig, *, wants_eval: bool
) -> tuple[TokenizedRows, TokenizedRows | None]:
    """Rows to train on and, if they are wanted, held-out ones."""
    train, held_out = load_text(data, wants_eval)
    if data.max_train_rows is not None:  # then it is not the first documents that count
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(DATA_SEED))
        train = train.select(order.tolist())
    train_rows = tokenize(train, tokenizer, data, args, pack=data.pack, most=data.max_train_rows)
    say(args, f"Training text, {train.name}: {train_rows.counts}")
    if held_out is None:
        return train_rows, None
    eval_rows = tokenize(held_out, tokenizer, data, args)
    say(args, f"Held-out text, {held_out.name}: {eval_rows.counts}")
    if data.max_eval_rows is not None:
        eval_rows = eval_rows.spread(data.max_eval_rows, DATA_SEED)
    return train_rows, eval_rows


def load_text(data: DataArguments, wants_eval: bool) -> tuple[RawDataset, RawDataset | None]:
    """Raw training text and, if it is wanted, held-out text."""
    train = load_split(data.dataset_name_or_path, data.train_split, data)
    if not wants_eval:
        return train, None
    eval_name = data.eval_dataset_name_or_path or data.dataset_name_or_path
    eval_split = data.eval_split
    if eval_split is None and eval_name.startswith(STDLIB):
        eval_split = "report"
    if eval_split is None and data.eval_dataset_name_or_path is not None:
        eval_split = "train"
    if eval_split is not None:
        if (eval_name, eval_split) == (data.dataset_name_or_path, data.train_split):
            raise ValueError(
                f"eval_split={eval_split!r} of {eval_name} is what is trained on; name another "
                "split."
            )
        return train, load_split(eval_name, eval_split, data)
    if data.eval_fraction == 0:
        raise ValueError(
            "There is no held-out text to measure on; set eval_split, eval_dataset_name_or_path or "
            "eval_fraction, or report_rows=0 and eval_strategy='no'."
        )
    return hold_out(train, data.eval_fraction)


def load_split(name: str, split: str, data: DataArguments) -> RawDataset:
    """One split, of the standard library's text or of any dataset."""
    if not name.startswith(STDLIB):
        return load_text_dataset(
            name, split, config_name=data.dataset_config_name, column=data.text_column
        )
    corpus = stdlib_text.load(name.removeprefix(STDLIB), split)
    return RawDataset(
        [{"text": document.text} for document in corpus.documents], ("text",), f"{name}/{split}"
    )


def tokenize(
    raw: RawDataset,
    tokenizer: Any,
    data: DataArguments,
    args: EBFTConfig,
    *,
    pack: bool = False,
    most: int | None = None,
) -> TokenizedRows:
    """Rows of at most `sequence_len` tokens, with labels if there are prompts."""
    min_length = args.context_length + args.generate_max_len
    if raw.has_prompts:
        if pack:
            raise ValueError("pack=True is for text, not for prompts with completions; drop it.")
        return tokenize_prompt_completion(
            raw.pairs(),
            tokenizer,
            sequence_len=data.sequence_len,
            min_length=min_length,
            min_completion=args.min_completion_prefix + args.generate_max_len,
            keep_short=data.keep_short,
            max_rows=most,
        )
    return tokenize_and_cut(
        raw.texts(),
        tokenizer,
        sequence_len=data.sequence_len,
        min_length=min_length,
        pack=pack,
        keep_short=data.keep_short,
        max_rows=most,
    )


def load_tokenizer(names: ModelArguments, args: EBFTConfig) -> Any:
    """The model's tokenizer, with a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(
        names.tokenizer_name_or_path or names.model_name_or_path, **loading_options(names)
    )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {names.model_name_or_path} has neither a pad nor an EOS token; "
                "add one and save it, then give it as tokenizer_name_or_path."
            )
        tokenizer.pad_token = tokenizer.eos_token
        say(args, f"The tokenizer has no pad token; rows are padded with {tokenizer.eos_token!r}.")
    return tokenizer


def load_model(names: ModelArguments, n_tokens: int) -> Any:
    """The model to train; it must know all the tokenizer's tokens."""
    options = loading_options(names)
    if names.attn_implementation is not None:
        options["attn_implementation"] = names.attn_implementation
    if names.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Packed weights, the default of releases that know this class, cannot be trained.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    dtype = "auto" if names.dtype == "auto" else getattr(torch, names.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        names.model_name_or_path, dtype=dtype, **options
    )
    embedded = model.get_input_embeddings().weight.shape[0]
    if n_tokens > embedded:
        raise ValueError(
            f"The tokenizer has {n_tokens} tokens, {names.model_name_or_path} embeds {embedded}; "
            "use the model's own tokenizer, or resize the model's embeddings and save it first."
        )
    return model


def loading_options(names: ModelArguments) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for model and tokenizer; only what was set."""
    options = {
        "revision": names.model_revision,
        "gguf_file": names.gguf_file,
        "trust_remote_code": names.trust_remote_code or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def lora_config(lora: LoraArguments) -> LoraConfig | None:
    """What PEFT is to wrap the model with, if anything."""
    if not lora.use_peft:
        return None
    modules = lora.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=modules[0] if modules == ["all-linear"] else modules,
    )


# ---- Results ----------------------------------------------------------------------------------


class Comparison:
    """The model on held-out text, before and after.

    Args:
        trainer: it has the model as it is, and the feature network.
        tokenizer: to show samples.
        eval_rows: held-out rows, of which some are measured.
        report: how.
    """

    def __init__(
        self,
        trainer: EBFTTrainer,
        tokenizer: Any,
        eval_rows: TokenizedRows | None,
        report: ReportArguments,
    ) -> None:
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.report = report
        self.rows = None
        if eval_rows is not None and report.report_rows:
            self.rows = eval_rows.spread(report.report_rows, DATA_SEED)
        self.figures: list[DocumentFigures] = []
        self.samples: list[list[Continuation]] = []

    def measure(self) -> None:
        """Measure the model as it is now.

        Every process does the same, so that none waits for another and sharded models work.
        """
        if self.rows is None:
            return
        report, args = self.report, self.trainer.args
        say(args, f"Measuring {len(self.rows)} held-out rows ...")
        model: Any = self.trainer.model
        self.figures.append(
            evaluate_documents(
                model,
                self.trainer.feature_network,
                self.rows,
                self.trainer.ebft,
                batch_size=args.per_device_eval_batch_size,
                stride=report.report_stride,
                n_samples=report.report_n_samples,
                n_draws=report.report_draws,
                eos_token_id=self.tokenizer.eos_token_id,
                corpus_whitening=self.trainer.corpus_whitening(),
            )
        )
        if report.report_samples:
            self.samples.append(
                sample_continuations(
                    model,
                    self.rows.spread(report.report_samples, DATA_SEED),
                    self.trainer.ebft,
                    length=report.report_sample_len,
                    eos_token_id=self.tokenizer.eos_token_id,
                )
            )

    def show(self) -> None:
        """Print the differences and samples, and keep the figures in report.json."""
        if self.rows is None:
            return
        args = self.trainer.args
        before, after = self.figures
        documents = [self.rows.sources[row][0] for row in after.row]
        n_documents = len(set(documents))
        by_document = n_documents >= FEWEST_DOCUMENTS
        differences = compare(before, after, groups=documents if by_document else None)
        say(
            args,
            f"\nHeld-out text, {len(self.rows)} rows of {n_documents} documents, before and after "
            "training: the same rows,\nrandom numbers and feature network. Intervals by bootstrap "
            f"over {'documents' if by_document else 'rows'}; * marks a change beyond the noise.\n\n"
            + format_table(differences),
        )
        if self.samples:
            old, new = self.samples
            say(args, "\n" + format_samples(old, new, self.tokenizer.decode))
        if args.process_index == 0:
            path = Path(str(args.output_dir), "report.json")
            figures = {name: dataclasses.asdict(paired) for name, paired in differences.items()}
            path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            if self.samples:
                self.write_samples(path.with_name("samples.jsonl"))
            say(args, f"\nThe figures of the table are in {path}.")

    def write_samples(self, path: Path) -> None:
        """The samples as JSON lines, which `hf_ebft.report` shows."""
        decode = self.tokenizer.decode
        lines = [
            {
                "prefix": decode(old.prefix),
                "before": decode(old.rollout),
                "after": decode(new.rollout),
                "truth": decode(old.ground_truth),
            }
            for old, new in zip(*self.samples, strict=True)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def save(trainer: EBFTTrainer, lora: LoraArguments, data: DataArguments) -> None:
    """The model (or its adapters), the tokenizer, the card and the log, into output_dir."""
    name = data.dataset_name_or_path
    trainer.create_model_card(dataset=Path(name).name if Path(name).exists() else name)
    if lora.lora_merge:
        adapted: Any = trainer.model
        trainer.model = adapted.merge_and_unload()
    trainer.save_model()
    trainer.save_state()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def show_library_log() -> None:
    """Let the library say what it decided, such as where the feature network lives."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_ebft").setLevel(logging.INFO)


def say_where(trainer: EBFTTrainer) -> None:
    """Where curves and model are, and how to open them."""
    args = trainer.args
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            say(
                args,
                f"The curves are in {callback.logging_dir}; to see them: "
                f"tensorboard --logdir {args.output_dir}",
            )
    say(
        args,
        f"One page about the run: python -m hf_ebft.report {args.output_dir} "
        f"--output {Path(str(args.output_dir), 'report.html')}",
    )
    say(args, f"The model is in {args.output_dir}: AutoModelForCausalLM.from_pretrained loads it.")


def say(args: TrainingArguments, message: str) -> None:
    """Print in one process only."""
    if args.process_index == 0:
        print(message, flush=True)


if __name__ == "__main__":
    main()
