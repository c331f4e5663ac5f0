"""A cache as a single decoder layer sees it, so that one compiled graph serves every layer.

Each attention of a transformers model knows its own number, and asks the cache of the whole model
for the keys and values of that number. TorchDynamo would compile every layer by itself: the number
is part of the code. So a compiled layer gets its own part of the cache in the cache's place, and
all of them have the number 0 meanwhile. Layers whose code reads number or cache for anything else
are found by reading it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

# How attention modules call their number.
NUMBER = "layer_idx"
# Parts of the names by which layers call a cache, and keys and values that other layers hand on to
# them (Gemma 4), which have none of their own in the cache.
_CACHE_NAMES = ("past", "cache", "shared_kv")


class OneLayer:
    """In the place of a cache, the keys and values of one layer.

    It offers nothing else that a cache does, so that a layer which asks for more raises.
    """

    def __init__(self, layer: CacheLayerMixin) -> None:
        self.layer = layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What the cache of the whole model does for the layer, whatever number it has now."""
        return self.layer.update(key_states, value_states, *args, **kwargs)


@runtime_checkable
class CacheByLayer(Protocol):
    """A cache that can be handed to compiled layers.

    Attributes:
        few_shapes: whether its shapes come in few sizes, each of which is compiled.
    """

    few_shapes: bool

    def of_layer(self, number: int, mask: Any) -> AbstractContextManager[OneLayer]:
        """A layer's own part of the cache, to be used within the context.

        Args:
            number: of the layer.
            mask: that the layer is given.
        """


class RowCache(DynamicCache):
    """The cache of passes over parts of packed rows.

    Its shapes are those of the rows: few where these are rounded up, as they are when layers are
    compiled.
    """

    few_shapes = True

    @contextmanager
    def of_layer(self, number: int, mask: Any) -> Iterator[OneLayer]:
        """See `CacheByLayer`."""
        yield OneLayer(cast(CacheLayerMixin, self.layers[number]))


class NumberedModules:
    """The modules of a decoder layer that know its number.

    Args:
        layer: of a transformers model.
    """

    def __init__(self, layer: nn.Module) -> None:
        found = {module: vars(module).get(NUMBER) for module in layer.modules()}
        self.modules = [module for module, number in found.items() if isinstance(number, int)]
        self.numbers = {vars(module)[NUMBER] for module in self.modules}
        kinds: set[Any] = {type(module) for module in found}
        self._reads_more = any(_reads_more(kind) for kind in kinds)

    @property
    def number(self) -> int | None:
        """By which they find the layer's keys and values in a cache; None if they do anything else
        with number or cache, or that cannot be told.
        """
        return None if self._reads_more or len(self.numbers) != 1 else next(iter(self.numbers))

    @contextmanager
    def as_first(self) -> Iterator[None]:
        """Let them have the number 0 within the context."""
        try:
            for module in self.modules:
                setattr(module, NUMBER, 0)
            yield
        finally:
            for module in self.modules:
                setattr(module, NUMBER, self.number)


@cache
def _reads_more(kind: type[nn.Module]) -> bool:
    """Whether the code of a class of modules does more with number and cache than to hand them on
    to each other, or uses keys and values of other layers.
    """
    ours = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return any(
        _function_reads_more(function)
        for ancestor in ours
        for name, member in vars(ancestor).items()
        if inspect.isfunction(function := getattr(member, "fget", member)) and name != "__init__"
    )


@cache
def _function_reads_more(function: Callable[..., Any]) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return True  # code that cannot be read
    updates = {id(node): node for node in ast.walk(tree) if _is_update(node)}
    allowed = set()
    for call in cast("list[ast.Call]", list(updates.values())):
        allowed |= {id(call.func)} | {id(given) for given in call.args}
        allowed |= {id(keyword.value) for keyword in call.keywords}
    return any(_reads_number_or_cache(node) for node in ast.walk(tree) if id(node) not in allowed)


def _is_update(node: ast.AST) -> bool:
    """`cache.update(...)`"""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "update"
        and _names_cache(node.func.value)
    )


def _reads_number_or_cache(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == NUMBER or _names_cache(node.value)
    if isinstance(node, ast.Subscript):
        return _names_cache(node.value)
    return isinstance(node, ast.Constant) and node.value == NUMBER


def _names_cache(node: ast.AST) -> bool:
    """Whether it is what a layer calls a cache, or keys and values of lower layers."""
    return isinstance(node, ast.Name) and any(word in node.id for word in _CACHE_NAMES)
