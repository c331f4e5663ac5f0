"""The cache of a single decoder layer, so that one compiled graph serves all layers.

Each attention module of a transformers model has a layer number (`layer_idx`), with which it asks
the model's cache for its keys and values. TorchDynamo treats this number as a constant and would
compile every layer separately. So a compiled layer gets only its own part of the cache, and its
number is 0 during the call. This does not work for layers whose code uses the number or the cache
in other ways. The source code of a layer's modules is inspected to find these.
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

# The attribute in which attention modules keep their layer number.
NUMBER = "layer_idx"
# Words in the names of arguments that hold a cache, or keys and values of other layers (as in
# Gemma 4, where some layers have none of their own).
_CACHE_NAMES = ("past", "cache", "shared_kv")


class OneLayer:
    """The keys and values of one layer, passed to the layer instead of the model's cache.

    It has no other method of a cache, so a layer that calls another one raises.
    """

    def __init__(self, layer: CacheLayerMixin) -> None:
        self.layer = layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Do what the model's cache does for this layer; the number given is ignored."""
        return self.layer.update(key_states, value_states, *args, **kwargs)


@runtime_checkable
class CacheByLayer(Protocol):
    """A cache whose parts can be passed to compiled layers.

    Attributes:
        few_shapes: whether its tensors have few different shapes; code is compiled for each.
    """

    few_shapes: bool

    def of_layer(self, number: int, mask: Any) -> AbstractContextManager[OneLayer]:
        """One layer's part of the cache, to be used within the context.

        Args:
            number: number of the layer.
            mask: attention mask that the layer gets.
        """


class RowCache(DynamicCache):
    """The cache of passes over parts of packed rows.

    Its shapes are those of the rows. When layers are compiled, row widths are rounded up, so that
    there are few shapes.
    """

    few_shapes = True

    @contextmanager
    def of_layer(self, number: int, mask: Any) -> Iterator[OneLayer]:
        """See `CacheByLayer`."""
        yield OneLayer(cast(CacheLayerMixin, self.layers[number]))


class NumberedModules:
    """The modules of a decoder layer that have the layer's number as an attribute.

    Args:
        layer: a decoder layer of a transformers model.
    """

    def __init__(self, layer: nn.Module) -> None:
        found = {module: vars(module).get(NUMBER) for module in layer.modules()}
        self.modules = [module for module, number in found.items() if isinstance(number, int)]
        self.numbers = {vars(module)[NUMBER] for module in self.modules}
        kinds: set[Any] = {type(module) for module in found}
        self._reads_more = any(_reads_more(kind) for kind in kinds)

    @property
    def number(self) -> int | None:
        """The number with which the modules find the layer's keys and values in a cache.

        None if their code uses the number or the cache in other ways, if they have different
        numbers, or if their code cannot be read.
        """
        return None if self._reads_more or len(self.numbers) != 1 else next(iter(self.numbers))

    @contextmanager
    def as_first(self) -> Iterator[None]:
        """Set the number of these modules to 0 within the context."""
        try:
            for module in self.modules:
                setattr(module, NUMBER, 0)
            yield
        finally:
            for module in self.modules:
                setattr(module, NUMBER, self.number)


@cache
def _reads_more(kind: type[nn.Module]) -> bool:
    """Whether a module class uses number or cache for more than `cache.update(..., number)`.

    Also True if it uses keys and values of other layers.
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
        return True  # the code cannot be read, so assume that it does
    updates = {id(node): node for node in ast.walk(tree) if _is_update(node)}
    allowed = set()
    for call in cast("list[ast.Call]", list(updates.values())):
        allowed |= {id(call.func)} | {id(given) for given in call.args}
        allowed |= {id(keyword.value) for keyword in call.keywords}
    return any(_reads_number_or_cache(node) for node in ast.walk(tree) if id(node) not in allowed)


def _is_update(node: ast.AST) -> bool:
    """Whether a node is a call `cache.update(...)`."""
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
    """Whether a node is a name that holds a cache, or keys and values of lower layers."""
    return isinstance(node, ast.Name) and any(word in node.id for word in _CACHE_NAMES)
