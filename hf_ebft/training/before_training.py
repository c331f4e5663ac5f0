"""Evaluation and logging before `train()` that do not affect it, and a check of FSDP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir
from transformers.trainer_utils import EvalLoopOutput

# accelerate sets this on every model that it has prepared, and does not prepare it again.
_PREPARED = "_is_accelerate_prepared"


class BeforeTrainingMixin(Trainer):
    """A base class to list before `Trainer` (or a subclass of it).

    - `evaluate()` or `predict()` before `train()`: `Trainer` lets accelerate prepare the model for
      evaluation, which marks the model as prepared. `train()` would then not wrap it into DDP, and
      each process would train on its own gradients. Here the mark is removed. Under FSDP the model
      is sharded as in `train()`, once for both.
    - `bf16_full_eval` and `fp16_full_eval`: `Trainer` casts the weights and does not restore them,
      so a later `train()` or `save_model()` would use rounded weights. Here copies are cast. They
      need additional memory: half as much as weights in float32.
    - FSDP1 is refused.
    - A log before `train()`: TensorBoard's writer would open in `./runs` of the current folder, and
      stay there. Here it opens in `output_dir/runs`, as in `train()`.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and refuse FSDP1, however it was configured.

        Raises:
            ValueError: `fsdp_version` is not 2, or `bf16_full_eval` or `fp16_full_eval` is set
                with FSDP.
        """
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and (self.args.bf16_full_eval or self.args.fp16_full_eval):
            raise ValueError(
                "bf16_full_eval and fp16_full_eval cast the weights in place. With FSDP, training "
                "and checkpoints would continue with the rounded weights. Leave both off; with "
                "bf16=True evaluation computes in bfloat16, too."
            )
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError(
                "FSDP1 is not supported: it flattens weights, but EBFT needs them layer by layer. "
                "Use FSDP2: set fsdp_version: 2 in accelerate's configuration "
                "(accelerate_configs/fsdp2.yaml), or fsdp_config={'version': 2}."
            )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; the model can still be prepared for training afterwards."""
        with self._model_unprepared_after(), self._weights_kept():
            return super().evaluation_loop(*args, **kwargs)

    @contextmanager
    def _model_unprepared_after(self) -> Iterator[None]:
        model: Any = self.model
        started = self.is_in_train or self.model_wrapped is not model or _is_prepared(model)
        if started or not self.accelerator.use_distributed:
            yield
            return
        if self.is_fsdp_enabled:
            self._shard()
            yield
            return
        forward = model.__dict__.get("forward")
        try:
            yield
        finally:
            model.__dict__.pop(_PREPARED, None)
            # Mixed precision wraps forward in place.
            if model.__dict__.pop("_original_forward", None) is not None:
                model.__dict__.pop("forward")
                if forward is not None:
                    model.forward = forward
            prepared = self.accelerator._models
            prepared[:] = [other for other in prepared if _bare(other) is not model]
            self.model_wrapped = model  # without torch.compile's wrapper

    @contextmanager
    def _weights_kept(self) -> Iterator[None]:
        """Replace the weights by copies if the evaluation casts them; restore them afterwards.

        The copies share memory with the weights until they are cast. Casting a parameter in place
        and back would detach it from the hooks with which DDP averages its gradients, and in a
        later `train()` the weights of the processes would diverge.
        """
        args = self.args
        if self.is_in_train or not (args.bf16_full_eval or args.fp16_full_eval):
            yield
            return
        model: Any = self.model
        modules = list(model.modules())
        parameters = [dict(module._parameters) for module in modules]
        buffers = [dict(module._buffers) for module in modules]
        try:
            memo: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
            for module, own in zip(modules, parameters, strict=True):
                for name, weight in own.items():
                    if weight is not None:
                        if weight not in memo:
                            memo[weight] = nn.Parameter(weight.data, weight.requires_grad)
                        module._parameters[name] = memo[weight]
            yield
        finally:
            for module, own, kept in zip(modules, parameters, buffers, strict=True):
                module._parameters.update(own)
                module._buffers.update(kept)

    def _shard(self) -> None:
        """Shard the policy and its optimizer as `train()` does; FSDP2 needs both at once."""
        self.create_optimizer()
        model: Any = self.model
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        if hasattr(model, "generate"):
            register_fsdp_forward_method(self.model, "generate")
        self.model_wrapped = self.model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; under FSDP2, parameters that a forward pass has gathered are resharded first."""
        model: Any = self.model
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; before `train()`, TensorBoard's folder is set to the one that `train()` uses."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = os.path.join(str(self.args.output_dir), default_logdir())
        super().log(logs, start_time)


def _bare(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def _is_prepared(model: nn.Module) -> bool:
    """Whether accelerate has marked the model itself, and not a DDP wrapper, as prepared."""
    return bool(getattr(model, _PREPARED, False))
