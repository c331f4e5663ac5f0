"""Forward passes of a model over packed rows, always through the wrapped model.

DDP, FSDP2, PEFT and autocast act on calls of the model that the trainer holds, so a backbone inside
it is never called.

Dimension letters: B rows of the batch, Q tokens fed, P positions whose logits are kept, V
vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_ebft.packed.compiled_layers import CompileOptions, compile_layers
from hf_ebft.packed.decoding_state import Decoding
from hf_ebft.packed.flex import FLEX
from hf_ebft.packed.fsdp import is_sharded
from hf_ebft.packed.heads import Head, ToLogits
from hf_ebft.packed.layer_caches import RowCache
from hf_ebft.packed.masks import MaskRecipe
from hf_ebft.packed.model_code import find_head
from hf_ebft.packed.model_parts import (
    active_adapter_configs,
    bare_model,
    cache_argument,
    shares_keys,
)
from hf_ebft.packed.supported import RowLimits, check_supported, set_packed_attention
from hf_ebft.rows.layout import PackedPart

# What a layer that uses the keys and values of another has in a cache; in older releases nothing.
_Keyless = getattr(cache_utils, "DummyLayer", None)
_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


@dataclass(frozen=True)
class PackedForward:
    """How one model runs packed rows; built once from the bare model, used with the wrapped one."""

    recipe: MaskRecipe
    limits: RowLimits
    config: Any
    takes_logits_to_keep: bool
    head: Head | None
    cache_argument: str
    noise_per_pass: bool = False
    compiler: CompileOptions | None = None
    decoding: Decoding = field(default_factory=Decoding, init=False, repr=False, compare=False)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        packed_attention: str = "auto",
        *,
        device_type: str | None = None,
        trains: bool = False,
        compiler: CompileOptions | None = None,
    ) -> PackedForward:
        """Check the model, set its attention and read its recipe.

        Args:
            model: the bare or PEFT model.
            packed_attention: see `StridedArguments`.
            device_type: of the device on which the model will compute; default: where it is.
            trains: it is trained; also find out whether training mode draws noise for a whole
                pass, by one short pass.
            compiler: compiles its layers, in place, and its head; None: nothing does.

        Raises:
            ValueError: the model cannot be exact on packed rows (see
                `hf_ebft.packed.supported`).
        """
        limits = check_supported(model)
        if compiler is not None:
            compile_layers(model, compiler)
        base = bare_model(model)
        set_packed_attention(
            model,
            packed_attention,
            device_type=device_type,
            trains=trains,
            compiles=compiler is not None,
        )
        return cls(
            recipe=MaskRecipe.for_model(base),
            limits=limits,
            config=base.config,
            takes_logits_to_keep="logits_to_keep" in inspect.signature(base.forward).parameters,
            head=find_head(model),
            cache_argument=cache_argument(model),
            noise_per_pass=trains and has_noise_per_pass(model),
            compiler=compiler,
        )

    def logits(
        self,
        model: nn.Module,
        input_ids: Tensor,
        part: PackedPart,
        keep: Tensor,
        *,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Logits at chosen positions.

        Args:
            model: the wrapped policy.
            input_ids: (B, Q).
            part: which part of the packed row these tokens are.
            keep: (P,) int64, which of the Q tokens to return logits for.
            cache: keys and values of earlier tokens, extended in place.

        Returns:
            (B, P, V) in the model's dtype.
        """
        arguments: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": part.queries.position,
            "attention_mask": self.recipe.masks_for(part),
            "use_cache": cache is not None,
        }
        if cache is not None:
            arguments[self.cache_argument] = cache
        if self.takes_logits_to_keep:
            return model(**arguments, logits_to_keep=keep).logits
        return model(**arguments).logits[:, keep]

    def through_head(
        self,
        model: nn.Module,
        input_ids: Tensor,
        part: PackedPart,
        keep: Tensor,
        compute: Callable[[Tensor, ToLogits], list[Tensor]],
        *,
        cache: DynamicCache | None = None,
    ) -> list[Tensor]:
        """A forward pass that computes something from logits without ever holding all of them.

        Args:
            model, input_ids, part, keep, cache: as in `logits`.
            compute: gets one state per kept token, (B, P, X), and what makes logits (N, V) of any
                such states (N, X). It runs inside the model's forward. Where the model's head
                cannot be taken apart, the states are the logits.

        Returns:
            What `compute` returned.
        """
        if self.head is None:
            logits = self.logits(model, input_ids, part, keep, cache=cache)
            return compute(logits, lambda rows: rows)

        def kept_only(hidden: Tensor, to_logits: ToLogits) -> list[Tensor]:
            # A model that knows logits_to_keep has cut its hidden states already.
            return compute(hidden if self.takes_logits_to_keep else hidden[:, keep], to_logits)

        with self.head.replaced_by(
            model, kept_only, traceable=self.compiler is not None
        ) as results:
            nothing = self.logits(model, input_ids, part, keep, cache=cache)
        if not results:
            raise RuntimeError(
                f"The forward of {type(model).__name__} did not call its own {self.head.name}. If "
                "something replaces the model's forward, build the trainer after it."
            )
        if nothing.requires_grad:
            # The zeros that the model returned must take part in the loss (see Head.replaced_by).
            at = next(i for i, result in enumerate(results) if result.requires_grad)
            results[at] = results[at] + nothing.sum()
        return results

    def new_cache(self, states: Sequence[Tensor] | None = None) -> DynamicCache:
        """A cache that keeps every key.

        Sliding-window layers of a default cache drop keys that later blocks still need; here the
        window is the mask's affair.

        Args:
            states: keys and values of every layer, (B, H, C, E) each, to start with, or of the
                lowest layers; None: empty.
        """
        cache = RowCache(config=self.config.get_text_config(decoder=True))
        cache.layers = [
            DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer
            for layer in cache.layers
        ]
        if states is not None:
            pairs = list(zip(states[::2], states[1::2], strict=True))
            # Models that run layers several times have more of them in their cache.
            cache.layers += [DynamicLayer() for _ in range(len(pairs) - len(cache.layers))]
            layers = cast(list[DynamicLayer], cache.layers)[: len(pairs)]
            for layer, (keys, values) in zip(layers, pairs, strict=True):
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
        return cache

    @property
    def compiles_by_shape(self) -> bool:
        """Whether something is compiled for each shape of a pass."""
        return self.recipe.implementation == FLEX or self.compiler is not None

    @cached_property
    def has_plain_cache(self) -> bool:
        """Whether keys and values of every layer are all that the model's cache holds.

        Then a row may be fed in parts, later ones against a cache of the earlier ones.
        """
        config = self.config.get_text_config(decoder=True)
        # Text alone does not reach these layers, and leaves their part of the cache empty.
        if getattr(config, "cross_attention_layers", None):
            return False
        layers = self.new_cache().layers
        # Layers that use the keys and values of earlier ones come last, and keep none themselves.
        if self.shares_keys:
            layers = [layer for layer in layers if type(layer) is not _Keyless]
        return all(type(layer) is DynamicLayer for layer in layers)

    @property
    def shares_keys(self) -> bool:
        """Whether the highest layers use keys and values of lower ones."""
        return shares_keys(self.config)


def is_random_in_training(model: nn.Module) -> bool:
    """Whether dropout, or noise of another kind, tells training mode from evaluation mode."""
    config = bare_model(model).config.get_text_config(decoder=True)
    by_configuration = any(
        value > 0
        for name, value in vars(config).items()
        if isinstance(value, float) and any(word in name for word in ("drop", "jitter", "noise"))
    )
    return (
        by_configuration
        or has_noisy_embeddings(model)
        or any(_is_random(adapter) for adapter in active_adapter_configs(model))
        or any(_drops(module) for module in model.modules())
    )


def has_noisy_embeddings(model: nn.Module) -> bool:
    """Whether NEFTune (`neftune_noise_alpha`) adds noise to embeddings in training mode.

    Its noise is the smaller the longer the input of a pass is, so that parts of a row would get
    other noise than the row.
    """
    embeddings = bare_model(model).get_input_embeddings()
    return bool(getattr(embeddings, "neftune_noise_alpha", None))


def has_noise_per_pass(model: nn.Module) -> bool:
    """Whether training mode draws what is not known to be drawn for each token on its own.

    Such noise (LayerDrop, noise in hooks, dropout by a function with its rate in the code) may be
    one for a whole pass, so that parts of a row would be computed by different networks. Where no
    setting tells, one short pass does: it moves the random generator.
    """
    config = bare_model(model).config.get_text_config(decoder=True)
    if getattr(config, "layerdrop", 0) > 0:
        return True
    if is_random_in_training(model):
        return False
    # Sharded models are never called in parts, and calling one takes every process.
    if is_sharded(model) or any(weight.is_meta for weight in model.parameters()):
        return False
    device = next(model.parameters()).device
    on_accelerator = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    generators = torch if device.type == "cpu" else torch.get_device_module(device)
    resting = [module for module in model.modules() if not module.training]
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng(on_accelerator, device_type=kind):
            before = generators.get_rng_state()
            ids = torch.zeros(1, 4, dtype=torch.long, device=device)
            model(input_ids=ids, use_cache=False)
            return not torch.equal(before, generators.get_rng_state())
    except Exception:  # what a model cannot do is for the self-test to say
        return False
    finally:
        for module in resting:
            module.training = False


def _is_random(adapter: Any) -> bool:
    """Whether a PEFT method draws in training mode: its weights, or which of them to leave out."""
    return adapter.peft_type == "PVERA" or any(
        isinstance(value, float) and value > 0
        for name, value in vars(adapter).items()
        if name.endswith("dropout")
    )


def _drops(module: nn.Module) -> bool:
    """Whether a module drops something in training mode, by itself or with a function."""
    if isinstance(module, _DROPOUTS):
        return module.p > 0
    return any(
        isinstance(value, float) and value > 0 and "drop" in name
        for name, value in vars(module).items()
    )


def states_in(cache: DynamicCache) -> list[Tensor]:
    """Keys and values of every layer that a pass went through, (B, H, C, E) each, as
    `PackedForward.new_cache` takes them.
    """
    layers = [layer for layer in cast(list[DynamicLayer], cache.layers) if layer.keys is not None]
    return [cast(Tensor, state) for layer in layers for state in (layer.keys, layer.values)]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
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
