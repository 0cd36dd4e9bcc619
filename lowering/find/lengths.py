"""Find what counts cache positions: symbols of lengths, and arguments that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from kvq_compile.kernels import ops
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.replay import number
from kvq_compile.lowering.lengths import Lengths, Slots
from kvq_compile.lowering.nodes import shape_of, value_of
from kvq_compile.lowering.sites import Refusal
from kvq_compile.lowering.sizes import SizeReader

_NEW = {ops.append_: 2, ops.append_both_: 3}  # where operators take new tokens
FIXED = "the length of a cache is a number of compile time, as in the first graph that meets it"


@dataclass(frozen=True)
class Counting:
    """What counts cache positions in a graph.

    Attributes:
        symbols: The symbols that do, and what each counts.
        tokens: How many tokens the call appends: a number or a symbolic size.
        lengths: The arguments that carry them.
    """

    symbols: Mapping[sympy.Symbol, Slots]
    tokens: Any
    lengths: Lengths

    def counts(self, value: Any) -> bool:
        """Return whether a symbolic number, or a size of a tensor, depends on a length."""
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        return any(
            symbol in self.symbols
            for size in sizes
            if isinstance(size, torch.SymInt)
            for symbol in size.node.expr.free_symbols
        )

    def split(self, value: torch.SymInt) -> tuple[int, int]:
        """Return a number as the row of a length and what is added to it.

        Raises:
            Refusal: It is something else.
        """
        expression = value.node.expr
        for symbol, slots in self.symbols.items():
            rest = expression - symbol
            if slots.behind:
                rest += expression_of(self.tokens)
            if rest.is_Integer:
                return slots.row, int(rest)
        raise Refusal(f"the number {expression} is used as a value")


def find_counting(
    inputs: Mapping[fx.Node, Any], nodes: fx.Graph, device: torch.device, sizes: SizeReader
) -> Counting:
    """Find what counts cache positions in a rewritten graph.

    Args:
        inputs: Placeholders of the captured graph, in order.
        nodes: The rewritten graph.
        device: Where it computes.
        sizes: Reads sizes from the arguments of a call.

    Raises:
        Refusal: A length is no symbol, or it is not clear what an argument counts.
    """
    owners: dict[sympy.Symbol, list[int]] = {}
    hints: dict[int, int] = {}
    for place, node in enumerate(inputs):
        cache = value_of(node)
        if isinstance(cache, QuantizedKV) and cache.kind == "grown":
            symbol = expression_of(cache.shape[2])
            if not isinstance(symbol, sympy.Symbol):
                raise Refusal(FIXED)
            owners.setdefault(symbol, []).append(place)
            hints.setdefault(len(owners) - 1, number(cache.shape[2]))
    symbols = {symbol: Slots(row, False) for row, symbol in enumerate(owners)}
    tokens = _new_tokens(nodes)
    padded: dict[int, tuple[int, Slots]] = {}
    for place, node in enumerate(inputs):
        value = value_of(node)
        if not isinstance(value, Tensor) or isinstance(value, QuantizedKV):
            continue
        for dim, size in enumerate(value.shape):
            slots = _counted(size, symbols, tokens, hints)
            if slots is None:
                continue
            if place in padded:
                raise Refusal(f"{node.name} has two axes of cache positions")
            padded[place] = dim, slots
    numbers = {
        place: symbols[expression_of(value_of(node))]
        for place, node in enumerate(inputs)
        if expression_of(value_of(node)) in symbols
    }
    rows = tuple(tuple(places) for places in owners.values())
    lengths = Lengths(sizes.size(tokens), rows, numbers, padded, device)
    return Counting(symbols, tokens, lengths)


def expression_of(size: Any) -> Any:
    """Return a size as a sympy expression; anything that is no size stands for itself."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(size) if isinstance(size, int) else size


def _new_tokens(nodes: fx.Graph) -> Any:
    """Return how many tokens a call appends to its caches."""
    found: dict[Any, Any] = {}
    for node in nodes.nodes:
        if node.target in _NEW:
            size = (shape_of(node.args[_NEW[node.target]]) or (None,) * 3)[2]
            found[expression_of(size)] = size
    if len(found) > 1 or None in found:
        raise Refusal("it is not clear that all caches take equally many tokens")
    return next(iter(found.values()), 0)


def _counted(
    size: Any, symbols: dict[sympy.Symbol, Slots], tokens: Any, hints: Mapping[int, int]
) -> Slots | None:
    """Return what a size of an argument counts. That a symbol of its own does is told by its size in this call.

    Every later call is looked at again, by `Lengths.bounds`.
    """
    if not isinstance(size, torch.SymInt):
        return None
    expression, added = size.node.expr, expression_of(tokens)
    for symbol, slots in symbols.items():
        if expression == symbol or (not slots.behind and expression == symbol + added):
            return Slots(slots.row, slots.behind or expression != symbol)
    if not isinstance(expression, sympy.Symbol) or expression == added:
        return None
    for row, length in hints.items():
        if number(size) == length + number(tokens):
            symbols[expression] = found = Slots(row, True)
            return found
    return None
