"""Forward passes of the policy over packed rows, always through the wrapped model.

Going through the model that the trainer was handed, and never through a backbone inside it, is what
lets DDP, FSDP2, PEFT and autocast see the computation.

Dimension letters: B rows, Q tokens fed, P positions whose logits are kept, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_ebft.attention import MaskRecipe
from hf_ebft.layout import Coordinates
from hf_ebft.support import RowLimits, bare_model, check_supported, set_packed_attention


@dataclass(frozen=True)
class PackedForward:
    """How one model runs packed rows; built once from the bare model, used with the wrapped one."""

    recipe: MaskRecipe
    limits: RowLimits
    config: Any
    takes_logits_to_keep: bool

    @classmethod
    def of(cls, model: nn.Module, packed_attention: str = "auto") -> PackedForward:
        """Check the model, set its attention and read its recipe.

        Raises:
            ValueError: the model cannot be exact on packed rows (see :mod:`hf_ebft.support`).
        """
        limits = check_supported(model)
        base = bare_model(model)
        set_packed_attention(model, packed_attention)
        return cls(
            recipe=MaskRecipe.of(base),
            limits=limits,
            config=base.config,
            takes_logits_to_keep="logits_to_keep" in inspect.signature(base.forward).parameters,
        )

    def logits(
        self,
        model: nn.Module,
        input_ids: Tensor,
        queries: Coordinates,
        keep: Tensor,
        *,
        keys: Coordinates | None = None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Logits at chosen positions.

        Args:
            model: the wrapped policy.
            input_ids: (B, Q).
            queries: coordinates of these tokens.
            keep: (P,) int64, which of the Q tokens to return logits for.
            keys: coordinates of the tokens in the cache followed by the queries; default: the
                queries alone.
            cache: keys and values of earlier tokens, extended in place.

        Returns:
            (B, P, V) in the model's dtype.
        """
        arguments: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": queries.position,
            "attention_mask": self.recipe.build(queries, queries if keys is None else keys),
            "use_cache": cache is not None,
        }
        if cache is not None:
            arguments["past_key_values"] = cache
        if self.takes_logits_to_keep:
            return model(**arguments, logits_to_keep=keep).logits
        return model(**arguments).logits[:, keep]

    def new_cache(self) -> DynamicCache:
        """An empty cache that keeps every key.

        Sliding-window layers of a default cache drop keys that later blocks still need; here the
        window is the mask's affair.
        """
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        cache.layers = [
            DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer
            for layer in cache.layers
        ]
        return cache


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """No gradient and evaluation mode, then every module's own mode again.

    Sampling must see neither dropout nor gradient checkpointing (which drops the cache), and
    modules that the user keeps in evaluation mode must stay so afterwards.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
