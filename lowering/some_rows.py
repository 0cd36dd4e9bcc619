"""Calls of a graph that takes some rows of caches, with caches that are made for more sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from kvq_compile.kernels.cache.some_rows import lend_rows, like_rows, settle_rows

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class SomeRows:
    """A graph that takes the rows which a call reads and writes, in place of whole caches.

    Attributes:
        module: The graph.
        rows: Which rows of an argument it takes, by the place of the argument.
        returned: Places of the arguments that the captured graph returns as they are, by the place of the result;
            ``module`` does not return them.
    """

    module: fx.GraphModule
    rows: Mapping[int, range]
    returned: Mapping[int, int]

    def examples(self, args: Sequence[Any]) -> list[Any]:
        """Return arguments to compile the graph for; those of the captured one stay as they are."""
        taken = list(args)
        for place, rows in self.rows.items():
            taken[place] = like_rows(args[place], rows)
        return taken

    def take(self, args: Sequence[Any]) -> list[Any]:
        """Return the arguments of the graph for those of the captured one."""
        taken = list(args)
        for place, rows in self.rows.items():
            taken[place] = lend_rows(args[place], rows)
        return taken

    def give(self, args: Sequence[Any], taken: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        """Return the results of the captured graph; let its caches know what their rows have become."""
        for place, rows in self.rows.items():
            settle_rows(args[place], taken[place], rows)
        left, count = iter(results), len(results) + len(self.returned)
        places = (self.returned.get(at) for at in range(count))
        return [next(left) if place is None else args[place] for place in places]

    def around(self, compiled: Compiled) -> Compiled:
        """Return a callable like the captured graph from one like ``module``."""

        def call(*args: Any) -> list[Any]:
            taken = self.take(args)
            return self.give(args, taken, compiled(*taken))

        return call
