"""Tiny models, texts and trainers that the trainer's tests share.

Dimension letters: B rows of the batch, K blocks, n samples, G rollout length.
"""

import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hf_ebft import EBFTConfig, EBFTTrainer, Rollouts
from hf_ebft.rows.anchors import find_blocks
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout
from hf_ebft.training.outputs import EBFTOutput

VOCABULARY = 61


def tiny_causal_lm(
    config_class: Callable[..., PreTrainedConfig],
    *,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    **settings: Any,
) -> PreTrainedModel:
    """A random model of two layers, in evaluation mode, whose predictions depend on all tokens.

    Args:
        config_class: of an architecture that uses the names of Llama's configuration.
        seed: of the weights; torch's global generator is left as it is.
        vocabulary: number of token ids.
        settings: of the configuration.
    """
    defaults: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        # With transformers' 0.02 every distribution would be all but uniform.
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = config_class(vocab_size=vocabulary, **(defaults | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    """The Llama of `tiny_causal_lm`, in training mode, with one head of keys and values."""
    return tiny_causal_lm(LlamaConfig, **({"num_key_value_heads": 1} | settings)).train()


def texts(*lengths: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[dict[str, list[int]]]:
    """A dataset of random documents of these lengths: dicts with `input_ids`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(vocabulary, (length,), generator=generator).tolist()}
        for length in lengths
    ]


def config(folder: Path, **settings: Any) -> EBFTConfig:
    """Settings for seconds on a CPU: short blocks, nothing written but what is asked for."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "adam_beta2": 0.999,
        "stride": 4,
        "context_length": 4,
        "generate_max_len": 3,
        "n_samples_per_prompt": 3,
        "temperature": 0.8,
        # Its forward passes are most of the time that it takes to build a tiny trainer, and other
        # tests are about it.
        "verify_packing": False,
    }
    return EBFTConfig(**(defaults | settings))


class RecordedRollouts(EBFTTrainer):
    """Keeps the tokens (B, n, K, G) that every call sampled.

    Attributes:
        sampled: of each call, in order.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sampled: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
        """Sample and keep."""
        rollouts = super().sample_rollouts(model, inputs)
        self.sampled.append(rollouts.tokens)
        return rollouts


class GivenRollouts(EBFTTrainer):
    """Trains on the same rollouts at every call.

    Attributes:
        given: put there by a test, or those of the first call.
    """

    given: Rollouts | None = None

    def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
        """Sample if nothing is given."""
        if self.given is None:
            self.given = super().sample_rollouts(model, inputs)
        return self.given


class PrefixRollouts(EBFTTrainer):
    """Rollouts that are a function of (prefix, sample), wherever in a batch the prefix stands.

    Batches that hold the same documents in another arrangement then hold the same rollouts, and
    have to give the same loss and gradient.
    """

    def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Rollouts:
        """Replace the sampled tokens."""
        rollouts = super().sample_rollouts(model, inputs)
        layout, tokens = rollouts.layout, rollouts.tokens.clone()
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        for row, block in rollouts.exists.nonzero().tolist():
            end = int(layout.blocks.column[row, block])
            start = end - int(layout.blocks.position[row, block])
            prefix = layout.documents.input_ids[row, start:end]
            # Any fixed function of the prefix would do.
            weights = torch.arange(1, end - start + 1) % 97
            generator = torch.Generator().manual_seed(int((prefix.cpu() * weights).sum()))
            shape = (tokens.shape[1], tokens.shape[3])
            tokens[row, :, block] = torch.randint(vocabulary, shape, generator=generator)
        return rollouts.with_tokens(tokens)


class Listener(TrainerCallback):
    """Keeps what every micro-batch computed."""

    def __init__(self) -> None:
        self.outputs: list[EBFTOutput] = []

    def on_ebft_outputs(self, *args: Any, outputs: EBFTOutput, **kwargs: Any) -> None:
        """Once for each micro-batch of training."""
        self.outputs.append(outputs)


def batch_of(rows: list[dict[str, Any]], *, side: str = "right", pad: int = 0) -> dict[str, Tensor]:
    """Pad rows of per-token columns into a batch with an `attention_mask`."""
    width = max(len(row["input_ids"]) for row in rows)
    columns: dict[str, list[list[int]]] = {name: [] for name in [*rows[0], "attention_mask"]}
    for row in rows:
        missing = width - len(row["input_ids"])
        for name, values in (row | {"attention_mask": [1] * len(row["input_ids"])}).items():
            fill = {"input_ids": pad, "labels": -100}.get(name, 0)
            padding = [fill] * missing
            columns[name].append(values + padding if side == "right" else padding + values)
    return {name: torch.tensor(values) for name, values in columns.items()}


def gradients(trainer: EBFTTrainer, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its gradient for every trainable weight."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    return loss.detach(), gradient_of(trainer.model)


def gradient_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients that a model holds, zero where it has none."""
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's weights."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same_tensors(
    actual: dict[str, Tensor], expected: dict[str, Tensor], *, relative: float
) -> None:
    """Fail unless every tensor agrees up to `relative` times its largest expected entry.

    0 asks for the same bits.
    """
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        atol = relative * float(tensor.abs().max())
        torch.testing.assert_close(
            actual[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def source_text() -> list[str]:
    """Real text that every machine has: the source of two standard modules, by paragraph."""
    code = inspect.getsource(textwrap) + inspect.getsource(json)
    return [paragraph for paragraph in code.split("\n\n") if paragraph.strip()]


def tiny_tokenizer(vocabulary: int = 300, **special_tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from `source_text`, without special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=sorted(set(special_tokens.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(source_text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def logged(trainer: EBFTTrainer, name: str) -> list[float]:
    """All values of a metric in the trainer's log, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def ragged_layout(n_samples: int = 2, length: int = 3, vocabulary: int = 11) -> PackedLayout:
    """Rows of 14, 5 and 9 tokens, the last one two packed documents: 4, 1, 0 and 1 blocks, or more
    where rollouts are shorter.
    """
    ids = torch.randint(vocabulary, (3, 14))
    mask = torch.zeros_like(ids)
    document = torch.zeros_like(ids)
    for row, width in enumerate((14, 5, 9)):
        mask[row, :width] = 1
    document[2, 3:] = 1
    documents = Documents.from_inputs(
        {"input_ids": ids, "attention_mask": mask, "document_ids": document}
    )
    blocks = find_blocks(documents, stride=3, context_length=2, generate_max_len=length)
    layout = PackedLayout(documents, blocks, n_samples, length)
    assert length != 3 or layout.blocks.exists.sum(dim=1).tolist() == [4, 1, 1]
    return layout
