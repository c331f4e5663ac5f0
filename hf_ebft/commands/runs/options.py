"""The options of `hf-ebft train` other than the training arguments, in groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hf_ebft.commands.runs.demo_files import DEMO_MODEL
from hf_ebft.data import TRANSFORMS
from hf_ebft.data.mixing import check_weights

# Prefixes in the names of data sets that come with Python.
STDLIB = "stdlib:"
STDLIB_FUNCTIONS = "stdlib-functions:"
Mode = Literal["strided", "structured"]
# A data set with `prompt` and one of these columns is for structured mode. One with `prompt` and
# `completion` is for strided mode: text of which only the completion is trained on.
GROUND_TRUTHS = ("ground_truth", "answer")


@dataclass
class DataArguments:
    """The text to train on."""

    _argument_group_name = "data"

    config: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with any of these options, by the same names. Options on the "
            "command line win."
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
            "help": "A .txt, .md or .py file or a folder of them; a .csv, .tsv, .jsonl, .ndjson, "
            ".json or .parquet file (also with .gz) or a folder of them; a dataset's name on the "
            "hub; 'stdlib:' and a domain of hf_ebft.data.stdlib_text (text that comes with "
            "Python); or 'stdlib-functions:' and such a domain (prompts that are heads of its "
            "functions, with their bodies). Several are joined; the other data options apply to "
            "each of them."
        },
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of several data sets in the training data, such as 0.7 0.3. Rows are "
            "drawn in these shares until one data set is used up. Default: all rows of all."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the data set during training, without downloading it first. Needs "
            "max_steps."
        },
    )
    transform: str | None = field(
        default=None,
        metadata={
            "help": "Function that makes prompts and ground truths from the dataset's columns: "
            f"{', '.join(TRANSFORMS)} of hf_ebft.data. Default: the columns are used unchanged."
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
            "help": "What to do with rows that the transform cannot use: 'raise' an error, or "
            "'skip' them and log how many."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a hub dataset that has several."}
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the text. Default: 'prompt' and 'completion' if both exist (then "
            "only completions are trained on), else 'text', 'content' or 'code'."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Data set with the held-out text. Default: the training data set."},
    )
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split with the held-out text. Default: 'report' for 'stdlib:'; 'train' if "
            "eval_dataset_name_or_path is set; else no split, but eval_fraction of train_split."
        },
    )
    eval_fraction: float = field(
        default=0.05,
        metadata={
            "help": "Share of the training documents to hold out if no other held-out text is "
            "named. 0: none; report_rows must then be 0, too."
        },
    )
    sequence_len: int = field(default=512, metadata={"help": "Largest number of tokens of a row."})
    pack: bool = field(
        default=False,
        metadata={
            "help": "Pack several short documents into one training row; they do not attend to "
            "each other. Held-out text is never packed."
        },
    )
    keep_short: bool = field(
        default=False,
        metadata={
            "help": "Keep rows that are too short for a block, to train on their cross-entropy "
            "only (ce_coef). Default: drop them. The log says how many."
        },
    )
    max_train_rows: int | None = field(
        default=None,
        metadata={"help": "Largest number of training rows, from documents chosen at random."},
    )
    max_eval_rows: int | None = field(
        default=None,
        metadata={"help": "Largest number of held-out rows, from as many documents as possible."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name_or_path, str):
            self.dataset_name_or_path = [self.dataset_name_or_path]
        check_weights(self.dataset_weights, len(self.dataset_name_or_path))

    @property
    def shown_name(self) -> str:
        """The names of the data sets, for messages."""
        return " + ".join(self.dataset_name_or_path)


@dataclass
class ModelArguments:
    """The model to train."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default=str(DEMO_MODEL),
        metadata={"help": "Model to train: a hub name or a folder. Default: the demo's model."},
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a model on the hub."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer. Default: the one that comes with the model."}
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "Name of a GGUF file in the model's folder (needs gguf)."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={
            "help": "Data type of the weights; 'auto' is the checkpoint's. On GPUs, float32 with "
            "--bf16 is mixed precision."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention to load the model with; see also packed_attention."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that comes with a checkpoint."}
    )


@dataclass
class StructuredModelArguments(ModelArguments):
    """`ModelArguments` without `trust_remote_code`, which TRL's configuration has already."""

    trust_remote_code: bool = field(default=False, init=False)


@dataclass
class LoraArguments:
    """Adapters instead of full fine-tuning, by the names of TRL's `ModelConfig`.

    Two defaults differ from TRL: `lora_target_modules` is all linear layers, and `lora_dropout` is
    0, since rollouts are sampled without dropout.
    """

    _argument_group_name = "LoRA"

    use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters; the model's own weights are frozen."}
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
            "help": "Modules that get adapters: their names, one regular expression for their full "
            "names, 'all-linear', or 'none' (with lora_target_parameters)."
        },
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of parameters that get adapters although they are not weights of linear "
            "layers: the experts of many mixture models, such as mlp.experts.down_proj."
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that are fully trained and saved with the adapters, such as lm_head. "
            "The feature network is then a copy, which takes as much memory as the model."
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
            "help": "Adapt direction and magnitude of weights separately: DoRA, slower than LoRA "
            "and often better at low ranks (https://arxiv.org/abs/2402.09353)."
        },
    )
    lora_merge: bool = field(
        default=False,
        metadata={"help": "Save the whole model with the adapters merged into it, not adapters."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Load the model in 4 bits: QLoRA (https://arxiv.org/abs/2305.14314), with "
            "use_peft. Needs bitsandbytes (the extra 'quantization')."
        },
    )
    load_in_8bit: bool = field(
        default=False,
        metadata={"help": "Load the model in 8 bits, with use_peft. Needs bitsandbytes, too."},
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(
        default="nf4",
        metadata={"help": "load_in_4bit: the data type of the weights; nf4 is made for weights."},
    )
    use_bnb_nested_quant: bool = field(
        default=False,
        metadata={"help": "load_in_4bit: also quantize the scales; saves 0.4 bits per weight."},
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None,
        metadata={
            "help": "load_in_4bit: data type of the tensors that store the bits (default uint8). "
            "FSDP can shard them only if it is the type of the other weights, such as bfloat16."
        },
    )

    @property
    def quantizes(self) -> bool:
        """Whether the model is loaded in few bits."""
        return self.load_in_4bit or self.load_in_8bit


@dataclass
class ReportArguments:
    """The measurements on held-out text before and after training."""

    _argument_group_name = "report"

    report_rows: int = field(
        default=64,
        metadata={"help": "Held-out rows to measure, from many documents. 0: no report."},
    )
    report_stride: int | None = field(
        default=None, metadata={"help": "Tokens between blocks in the report. Default: stride."}
    )
    report_n_samples: int | None = field(
        default=None,
        metadata={
            "help": "Rollouts in a group in the report. Default: n_samples_per_prompt, so that "
            "alignment as rewarded is on the scale of the training curves."
        },
    )
    report_draws: int = field(
        default=2,
        metadata={"help": "Groups of rollouts for each block; averaged, for less noise."},
    )
    report_samples: int = field(
        default=3, metadata={"help": "Number of rollouts to print, before and after training."}
    )
    report_sample_len: int = field(default=24, metadata={"help": "Tokens of each printed rollout."})
    card_samples: int = field(
        default=2,
        metadata={
            "help": "Number of rollouts that the model card quotes, each with the training text "
            "that it continues. If that text is private, set card_samples and report_samples to "
            "0: samples.jsonl in output_dir quotes held-out text, and push_to_hub uploads both."
        },
    )
