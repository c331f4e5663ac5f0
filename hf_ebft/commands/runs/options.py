"""The options of `hf-ebft train` beside the training arguments, in groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hf_ebft.commands.runs.demo_files import DEMO_MODEL
from hf_ebft.data import TRANSFORMS
from hf_ebft.data.mixing import check_weights

# Prefixes of data sets that come with Python.
STDLIB = "stdlib:"
STDLIB_FUNCTIONS = "stdlib-functions:"
Mode = Literal["strided", "structured"]
# The columns that, beside `prompt`, make a data set one for structured mode. A `prompt` with a
# `completion` has always been read as text of which only the completion is learned.
GROUND_TRUTHS = ("ground_truth", "answer")


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
    mode: Mode | None = field(
        default=None,
        metadata={
            "help": "'strided' for text, 'structured' for prompts with ground truths (needs TRL). "
            "Default: 'structured' where the dataset has 'prompt' with 'ground_truth' or 'answer', "
            "else 'strided'."
        },
    )
    dataset_name_or_path: list[str] = field(
        default_factory=lambda: [STDLIB + "topics"],
        metadata={
            "help": "A .txt, .md or .py file, a folder of them, a .csv, .tsv, .jsonl, .ndjson, "
            ".json or .parquet file (or such a file with .gz), a folder of them, "
            "a dataset's name on the hub, 'stdlib:' and a domain of hf_ebft.data.stdlib_text "
            "(text that comes with Python), or 'stdlib-functions:' and such a domain (its "
            "functions: heads with bodies). Several are joined; the other options of data hold "
            "for each."
        },
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Several data sets: the share of each, such as 0.7 0.3. Rows are drawn by "
            "these until one data set has none left. Default: all rows of all."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the data set while it is trained on, without downloading it first. Needs "
            "max_steps."
        },
    )
    transform: str | None = field(
        default=None,
        metadata={
            "help": "What makes prompts and ground truths of the dataset's columns: "
            f"{', '.join(TRANSFORMS)} of hf_ebft.data. Default: the columns are used as they are."
        },
    )
    transform_args: str | None = field(
        default=None,
        metadata={
            "help": "Settings of the transform: a mapping in a config file, JSON on the command "
            "line."
        },
    )
    bad_rows: Literal["raise", "skip"] = field(
        default="raise",
        metadata={
            "help": "Rows that the transform cannot use: 'raise' an error, or 'skip' and count."
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

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name_or_path, str):
            self.dataset_name_or_path = [self.dataset_name_or_path]
        check_weights(self.dataset_weights, len(self.dataset_name_or_path))

    @property
    def shown_name(self) -> str:
        """What is trained on, for a sentence."""
        return " + ".join(self.dataset_name_or_path)


@dataclass
class ModelArguments:
    """What model to train."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default=str(DEMO_MODEL),
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
class StructuredModelArguments(ModelArguments):
    """What model to train; TRL's configuration has an option of the group's itself."""

    trust_remote_code: bool = field(default=False, init=False)


@dataclass
class LoraArguments:
    """Adapters instead of full fine-tuning, by the names of TRL's `ModelConfig`.

    Differences from TRL: `lora_target_modules` is all linear layers where nothing is set, and
    `lora_dropout` is 0, since rollouts are sampled without dropout.
    """

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
        metadata={
            "help": "Names of the modules that get adapters, one regular expression for their full "
            "names, 'all-linear', or 'none' (with lora_target_parameters)."
        },
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of parameters that get adapters though they are no linear layer: the "
            "experts of many mixture models, such as mlp.experts.down_proj."
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules trained whole and saved with the adapters, such as lm_head. The "
            "feature network is then a copy, which takes the memory of the model again."
        },
    )
    use_rslora: bool = field(
        default=False,
        metadata={
            "help": "Scale adapters by lora_alpha / sqrt(lora_r): rsLoRA, for high ranks "
            "(https://arxiv.org/abs/2312.03732)."
        },
    )
    use_dora: bool = field(
        default=False,
        metadata={
            "help": "Adapt direction and magnitude of weights apart: DoRA, slower than LoRA and "
            "often better at low ranks (https://arxiv.org/abs/2402.09353)."
        },
    )
    lora_merge: bool = field(
        default=False,
        metadata={"help": "Save the whole model with the adapters merged in, not the adapters."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Load the model in 4 bits: QLoRA (https://arxiv.org/abs/2305.14314), with "
            "use_peft. Needs bitsandbytes (the extra 'quantization')."
        },
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Load the model in 8 bits, with use_peft; likewise."}
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(
        default="nf4", metadata={"help": "load_in_4bit: the 16 values; nf4 suits weights."}
    )
    use_bnb_nested_quant: bool = field(
        default=False,
        metadata={"help": "load_in_4bit: quantize the scales, too; saves 0.4 bits a weight."},
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None,
        metadata={
            "help": "load_in_4bit: type of the tensors that hold the bits (default uint8). FSDP "
            "shards them where it is that of the other weights, such as bfloat16."
        },
    )

    @property
    def quantizes(self) -> bool:
        """Whether the model is loaded in few bits."""
        return self.load_in_4bit or self.load_in_8bit


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
    card_samples: int = field(
        default=2,
        metadata={
            "help": "Rollouts that the model card quotes, each beside the training text that it "
            "continues. Where that text is private, set 0, and report_samples to 0 as well: "
            "samples.jsonl in output_dir quotes held-out text, and push_to_hub uploads both."
        },
    )
