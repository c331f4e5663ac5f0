"""The head of a language model, applied to one chunk of hidden states at a time.

The logits of all kept tokens of a packed row would be by far the largest tensor of a training step.
So they are computed chunk by chunk. This happens inside the model's own forward pass, where
parameters are gathered, adapters are active and autocast is on.

Dimension letters: B rows of the batch, Q tokens fed, N states in any order, H hidden width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Hidden states (N, H) -> logits (N, V).
ToLogits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Head:
    """How a model turns its last hidden states into logits.

    Attributes:
        name: name of the output embeddings in the model.
        scale: multiplies the output of the output embeddings.
        softcap: soft cap on the logits, `softcap * tanh(logits / softcap)`; None: no cap.
    """

    name: str
    scale: float = 1.0
    softcap: float | None = None

    def finish(self, logits: Tensor) -> Tensor:
        """Apply the scale and the soft cap to the output of the output embeddings, elementwise."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @contextmanager
    def replaced_by(
        self,
        model: nn.Module,
        compute: Callable[[Tensor, ToLogits], list[Tensor]],
        *,
        traceable: bool = False,
    ) -> Iterator[list[Tensor]]:
        """Within the context, let the model compute something else instead of logits.

        Args:
            model: the model that will be called, wrapped or not.
            compute: called once per call of the model. Its arguments are the hidden states
                (B, Q, H) that the model passes to its head, and a function that computes logits
                (N, V) from any of them (N, H).
            traceable: whether TorchDynamo may trace `compute` as part of the model.

        Yields:
            A list. After the model's forward has run, it contains the results of `compute`. The
            model returns zeros in place of logits. If the results have a gradient, the zeros depend
            on them: FSDP2 gathers parameters when the gradient of the model's output arrives, and
            this must happen before the results' gradient needs the parameters.
        """
        results: list[Tensor] = []
        inside = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
        head = getattr(inside, self.name)
        given = head.__dict__.get("forward")  # set by a library that hooks modules this way
        original = head.forward

        def instead(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            results.extend(
                compute(hidden, lambda rows: self.finish(original(rows, *args, **kwargs)))
            )
            zeros = hidden.new_zeros(*hidden.shape[:-1], 1)
            anchors = [result.sum() * 0.0 for result in results if result.requires_grad]
            return zeros + sum(anchors) if anchors else zeros

        # A compiled model breaks its graph here, because `compute` is a new function in every call.
        head.forward = instead if traceable else torch.compiler.disable(instead)
        try:
            yield results
        finally:
            if given is None:
                del head.forward
            else:
                head.forward = given
