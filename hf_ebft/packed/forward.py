"""Forward passes of a model over packed rows, always through the wrapped model.

DDP, FSDP2, PEFT and autocast act on calls of the outermost model. So this module calls that model
and never a backbone inside it.

Dimension letters: B rows of the batch, Q tokens fed, P tokens whose logits are kept, V vocabulary,
X width of a state.
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

from hf_ebft.packed.compiled_layers import CompileOptions, compile_layers, uncompile_layers
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

# The cache entry of a layer that uses another layer's keys and values; older releases have none.
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
    """How one model runs packed rows; built once from the bare model, used with the wrapped one.

    Attributes:
        recipe: how to make the model's attention masks.
        limits: maximum lengths of documents and rows.
        config: the model's configuration.
        takes_logits_to_keep: whether the model's forward takes the argument `logits_to_keep`.
        head: the model's head, for computing logits in chunks; None if it is not recognised.
        cache_argument: name of the forward's argument for the cache.
        noise_per_pass: whether training mode may draw noise once per pass, see
            `has_noise_per_pass`.
        compiler: options with which layers and head are compiled; None: they are not compiled.
        decoding: what earlier batches have shown about decoding.
    """

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
        """Check a model, set its attention and find out how it runs packed rows.

        Args:
            model: the model, bare or wrapped by PEFT.
            packed_attention: see `StridedArguments`.
            device_type: type of the device on which the model will compute; default: that of its
                weights.
            trains: whether the model is trained. If so, one short pass may be made to find out
                whether training mode draws noise once per pass.
            compiler: options with which its layers (in place) and its head are compiled; None:
                nothing is compiled.

        Raises:
            ValueError: the model cannot be exact on packed rows (see
                `hf_ebft.packed.supported`).
        """
        limits = check_supported(model)
        if compiler is not None:
            compile_layers(model, compiler)
        elif trains:  # an earlier trainer may have compiled them
            uncompile_layers(model)
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
        """Logits of chosen tokens.

        Args:
            model: the wrapped policy.
            input_ids: (B, Q).
            part: the part of the packed row that these tokens are.
            keep: (P,) int64, indices of the tokens whose logits to return, among the Q tokens.
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
        """Run a forward pass and compute something from logits, without holding all of them.

        Args:
            model, input_ids, part, keep, cache: as in `logits`.
            compute: called inside the model's forward. Its arguments are one state per kept token,
                (B, P, X), and a function that computes logits (N, V) from any of these states
                (N, X). If the model's head was not recognised, the states are the logits.

        Returns:
            The return value of `compute`.

        Raises:
            RuntimeError: the model's forward did not call its head.
        """
        if self.head is None:
            logits = self.logits(model, input_ids, part, keep, cache=cache)
            return compute(logits, lambda rows: rows)

        def kept_only(hidden: Tensor, to_logits: ToLogits) -> list[Tensor]:
            # A model with logits_to_keep has already selected the kept hidden states.
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
        """Make a cache that keeps every key.

        In transformers' default cache, sliding-window layers drop keys that later blocks still
        need. Here only the mask limits the window.

        Args:
            states: the cache's initial keys and values, (B, H, C, E) each, of every layer or of the
                lowest layers; None: the cache is empty.
        """
        cache = RowCache(config=self.config.get_text_config(decoder=True))
        cache.layers = [
            DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer
            for layer in cache.layers
        ]
        if states is not None:
            pairs = list(zip(states[::2], states[1::2], strict=True))
            # A model that runs layers several times has a cache entry for each run.
            cache.layers += [DynamicLayer() for _ in range(len(pairs) - len(cache.layers))]
            layers = cast(list[DynamicLayer], cache.layers)[: len(pairs)]
            for layer, (keys, values) in zip(layers, pairs, strict=True):
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
        return cache

    @property
    def compiles_by_shape(self) -> bool:
        """Whether code is compiled for each new shape of a pass."""
        return self.recipe.implementation == FLEX or self.compiler is not None

    @cached_property
    def has_plain_cache(self) -> bool:
        """Whether the model's cache holds keys and values of its layers and nothing else.

        A row can then be fed in parts, where later parts see a cache of the earlier ones.
        """
        config = self.config.get_text_config(decoder=True)
        # Without images these layers do not run, and their cache entries stay empty.
        if getattr(config, "cross_attention_layers", None):
            return False
        layers = self.new_cache().layers
        # Layers that use keys and values of earlier layers come last and have none of their own.
        if self.shares_keys:
            layers = [layer for layer in layers if type(layer) is not _Keyless]
        return all(type(layer) is DynamicLayer for layer in layers)

    @property
    def shares_keys(self) -> bool:
        """Whether the highest layers use keys and values of lower ones."""
        return shares_keys(self.config)


def is_random_in_training(model: nn.Module) -> bool:
    """Whether dropout or other noise makes training mode differ from evaluation mode."""
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

    Its noise becomes smaller as the input of a pass becomes longer, so a part of a row would get
    larger noise than the whole row.
    """
    embeddings = bare_model(model).get_input_embeddings()
    return bool(getattr(embeddings, "neftune_noise_alpha", None))


def has_noise_per_pass(model: nn.Module) -> bool:
    """Whether training mode may draw noise once per pass instead of once per token.

    Examples are LayerDrop, noise in hooks, and dropout whose rate is written in the code. With such
    noise, parts of a row could be computed by different networks. If no setting shows it, one short
    pass is made: noise advances the random generator, whose state is restored afterwards.
    """
    config = bare_model(model).config.get_text_config(decoder=True)
    if getattr(config, "layerdrop", 0) > 0:
        return True
    if is_random_in_training(model):
        return False
    # Sharded models are never called in parts, and a call would need all processes.
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
    except Exception:  # if the model cannot run, the self-test reports it
        return False
    finally:
        for module in resting:
            module.training = False


def _is_random(adapter: Any) -> bool:
    """Whether a PEFT method is random in training mode: it draws or drops weights."""
    return adapter.peft_type == "PVERA" or any(
        isinstance(value, float) and value > 0
        for name, value in vars(adapter).items()
        if name.endswith("dropout")
    )


def _drops(module: nn.Module) -> bool:
    """Whether a module is a dropout layer with a rate above 0, or has a dropout rate above 0."""
    if isinstance(module, _DROPOUTS):
        return module.p > 0
    return any(
        isinstance(value, float) and value > 0 and "drop" in name
        for name, value in vars(module).items()
    )


def states_in(cache: DynamicCache) -> list[Tensor]:
    """Keys and values of every layer of a cache that is not empty, (B, H, C, E) each.

    The list has the order that `PackedForward.new_cache` takes.
    """
    layers = [layer for layer in cast(list[DynamicLayer], cache.layers) if layer.keys is not None]
    return [cast(Tensor, state) for layer in layers for state in (layer.keys, layer.values)]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient within the context; each module's mode is restored after it.

    Sampling must run without dropout and without gradient checkpointing (which drops the cache).
    Modules that the user keeps in evaluation mode stay in it afterwards.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
