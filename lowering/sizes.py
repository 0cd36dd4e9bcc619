"""Compute sizes of a graph's tensors from the arguments of a call.

A length in a captured graph is a symbolic expression. The callable that runs around the compiled graph
needs it as a number: how many tokens this call brings, how long the returned cache is. `SizeReader`
finds where each symbol of the expression stands among the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.printers import PythonPrinter

from kvq_compile.lowering.nodes import value_of
from kvq_compile.lowering.sites import Refusal

Size = Callable[[Sequence[Any]], int]


def _argument(index: int, args: Sequence[Any]) -> int:
    return int(args[index])


def _dimension(index: int, dim: int, args: Sequence[Any]) -> int:
    return int(args[index].shape[dim])


class SizeReader:
    """Read sizes of one graph from its arguments.

    Args:
        placeholders: The graph's placeholders, in the order of the arguments.
    """

    def __init__(self, placeholders: Sequence[fx.Node]) -> None:
        self._sources: dict[sympy.Symbol, Size] = {}
        self._made: dict[Any, Size] = {}
        for index, node in enumerate(placeholders):
            value = value_of(node)
            if isinstance(value, torch.SymInt):
                self._add(value, partial(_argument, index), first=True)
            elif isinstance(value, torch.Tensor):
                sizes: tuple[Any, ...] = tuple(value.shape)
                for dim, size in enumerate(sizes):
                    if isinstance(size, torch.SymInt):
                        self._add(size, partial(_dimension, index, dim))

    def _add(self, size: torch.SymInt, source: Size, first: bool = False) -> None:
        expression = size.node.expr
        if isinstance(expression, sympy.Symbol) and (first or expression not in self._sources):
            self._sources[expression] = source

    def size(self, size: int | torch.SymInt) -> Size:
        """Return a function from the arguments to ``size`` as a number; the same one for equal sizes.

        Raises:
            Refusal: A symbol of the size does not appear among the arguments.
        """
        expression = size.node.expr if isinstance(size, torch.SymInt) else int(size)
        if expression not in self._made:
            self._made[expression] = self._make(size)
        return self._made[expression]

    def _make(self, size: int | torch.SymInt) -> Size:
        if not isinstance(size, torch.SymInt):
            constant = int(size)
            return lambda args: constant
        expression = size.node.expr
        if expression in self._sources:
            return self._sources[expression]
        symbols = sorted(expression.free_symbols, key=str)
        missing = [symbol for symbol in symbols if symbol not in self._sources]
        if missing:
            raise Refusal(f"the size {expression} is not known from the arguments")
        sources = [self._sources[symbol] for symbol in symbols]
        modules = [{"math": math}, "math"]
        compute = sympy.lambdify(symbols, expression, modules, printer=PythonPrinter())
        return lambda args: int(compute(*(source(args) for source in sources)))
