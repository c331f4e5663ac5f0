"""What comes before `train()`: evaluation and logging that leave no trace, and a check of FSDP."""

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

# accelerate sets it on every model that it has prepared, and then prepares it no second time.
_PREPARED = "_is_accelerate_prepared"


class BeforeTrainingMixin(Trainer):
    """Goes before `Trainer` (or a subclass) among the bases of a trainer.

    - `evaluate()` or `predict()` before `train()`: `Trainer` has accelerate prepare the model for
      evaluation, which marks it as prepared, so that `train()` would not wrap it into DDP: each
      process would train on its own gradients. Here the mark is taken off again. Under FSDP the
      model is sharded as `train()` does it, once for both.
    - `bf16_full_eval` and `fp16_full_eval`: `Trainer` casts the weights and leaves them so; a
      later `train()` or `save_model()` would go on with rounded ones. Here it casts stand-ins. They
      need memory beside the weights: half as much again, for weights in float32.
    - FSDP1 is refused.
    - A log before `train()`: TensorBoard's writer would open in `./runs` of the current folder, and
      stay there. Here it opens in `output_dir/runs`, as in `train()`.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """The parent's; FSDP1 is refused, whoever asked for it.

        Raises:
            ValueError: `fsdp_version` is not 2, or `bf16_full_eval` or `fp16_full_eval` is set
                with FSDP.
        """
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and (self.args.bf16_full_eval or self.args.fp16_full_eval):
            raise ValueError(
                "bf16_full_eval and fp16_full_eval cast the weights in place, which is not "
                "supported for the shards of FSDP: training and checkpoints would go on with "
                "rounded ones. Leave them off; with bf16=True evaluation computes in bfloat16, too."
            )
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError(
                "FSDP1 is not supported: it flattens the weights that EBFT reads layer by layer. "
                "Use FSDP2, by fsdp_version: 2 in accelerate's configuration "
                "(accelerate_configs/fsdp2.yaml) or fsdp_config={'version': 2}."
            )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The parent's loop; the model can be prepared for training afterwards."""
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
        """Let an evaluation that casts the weights cast others, which share memory until then.

        To cast a parameter in place and back would cut it off from the hooks by which DDP averages
        its gradients: a later `train()` would let the processes drift apart.
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
        """Shard the policy as `train()` does, together with its optimizer, as FSDP2 needs it."""
        self.create_optimizer()
        model: Any = self.model
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        if hasattr(model, "generate"):
            register_fsdp_forward_method(self.model, "generate")
        self.model_wrapped = self.model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, on parameters that FSDP2 has sharded again after a forward pass."""
        model: Any = self.model
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's; TensorBoard's folder is that of `train()`."""
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
    """Whether accelerate has prepared the model itself; DDP's mark is on its wrapper."""
    return bool(getattr(model, _PREPARED, False))
