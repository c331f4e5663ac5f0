"""What is measured: presets (document, blocks, samples), model sizes, and how they are built."""

from __future__ import annotations

import copy
import datetime
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_ebft import EBFTConfig, __version__


@dataclass(frozen=True)
class Preset:
    """One set of lengths.

    Attributes:
        document: S, tokens of a document.
        stride, context_length, generate_max_len: where blocks start, how long rollouts are (G).
        n_samples: n.
        lora_rank: rank of LoRA on all linear layers; 0: all weights are trained.
        repeats, naive_repeats: timed steps of the library and of the naive order of work.
    """

    document: int = 1024
    stride: int = 8
    context_length: int = 8
    generate_max_len: int = 8
    n_samples: int = 4
    lora_rank: int = 0
    repeats: int = 5
    naive_repeats: int = 2

    def config(self, output_dir: str, **settings: Any) -> EBFTConfig:
        """The trainer's configuration."""
        return EBFTConfig(
            output_dir=output_dir,
            stride=self.stride,
            context_length=self.context_length,
            generate_max_len=self.generate_max_len,
            n_samples_per_prompt=self.n_samples,
            **settings,
        )

    @property
    def naive_row(self) -> int:
        """Tokens of a sample's row in the naive order of work: S + K * G."""
        ends = range(self.context_length, self.document - self.generate_max_len + 1, self.stride)
        return self.document + len(ends) * self.generate_max_len


PRESETS = {
    "paper": Preset(),
    "translation": Preset(document=256, stride=2, context_length=4, generate_max_len=4),
    "long": Preset(document=4096, repeats=3, naive_repeats=1),
    "wide": Preset(n_samples=16, naive_repeats=1),
    "lora": Preset(lora_rank=16),
    # Seconds, to see that the tool works; its ratios mean nothing.
    "tiny": Preset(
        document=40, stride=4, context_length=4, generate_max_len=3, n_samples=3, repeats=2
    ),
}


@dataclass(frozen=True)
class ModelSize:
    """A Llama with random weights.

    Attributes:
        dtype: the dtype of its weights, and of the matrix product that it is compared with.
        shape: of the `LlamaConfig`.
    """

    dtype: torch.dtype
    shape: dict[str, Any]

    def in_dtype(self, dtype: torch.dtype | None) -> ModelSize:
        """The same shape with weights of another dtype; None: as it is."""
        return self if dtype is None else replace(self, dtype=dtype)

    def build(self, **shape: Any) -> LlamaForCausalLM:
        """The model in training mode, on torch's default device; `shape` overrides."""
        config = LlamaConfig(
            max_position_embeddings=16384,
            bos_token_id=None,
            eos_token_id=None,
            **(self.shape | shape),
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=self.dtype, attn_implementation="sdpa"
        )
        return model.train()


MODELS = {
    "tiny": ModelSize(
        torch.float32,
        {
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "initializer_range": 0.3,
        },
    ),
    # For benchmarks/scaling.py: small, so that its fixed costs show.
    "3m": ModelSize(
        torch.float32,
        {
            "vocab_size": 2048,
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    # 10 M parameters.
    "10m": ModelSize(
        torch.float32,
        {
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    # The shape of SmolLM2-135M.
    "smollm2": ModelSize(
        torch.float32,
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    # The shape of Llama-3.2-1B.
    "1b": ModelSize(
        torch.bfloat16,
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
}


def with_adapters(model: PreTrainedModel, rank: int) -> nn.Module:
    """The model with LoRA on all linear layers, or as it is for rank 0."""
    if rank == 0:
        return model
    adapters = peft.LoraConfig(r=rank, target_modules="all-linear")
    torch.manual_seed(0)
    return peft.get_peft_model(model, adapters)


def copy_of(model: nn.Module) -> nn.Module:
    """The same weights in tensors of their own."""
    return copy.deepcopy(model)


def random_documents(
    count: int, length: int, vocabulary: int, device: torch.device
) -> dict[str, Tensor]:
    """A batch of documents of random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (count, length), generator=generator).to(device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


# Beyond this estimate the naive step takes its rows in several passes.
CPU_BUDGET = 8 * 2**30
DEVICE_SHARE = 0.7


def naive_rows_at_once(
    preset: Preset, model: LlamaForCausalLM, device: torch.device, attention: str
) -> int:
    """How many of the n rows a pass of the naive step holds: all, if an estimate fits the budget.

    The estimate is what a training pass keeps for its backward: about ten hidden states and four
    intermediate ones per layer, three copies of the logits, of which two in float32, and with eager
    attention two matrices of scores per layer and head. On a CPU
    the budget is fixed, so that figures can be compared; on a GPU it follows its memory.
    """
    config = model.config
    per_layer = 10 * config.hidden_size + 4 * config.intermediate_size
    kept = config.num_hidden_layers * per_layer * model.dtype.itemsize
    logits = config.vocab_size * (2 * torch.float32.itemsize + model.dtype.itemsize)
    row = preset.naive_row * (kept + logits)
    if attention == "eager":
        heads = config.num_hidden_layers * config.num_attention_heads
        row += 2 * heads * preset.naive_row**2 * model.dtype.itemsize
    budget = CPU_BUDGET
    if device.type == "cuda":
        budget = int(DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory)
    fitting = [n for n in range(1, preset.n_samples + 1) if n == 1 or n * row <= budget]
    return max(n for n in fitting if preset.n_samples % n == 0)


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what the figures were measured."""
    return {
        "device": _cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {
            "hf_ebft": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "peft": peft.__version__,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
