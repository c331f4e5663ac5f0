"""The head of a language model, applied to a chunk of hidden states at a time.

Logits of every kept token of a packed row would be the largest tensor of a training step by far.
They are made chunk by chunk inside the model's own forward pass, where parameters are gathered,
adapters active and autocast on.

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
    """What turns last hidden states into logits.

    Attributes:
        name: of the output embeddings, as the model calls them.
        scale: multiplies their output.
        softcap: bounds the logits, `softcap * tanh(logits / softcap)`; None: no bound.
    """

    name: str
    scale: float = 1.0
    softcap: float | None = None

    def finish(self, logits: Tensor) -> Tensor:
        """What the model does with the output of its head, elementwise."""
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
        """Let the model compute something else in place of logits.

        Args:
            model: as it is called, wrapped or not.
            compute: gets the hidden states (B, Q, H) that the model hands to its head, and what
                makes logits of any of them; called once for each call of the model.
            traceable: whether TorchDynamo may follow the model into `compute`.

        Yields:
            A list, which holds what `compute` returned once the model's forward has run. The
            model itself returns zeros in place of logits; they carry no information, and where
            there is a gradient they depend on the results, so that the gradient of the model's
            output, which makes FSDP2 gather parameters, arrives before it is needed.
        """
        results: list[Tensor] = []
        inside = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
        head = getattr(inside, self.name)
        given = head.__dict__.get("forward")  # of a library that hooks modules this way
        original = head.forward

        def instead(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            results.extend(
                compute(hidden, lambda rows: self.finish(original(rows, *args, **kwargs)))
            )
            zeros = hidden.new_zeros(*hidden.shape[:-1], 1)
            anchors = [result.sum() * 0.0 for result in results if result.requires_grad]
            return zeros + sum(anchors) if anchors else zeros

        # Compiled models leave their graph here: what is computed changes with every call.
        head.forward = instead if traceable else torch.compiler.disable(instead)
        try:
            yield results
        finally:
            if given is None:
                del head.forward
            else:
                head.forward = given
