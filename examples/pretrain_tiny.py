"""Train the small language model in `examples/tiny_model` from nothing.

Text: the Python standard library's source, split as `hf_ebft/data/stdlib_text.py` says. The script
trains a byte-level BPE tokenizer and a small Llama on `general/pretrain` with
`transformers.Trainer`, measures the model on `general/pretrain_eval` and on the `tune` split of the
domains that it has not seen, and writes weights, tokenizer and a model card with the results to
`--output_dir`.

    python examples/pretrain_tiny.py                       # the committed model, on 2 CPU cores
    python examples/pretrain_tiny.py --max_steps 200 --output_dir /tmp/tiny    # a quick look
    python examples/pretrain_tiny.py --help                # every option

Dimension letters: R rows, S row length in tokens, V vocabulary, B rows in a batch.
"""

import math
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_ebft.data import stdlib_text
from hf_ebft.data.stdlib_text import Document

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
# They end where a token ends: a line break and the indentation after it are one token.
SAMPLE_PROMPTS = ("def read_file(path):", "class Queue:", "import os", "    for name in")
UNSEEN_DOMAINS = ("topics", "tests", "encodings")


@dataclass
class TinyModelArguments:
    """Size of the model, its tokenizer and its rows."""

    vocab_size: int = field(
        default=1536, metadata={"help": "Tokens of the byte-level BPE, the two special ones too."}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width of the residual stream."})
    intermediate_size: int = field(default=512, metadata={"help": "Width inside the MLPs."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Transformer layers."})
    num_attention_heads: int = field(default=6, metadata={"help": "Attention heads of a layer."})
    num_key_value_heads: int = field(
        default=3, metadata={"help": "Key/value heads of a layer (grouped-query attention)."}
    )
    initializer_range: float = field(
        default=0.06,
        metadata={"help": "Standard deviation of the initial weights; 0.02 learns much slower."},
    )
    max_position_embeddings: int = field(
        default=1024, metadata={"help": "Longest sequence that the model declares to accept."}
    )
    row_length: int = field(default=256, metadata={"help": "Tokens in a packed training row."})
    max_unseen_rows: int = field(
        default=512,
        metadata={"help": "At most so many rows, evenly spread, measure each unseen domain."},
    )


@dataclass
class PretrainArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults that the committed model was made with.

    They suit two CPU cores and about twenty minutes: many small steps at a high learning rate.
    """

    output_dir: str | None = field(
        default=str(Path(__file__).parent / "tiny_model"),
        metadata={"help": "Folder for weights, tokenizer and model card."},
    )
    max_steps: int = field(default=6000, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows in a step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Rows in a batch."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape after warm-up."})
    warmup_steps: float = field(default=200, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's decoupled decay."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second-moment decay."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between logged losses."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    eval_steps: float | None = field(default=1000, metadata={"help": "Steps between evaluations."})
    save_strategy: str = field(default="no", metadata={"help": "When to save a checkpoint."})
    report_to: str | None = field(default="none", metadata={"help": "Where to log: tensorboard..."})
    seed: int = field(default=0, metadata={"help": "Seed of initialisation and data order."})


class Rows(Dataset[dict[str, Tensor]]):
    """Packed rows as a dataset of causal-LM examples. `rows`: (R, S) int64."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@dataclass(frozen=True)
class Measurement:
    """Cross-entropy of one model on one text.

    `nats_per_token` is the mean over the predicted tokens: all but the first of each row.
    """

    nats_per_token: float
    tokens_per_byte: float

    @property
    def bits_per_byte(self) -> float:
        """The same in bits for each UTF-8 byte of text, comparable between tokenizers."""
        return self.nats_per_token * self.tokens_per_byte / math.log(2)


def train_tokenizer(
    documents: Sequence[Document], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned on `documents`: any text encodes, and decodes to itself.

    Encoding adds no special tokens. `EOS_TOKEN` ends a document (and so begins the next).
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        (document.text for document in documents),
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS_TOKEN, PAD_TOKEN],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def pack(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], row_length: int
) -> tuple[Tensor, float]:
    """Rows of `row_length` tokens, (R, S) int64, and the text's tokens per UTF-8 byte.

    Documents follow each other with an EOS after each; what does not fill the last row is left
    out. The EOS tokens count as tokens of the text, since the model has to predict them.
    """
    stream: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch([text for _, text in documents]):
        stream += [*encoding.ids, tokenizer.eos_token_id]
    count = len(stream) // row_length
    if count == 0:
        raise ValueError(
            f"row_length {row_length} is longer than the whole text ({len(stream)} tokens): "
            "use shorter rows or more text"
        )
    rows = torch.tensor(stream[: count * row_length]).view(count, row_length)
    return rows, len(stream) / sum(len(text.encode()) for _, text in documents)


def spread(rows: Tensor, at_most: int) -> Tensor:
    """At most `at_most` of the rows (R, S), evenly spaced."""
    if len(rows) <= at_most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, at_most).long()]


def unigram_nats_per_token(train_rows: Tensor, rows: Tensor, vocab_size: int) -> float:
    """Cross-entropy on `rows` of the token frequencies of `train_rows` (plus one each)."""
    counts = torch.bincount(train_rows.flatten(), minlength=vocab_size).double() + 1
    log_p_V = (counts / counts.sum()).log()
    return -log_p_V[rows[:, 1:]].mean().item()


@torch.no_grad()
def model_nats_per_token(model: LlamaForCausalLM, rows: Tensor, batch_size: int) -> float:
    """Mean cross-entropy of `model` over all tokens but the first of each row."""
    model.eval()
    total = 0.0
    for rows_BS in rows.split(batch_size):
        rows_BS = rows_BS.to(model.device)
        total += model(input_ids=rows_BS, labels=rows_BS).loss.item() * len(rows_BS)
    return total / len(rows)


def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, temperature: float
) -> str:
    """`prompt` and its continuation by up to 64 tokens; greedy at temperature 0."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    # mypy: transformers types generate's self as a protocol that its own models do not match.
    output = model.generate(**inputs, max_new_tokens=64, **how)  # type: ignore[misc]
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def new_model(sizes: TinyModelArguments, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of these sizes with random weights, in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        initializer_range=sizes.initializer_range,
        max_position_embeddings=sizes.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train_rows: Tensor,
    sizes: TinyModelArguments,
    batch_size: int,
) -> dict[str, tuple[Measurement, Measurement]]:
    """Each evaluation text -> (model, unigram baseline fitted on `train_rows` (R, S)).

    A text that this Python does not have, or too little of, is named and left out.
    """
    texts: list[tuple[str, str, int, int | None]] = [
        ("general", "pretrain_eval", sizes.row_length, None),
        ("general", "pretrain_eval", sizes.max_position_embeddings, None),
        *((domain, "tune", sizes.row_length, sizes.max_unseen_rows) for domain in UNSEEN_DOMAINS),
    ]
    results = {}
    for domain, split, row_length, at_most in texts:
        try:
            documents = stdlib_text.load(domain, split).documents
            rows, tokens_per_byte = pack(tokenizer, documents, row_length)
        except ValueError as error:
            print(f"not measured: {domain}/{split}: {error}")
            continue
        rows = spread(rows, at_most or len(rows))
        text = f"`{domain}/{split}`, {len(rows)} rows of {row_length}"
        nats = model_nats_per_token(model, rows, batch_size)
        unigram_nats = unigram_nats_per_token(train_rows, rows, len(tokenizer))
        results[text] = (
            Measurement(nats, tokens_per_byte),
            Measurement(unigram_nats, tokens_per_byte),
        )
        print(f"{text}: model {nats:.3f}, unigram {unigram_nats:.3f} nats/token")
    return results


def model_card(
    sizes: TinyModelArguments,
    args: PretrainArguments,
    parameters: int,
    minutes: float,
    train_tokens: int,
    results: dict[str, tuple[Measurement, Measurement]],
    samples: Sequence[str],
) -> str:
    """The model card. `results`: text -> (model, unigram baseline)."""
    command = shlex.join(["python", "examples/pretrain_tiny.py", *sys.argv[1:]])
    table = "\n".join(
        f"| {text} | {model.nats_per_token:.3f} | {model.bits_per_byte:.3f} "
        f"| {unigram.nats_per_token:.3f} | {unigram.bits_per_byte:.3f} |"
        for text, (model, unigram) in results.items()
    )
    blocks = "\n\n".join(f"```python\n{text.rstrip()}\n```" for text in samples)
    rows_a_step = args.train_batch_size * args.gradient_accumulation_steps
    seen = args.max_steps * rows_a_step * sizes.row_length
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
---
# A small language model of Python source

This is a Llama of {parameters:,} parameters in float32 with its own byte-level BPE of
{sizes.vocab_size} tokens. With it, energy-based fine-tuning can be tried without a download. It has
only learned what Python looks like, and is of no use as a programming assistant.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("examples/tiny_model")
tokenizer = AutoTokenizer.from_pretrained("examples/tiny_model")
```

{sizes.num_hidden_layers} layers, width {sizes.hidden_size}, {sizes.num_attention_heads} heads
({sizes.num_key_value_heads} for keys and values), MLP {sizes.intermediate_size}, tied embeddings.

- `{EOS_TOKEN}` ends each document and begins the next. Encoding does not add it.
- `{PAD_TOKEN}` is only for padding.
- Use rows of at most {sizes.row_length} tokens. The model accepts
  {sizes.max_position_embeddings}, but it was trained on {sizes.row_length} and predicts badly
  beyond that (measured below).

## Measured

The table shows the cross-entropy over all tokens except the first of each row, in nats per token
and bits per UTF-8 byte. For comparison, "unigram" is the cross-entropy of the token frequencies of
the training text. `hf_ebft/data/stdlib_text.py` defines the splits. The model was trained only on
`general/pretrain`. `pretrain_eval` contains other files of the same kind. The other splits are
kinds of text that it has not seen.

| text | nats/token | bits/byte | unigram nats/token | unigram bits/byte |
|---|---|---|---|---|
{table}

## Made with

    {command}

- Time: {minutes:.1f} minutes, evaluations included
- Machine: {args.device.type}, {torch.get_num_threads()} threads
- Versions: Python {platform.python_version()}, torch {torch.__version__},
  transformers {transformers.__version__}
- Steps: {args.max_steps} of {rows_a_step} rows, seed {args.seed}
- Tokens: {seen / 1e6:.1f} million, {seen / train_tokens:.1f} times the training text

Another Python version has other source files and therefore gives another model.

## Samples

The first continuation of each prompt, of 64 tokens, at temperature 0.8 with seed {args.seed}.

{blocks}

## Origin of the text

The text is the source of Python {platform.python_version()}'s standard library, copyright the
Python Software Foundation and the authors named in its files, under the PSF License Agreement
(https://docs.python.org/3/license.html). No text of it is in this folder, apart from what the
samples may repeat.
"""


def main() -> None:
    # mypy: the parser's own annotation admits no tuple of dataclasses, its documentation does.
    parser = HfArgumentParser((TinyModelArguments, PretrainArguments))  # type: ignore[arg-type]
    sizes, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)

    train = stdlib_text.load("general", "pretrain")
    tokenizer = train_tokenizer(train.documents, sizes.vocab_size, sizes.max_position_embeddings)
    train_rows, tokens_per_byte = pack(tokenizer, train.documents, sizes.row_length)
    held_out = stdlib_text.load("general", "pretrain_eval")
    eval_rows, _ = pack(tokenizer, held_out.documents, sizes.row_length)
    model = new_model(sizes, tokenizer)
    print(
        f"{len(train.documents)} training files ({len(train.skipped)} unreadable), "
        f"{train_rows.numel():,} tokens ({1 / tokens_per_byte:.2f} bytes each); "
        f"{model.num_parameters():,} parameters"
    )

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Rows(train_rows),
        eval_dataset=Rows(eval_rows),
        processing_class=tokenizer,
    )
    start = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - start) / 60

    output_dir = Path(args.output_dir)  # saved first: what is measured can be measured again
    model.config.use_cache = True  # Trainer has switched it off for training
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)

    results = measure(model, tokenizer, train_rows, sizes, args.eval_batch_size)
    set_seed(args.seed)
    for prompt in SAMPLE_PROMPTS:
        print("--- greedy\n" + sample(model, tokenizer, prompt, temperature=0.0))
    samples = [sample(model, tokenizer, prompt, temperature=0.8) for prompt in SAMPLE_PROMPTS]
    for text in samples:
        print("--- temperature 0.8\n" + text)

    card = model_card(
        sizes, args, model.num_parameters(), minutes, train_rows.numel(), results, samples
    )
    (output_dir / "README.md").write_text(card, encoding="utf-8")
    print(f"saved to {output_dir}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
