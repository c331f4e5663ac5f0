"""The decoding steps of sampling, which follow the pass over the documents.

For most models, every step is the same function of tensors at fixed addresses (`StaticDecoder`):
tokens, their log-probabilities, random numbers drawn beforehand, keys and values with a slot for
every step, and the number of the step. On CUDA, such a step is captured as a CUDA graph when its
shapes occur for the second time. Other models are decoded against a cache that grows.

Dimension letters: B rows of the batch, S document tokens, K blocks, n samples, m = K * n rollouts
of a row, G rollout length.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache, PreTrainedModel

from hf_ebft.packed.compiled_layers import layers_as_written
from hf_ebft.packed.drawing import Sampler
from hf_ebft.packed.flex import FLEX
from hf_ebft.packed.forward import PackedForward, states_in
from hf_ebft.packed.fsdp import is_sharded
from hf_ebft.packed.heads import ToLogits
from hf_ebft.packed.model_code import calls_chosen_attention
from hf_ebft.packed.model_parts import bare_model, keeping_every_state
from hf_ebft.packed.static_cache import CannotDecodeStatically, Slot, StaticCache, decoding_against
from hf_ebft.packed.step_views import StepViews
from hf_ebft.rows.layout import PackedLayout

# With static shapes, the numbers of document columns and of rollouts are padded to multiples of
# this, the tile size of flex_attention.
MULTIPLE = 128

logger = logging.getLogger(__name__)


def decode(
    model: nn.Module,
    forward: PackedForward,
    layout: PackedLayout,
    sampler: Sampler,
    cache: DynamicCache,
    first: list[Tensor],
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the G - 1 decoding steps that follow the first tokens.

    The host does not wait for the device in any step.

    Args:
        model: the wrapped policy, in evaluation mode.
        forward: how the policy runs packed rows.
        layout: the batch.
        sampler: how tokens are drawn.
        cache: keys and values of the documents.
        first: the first token of every rollout and its log-probability, (B, m) each.
        uniform: (G - 1, B, m) float64, random numbers for `hf_ebft.packed.drawing.draw`.

    Returns:
        All tokens (B, n, K, G) and their log-probabilities.
    """
    if len(uniform) == 0:
        return _in_order(layout, [part[None] for part in first])
    decoding = forward.decoding
    if decoding.grows is None:
        try:
            if not decoding.works and (reason := why_cache_grows(model, forward, cache)):
                raise CannotDecodeStatically(reason)
            static = decoding.static
            if static is None:
                static = uniform.device.type != "cpu"
            decoder = StaticDecoder(
                model, forward, layout, sampler, cache, first, uniform, static=static
            )
            found = decoding.graphs.run(decoder, len(uniform))
            decoding.works = True
            return _in_order(layout, [part[..., : uniform.shape[2]] for part in found])
        # A model's code may raise anything if it is given a cache of another class.
        except Exception as error:
            if decoding.works or isinstance(error, torch.OutOfMemoryError):
                raise
            decoding.grows = _log_growing(model, error)
    return _decode_growing(model, forward, layout, sampler, cache, first, uniform)


def why_cache_grows(model: nn.Module, forward: PackedForward, cache: DynamicCache) -> str | None:
    """Why a model cannot be decoded against a static cache; None if no reason is known beforehand.

    Args:
        model: the wrapped policy.
        forward: how the policy runs packed rows.
        cache: keys and values of the documents.
    """
    if not forward.has_plain_cache:
        return "its cache holds more than keys and values of every layer"
    if not calls_chosen_attention(model):
        return "its code does not call the attention function that its configuration names"
    inside = _transformers_model(model)
    if not (inside._supports_sdpa or inside._supports_flex_attn):
        return "its code may compute a part of attention outside the attention function"
    rank = getattr(forward.config.get_text_config(decoder=True), "kv_lora_rank", None)
    if rank is not None and states_in(cache)[0].shape[1::2] == (1, rank):
        return "its cache holds latents, from which it computes all keys and values in every step"
    return None


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    """The outermost transformers model inside all wrappers."""
    return next(part for part in model.modules() if isinstance(part, PreTrainedModel))


def _log_growing(model: nn.Module, error: Exception) -> str:
    """Log that the cache grows, and return the reason.

    An unexpected error is logged with its traceback, because it may be a bug of ours.
    """
    foreseen = isinstance(error, CannotDecodeStatically)
    raised = f"a decoding step with a static cache raised {type(error).__name__}: {error}"
    reason = str(error) if foreseen else raised
    logger.warning(
        "%s is decoded with a cache that grows in every step, because %s. That takes more time, "
        "and no CUDA graph can be used.",
        type(_transformers_model(model)).__name__,
        reason,
        exc_info=None if foreseen else error,
    )
    return reason


def _in_order(layout: PackedLayout, by_step: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Reorder tokens and log-probabilities, (G, B, m) each, to (B, n, K, G) each."""
    tokens, log_probs = (
        layout.from_row(part.permute(1, 2, 0).flatten(1)).contiguous() for part in by_step
    )
    return tokens, log_probs


def _decode_growing(
    model: nn.Module,
    forward: PackedForward,
    layout: PackedLayout,
    sampler: Sampler,
    cache: DynamicCache,
    first: list[Tensor],
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """`decode` with transformers' own cache, which grows in every step."""
    _, n_samples, n_blocks, length = layout.rollout_shape
    every_rollout = torch.arange(n_blocks * n_samples, device=uniform.device)
    parts = [layout.step_part(step) for step in range(length - 1)]
    for part in parts:
        forward.recipe.prepare(part)
    steps = [first]
    for part, numbers in zip(parts, uniform, strict=True):

        def draw(
            states: Tensor, to_logits: ToLogits, numbers: Tensor = numbers[..., None]
        ) -> list[Tensor]:
            return sampler(states, to_logits, numbers)

        text = steps[-1][0]
        # Keys and values have a new shape in every step, for which compiling would not pay.
        with layers_as_written():
            found = forward.through_head(model, text, part, every_rollout, draw, cache=cache)
        steps.append(found)
    return _in_order(layout, [torch.stack(of_steps) for of_steps in zip(*steps, strict=True)])


class StaticDecoder:
    """A decoding step as a function of tensors at fixed addresses.

    Args:
        model, forward, layout, sampler, cache, first, uniform: see `decode`.
        static: whether documents and rollouts are padded to multiples of `MULTIPLE`. Where blocks
            and documents lie then changes only the values of tensors, not their shapes, and few
            graphs serve batches of all lengths.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: PackedForward,
        layout: PackedLayout,
        sampler: Sampler,
        cache: DynamicCache,
        first: list[Tensor],
        uniform: Tensor,
        *,
        static: bool,
    ) -> None:
        self._static = static
        self.documents = [states.detach() for states in states_in(cache)]
        width = layout.document_width
        if static:
            layout, missing = _filled_up(layout)
            first = [pad(part, (0, missing)) for part in first]
            uniform = pad(uniform, (0, missing))
            to_fill = -width % MULTIPLE
            width += to_fill
            self.documents = [pad(states, (0, 0, 0, to_fill)) for states in self.documents]
        self.model = _callable_part(model)
        self.forward, self.sampler = forward, sampler
        self.n_steps = len(uniform)
        device = uniform.device
        self.uniform = uniform
        tokens, log_probs = first
        # Token and position ids of every step, (G, 2, B, m), together so that one operator reads
        # both.
        self._fed = tokens.new_zeros(self.n_steps + 1, 2, *tokens.shape)
        self.tokens, positions = self._fed.unbind(1)
        self.tokens[0] = tokens
        positions[:-1] = _positions(layout, self.n_steps)
        self.log_probs = torch.cat([log_probs[None], log_probs.new_zeros(self.tokens[1:].shape)])
        # The number of the current step, and of the next one.
        self._steps = torch.arange(2, device=device)
        self.slot = Slot(self._steps[:1], None if static else 0)
        self.views = StepViews(forward.recipe, layout, self.n_steps, width=width, static=static)
        self._kept = keeping_every_state(model, self.tokens[0])
        self._cache: StaticCache | None = None

    @property
    def state(self) -> list[Tensor]:
        """The tensors that a step writes, except the keys and values of slots not yet fed."""
        return [self._fed, self.log_probs, self._steps]

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that differ from batch to batch, including the documents' keys and values."""
        return [*self.state, self.uniform, *self.views.inputs, *self.documents]

    @property
    def identity(self) -> tuple[Any, ...]:
        """Everything a captured step depends on that is not the content of `inputs`.

        These are shapes, the sampler's settings, the addresses of the weights and the state of the
        adapters.
        """
        device = self.uniform.device
        shapes = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in self.inputs)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else None
        weights = [*self.model.parameters(), *self.model.buffers()]
        places = tuple(weight.data_ptr() for weight in weights)
        static = (id(self.model), self.sampler, device, dtype, self.views.shape)
        return (*static, shapes, places, _adapter_settings(self.model))

    @property
    def can_be_captured(self) -> bool:
        """Whether the step can be captured as a CUDA graph."""
        on_cuda = self.uniform.device.type == "cuda"
        return on_cuda and self.n_steps > 1 and _lies_whole_on(self.model, self.uniform.device)

    def own_documents(self) -> None:
        """Copy the documents' keys and values, so that no other code can change or free them."""
        self.documents = [states.detach().clone() for states in self.documents]

    def take_inputs_of(self, other: StaticDecoder) -> None:
        """Copy another batch of the same shapes into this decoder's tensors."""
        for own, new in zip(self.inputs, other.inputs, strict=True):
            own.copy_(new)

    @contextmanager
    def ready(self, *, traceable: bool = False) -> Iterator[None]:
        """Prepare the model for calls of `step`, within the context.

        Args:
            traceable: whether TorchDynamo traces the step through the model's head.
        """
        if self._cache is None:
            self._cache = StaticCache(
                self.documents,
                self.tokens.shape[2],
                self.n_steps,
                self.slot,
                self.views.by_kind,
                changes_scores=self.forward.recipe.implementation in ("eager", FLEX),
                few_shapes=self._static,
            )
        with ExitStack() as stack:
            stack.enter_context(_not_compiled(self.model))
            # The configuration of the model that is called: it may be a copy of the checked model.
            stack.enter_context(decoding_against(bare_model(self.model).config, self._cache))
            if self.forward.head is not None:
                stack.enter_context(
                    self.forward.head.replaced_by(self.model, self._draw, traceable=traceable)
                )
            if self.uniform.device.type == "cuda":
                # A capture covers the current device only, which may not be the model's.
                stack.enter_context(torch.cuda.device(self.uniform.device))
            yield

    def step(self) -> None:
        """Feed every rollout's newest token, draw the next one, and advance the step number."""
        assert self._cache is not None
        self.views.move_to(self.slot.index)
        masks: Any = self._cache.masks
        if not self.forward.recipe.by_layer_type:
            (masks,) = masks.values()
        input_ids, position_ids = self._fed.index_select(0, self.slot.index)[0].unbind()
        output = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=masks,
            use_cache=True,
            **self._kept,
            **{self.forward.cache_argument: self._cache},
        )
        if self.forward.head is None:
            self._draw(output.logits, lambda rows: rows)
        self._steps.add_(1)
        if self.slot.number is not None:
            self.slot.number += 1

    def step_alone(self) -> None:
        """`step`, without autocast's cached copies of weights, for a capture.

        Autocast caches cast copies of weights until its outermost context ends. Switching the cache
        off here would not help: accelerate's context around the model's forward has a setting of
        its own. A graph must not read such a copy, which is freed later. Later code must not read a
        copy made during the capture, which has no values before the first replay.
        """
        torch.clear_autocast_cache()
        try:
            self.step()
        finally:
            torch.clear_autocast_cache()

    def _draw(self, states: Tensor, to_logits: ToLogits) -> list[Tensor]:
        numbers = self.uniform.index_select(0, self.slot.index)[0]
        tokens, log_probs = self.sampler(states, to_logits, numbers[..., None])
        following = self._steps[1:]
        self.tokens.index_copy_(0, following, tokens[None])
        self.log_probs.index_copy_(0, following, log_probs[None])
        return []


def _filled_up(layout: PackedLayout) -> tuple[PackedLayout, int]:
    """Pad a layout with blocks that do not exist.

    Returns:
        The padded layout, and the number of rollouts added per row.
    """
    _, n_samples, n_blocks, _ = layout.rollout_shape
    granularity = MULTIPLE // math.gcd(MULTIPLE, n_samples)
    missing = -n_blocks % granularity
    return layout.select_blocks(slice(0, n_blocks + missing)), missing * n_samples


def _callable_part(model: nn.Module) -> nn.Module:
    """The policy without DDP and without `torch.compile`'s wrapper.

    DDP would broadcast the policy's buffers before every step.
    """
    if isinstance(model, DistributedDataParallel):
        return _callable_part(model.module)
    inside = getattr(model, "_orig_mod", None)
    return inside if isinstance(inside, nn.Module) else model


@contextmanager
def _not_compiled(model: nn.Module) -> Iterator[None]:
    """Run modules that `nn.Module.compile` compiled without their compiled code.

    With a cache, such layers would be compiled one by one. Layers that the setting `torch_compile`
    compiled stay compiled, see `compiled_layers`.
    """
    compiled: list[Any] = [part for part in model.modules() if part._compiled_call_impl is not None]
    before = [part._compiled_call_impl for part in compiled]
    for part in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in zip(compiled, before, strict=True):
            part._compiled_call_impl = call


def _lies_whole_on(model: nn.Module, device: torch.device) -> bool:
    """Whether all weights are on the device, so that using one needs no other process or device.

    A capture could not record the transfer of a weight.
    """
    weights = model.parameters()
    return not is_sharded(model) and all(weight.device == device for weight in weights)


def _positions(layout: PackedLayout, n_steps: int) -> Tensor:
    """(G - 1, B, m) position ids of the tokens that the steps feed."""
    blocks = layout.blocks
    steps = torch.arange(n_steps, device=blocks.position.device)[:, None, None]
    by_block = (blocks.position + steps) * blocks.exists
    return by_block.repeat_interleave(layout.n_samples, dim=2)


def _adapter_settings(model: nn.Module) -> tuple[Any, ...]:
    """The state of a PEFT model's adapters: which are active or merged, and their scaling."""
    if bare_model(model) is model:
        return ()
    layers: list[Any] = [part for part in model.modules() if hasattr(part, "merged_adapters")]
    return tuple(
        (
            tuple(module.active_adapters),
            module.disable_adapters,
            tuple(module.merged_adapters),
            tuple(sorted(getattr(module, "scaling", {}).items())),
        )
        for module in layers
    )
