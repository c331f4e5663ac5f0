"""The language-model head, apart from the model, so that it need not be applied to all at once.

Logits of every kept token of a packed row would be the largest tensor of a training step by far.
With the head in hand, they are made a chunk of rows at a time, inside the model's own forward pass:
there parameters are gathered, adapters active and autocast on.

Dimension letters: N rows, H hidden width, V vocabulary.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ebft.packed.model_parts import bare_model

# Hidden states (N, H) -> logits (N, V).
ToLogits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Head:
    """What turns last hidden states into logits.

    Attributes:
        name: of the output embeddings, as the model calls them.
        scale: multiplies their output.
        softcap: bounds the logits, ``softcap * tanh(logits / softcap)``; None: no bound.
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
        self, model: nn.Module, compute: Callable[[Tensor, ToLogits], list[Tensor]]
    ) -> Iterator[list[Tensor]]:
        """Let the model compute something else in place of logits.

        Args:
            model: as it is called, wrapped or not.
            compute: gets the hidden states (B, Q, H) that the model hands to its head, and what
                makes logits of any of them; called once.

        Yields:
            A list, which holds what ``compute`` returned once the model's forward has run. The
            model itself returns zeros in place of logits; they carry no information, and where
            there is a gradient they hang on the results, so that whoever waits for the gradient of
            the model's output (FSDP2 gathers parameters then) sees it before it is needed.
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
            anchor = sum(result.sum() * 0.0 for result in results if result.requires_grad)
            return hidden.new_zeros(*hidden.shape[:-1], 1) + anchor

        # Compiled models leave their graph here: what is computed changes with every call.
        head.forward = torch.compiler.disable(instead)
        try:
            yield results
        finally:
            if given is None:
                del head.forward
            else:
                head.forward = given


def find_head(model: nn.Module) -> Head | None:
    """The head of a causal language model, or None if its code does more with it than is known.

    Args:
        model: bare or wrapped by PEFT.
    """
    base = bare_model(model)
    module = base.get_output_embeddings()
    names = [name for name, child in base.named_children() if child is module]
    if module is None or len(names) != 1:
        return None
    name = names[0]
    steps = _steps_after_head(type(base).forward, name)
    if steps == []:
        return Head(name)
    if steps == ["logits * self.logit_scale"]:
        return Head(name, scale=float(cast(float, base.logit_scale)))
    if steps == ["logits / self.config.logits_scaling"]:
        return Head(name, scale=1.0 / float(base.config.logits_scaling))
    cap = "self.config.final_logit_softcapping"
    if steps == [f"logits / {cap}", "torch.tanh(logits)", f"logits * {cap}"]:
        # The code does this where the value is not None.
        return Head(name, softcap=base.config.final_logit_softcapping)
    return None


def _steps_after_head(forward: Callable[..., Any], name: str) -> list[str] | None:
    """What a model's forward assigns to its logits after ``self.name(...)``, as expressions.

    None where there is not exactly one such call, or the code cannot be read.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return None
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{name}"
    ]
    assignments = sorted(
        (node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AugAssign)),
        key=lambda node: node.lineno,
    )
    heads = [node for node in assignments if _without_casts(node.value) in calls]
    if len(calls) != 1 or len(heads) != 1:
        return None
    head = heads[0]
    if not isinstance(head, ast.Assign) or not isinstance(head.targets[0], ast.Name):
        return None
    logits = head.targets[0].id
    later = [node for node in assignments if node.lineno > head.lineno and _sets(node, logits)]
    if any(isinstance(node, ast.AugAssign) for node in later):
        return None
    return [ast.unparse(_Renamed(logits).visit(node.value)) for node in later]


def _without_casts(value: ast.expr) -> ast.expr:
    """``x`` of ``x.contiguous()`` or ``x.float()``, which change no value."""
    while (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and value.func.attr in ("contiguous", "float")
    ):
        value = value.func.value
    return value


def _sets(node: ast.Assign | ast.AugAssign, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(
        isinstance(part, ast.Name) and part.id == name for t in targets for part in ast.walk(t)
    )


class _Renamed(ast.NodeTransformer):
    """One variable under the name ``logits``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name("logits", node.ctx) if node.id == self.name else node
