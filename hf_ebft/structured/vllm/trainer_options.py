"""Reads what the server needs from TRL's trainer: options, tokenizer, prompts as tokens."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import ProcessorMixin

from hf_ebft.structured.vllm.prefetch import StalenessAware
from hf_ebft.structured.vllm.settings import VLLMServerArguments

PLAIN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,),
    "top_k": (0,),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None, {}),
}
"""Options of TRL with the values that do not change the distribution at the temperature."""


def check_trainer(trainer: Any, settings: VLLMServerArguments) -> None:
    """Raise for options with which the server's distribution would differ from the trained one.

    Raises:
        ValueError: naming the option, the reason and what to write instead.
    """
    args = trainer.args
    settings.validate_vllm_server(args.use_vllm)
    for name, plain in PLAIN_SAMPLING.items():
        value = getattr(args, name)
        if value not in plain:
            raise ValueError(
                f"{name}={value!r} makes the server sample from another distribution than the "
                "softmax that the policy's log-probs are of, and the importance ratio would be "
                f"wrong; leave it at {plain[0]!r}."
            )
    if trainer.tools:
        raise ValueError(
            "tools need several turns with TRL's own generation; rollouts from a stock vLLM server "
            "have one."
        )
    if settings.async_prefetch and not isinstance(trainer, StalenessAware):
        raise ValueError(
            f"async_prefetch=True needs a trainer that says which batch is next, and "
            f"{type(trainer).__name__} does not; use EBFTGRPOTrainer, or put StalenessCorrection "
            "before GRPOTrainer: class Trainer(StalenessCorrection, GRPOTrainer)."
        )
    if settings.vllm_sync_interval > 1 and not isinstance(trainer, StalenessAware):
        raise ValueError(
            f"vllm_sync_interval={settings.vllm_sync_interval} makes rollouts stale, and "
            f"{type(trainer).__name__} would take them as fresh: TRL reads the log-probs of a "
            "rollout_func only with use_vllm. Use EBFTGRPOTrainer, put StalenessCorrection before "
            "GRPOTrainer (class Trainer(StalenessCorrection, GRPOTrainer)), or set "
            "vllm_sync_interval=1."
        )


def get_max_tokens(trainer: Any) -> int:
    """Largest number of tokens of a completion of the current batch."""
    if isinstance(trainer, StalenessAware):
        return trainer.rollout_budget()
    return trainer.max_completion_length


def get_tokenizer(trainer: Any) -> Any:
    """The policy's tokenizer, also if the trainer has a processor that contains it."""
    processing = trainer.processing_class
    return processing.tokenizer if isinstance(processing, ProcessorMixin) else processing


def get_vocabulary_size(trainer: Any) -> int:
    """Rows of the policy's embedding."""
    embedding = trainer.accelerator.unwrap_model(trainer.model).get_input_embeddings()
    if isinstance(embedding, BaseTunerLayer):  # an adapter around it
        embedding = embedding.get_base_layer()
    return embedding.num_embeddings


def tokenize_prompts(prompts: list[Any], trainer: Any) -> list[list[int]]:
    """Token ids of prompts; chats are rendered with the trainer's chat template.

    Raises:
        ValueError: the prompts contain more than text.
    """
    if not prompts:
        return []
    processing = trainer.processing_class
    if isinstance(prompts[0], str):
        encoded = processing(text=prompts)
    else:
        encoded = processing.apply_chat_template(
            conversation=prompts,
            chat_template=trainer.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **trainer.chat_template_kwargs,
        )
    beyond = set(encoded) - {"input_ids", "attention_mask", "token_type_ids"}
    if beyond:
        raise ValueError(
            f"these prompts have {', '.join(sorted(beyond))} beside their tokens; rollouts from a "
            "stock vLLM server take text only."
        )
    return [list(ids) for ids in encoded["input_ids"]]
