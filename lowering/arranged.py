"""Calls of a graph whose caches are laid out as ``[B, H, S, D]``, with those of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.arrangement import Arrangement
from kvq_compile.kernels.cache.become import (
    become_arranged,
    keep_plain,
    lend,
    stays_plain,
    thaw_arranged,
)
from kvq_compile.kernels.cache.tensor import QuantizedKV

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class Arranged:
    """A graph that takes caches as ``[B, H, S, D]``, and how the model's are laid out.

    Attributes:
        module: The graph.
        inputs: The arrangement of each argument of the captured graph; ``None`` where it is taken as it is.
        outputs: The same of each result.
        places: The arguments and the results of the graph that are to be quantized for each cache of the captured one;
            a result that is an argument becomes what that becomes.
    """

    module: fx.GraphModule
    inputs: tuple[Arrangement | None, ...]
    outputs: tuple[Arrangement | None, ...]
    places: Mapping[fx.Node, tuple[tuple[int, ...], tuple[int, ...]]]

    def take(self, args: Sequence[Any]) -> list[Any]:
        """Return the arguments of the graph for those of the captured one."""
        taken: list[Any] = []
        for arg, how in zip(args, self.inputs, strict=True):
            taken.extend([arg] if how is None else _caches_of(arg, how))
        return taken

    def give(self, args: Sequence[Any], taken: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        """Return the results of the captured graph; let the model's arguments be what their caches have become."""
        held: dict[int, Any] = {}
        rest = iter(taken)
        for arg, how in zip(args, self.inputs, strict=True):
            if how is None:
                next(rest)
                continue
            caches = [next(rest) for _ in range(how.pieces)]
            _settle(arg, caches, how)
            held.update({id(cache): arg for cache in caches})
        given: list[Any] = []
        left = iter(results)
        for how in self.outputs:
            if how is None:
                given.append(next(left))
                continue
            caches = [next(left) for _ in range(how.pieces)]
            same = held.get(id(caches[0]))
            given.append(_tensor_of(caches, how) if same is None else same)
        return given

    def served(self, arguments: Collection[int], results: Collection[int]) -> set[fx.Node]:
        """Return the caches of the captured graph all of which are quantized.

        Args:
            arguments: Places of the arguments that are, or will be once the call has run.
            results: Places of the results that are.
        """
        return {
            node
            for node, (taken, given) in self.places.items()
            if set(taken) <= set(arguments) and set(given) <= set(results)
        }

    def caches_of(self, place: int) -> range:
        """Return the places of the graph's arguments that one of the captured graph's is taken as."""
        counts = [1 if how is None else how.pieces for how in self.inputs]
        first = sum(counts[:place])
        return range(first, first + counts[place])

    def around(self, compiled: Compiled) -> Compiled:
        """Return a callable like the captured graph from one like ``module``."""

        def call(*args: Any) -> list[Any]:
            taken = self.take(args)
            return self.give(args, taken, compiled(*taken))

        return call


def _caches_of(arg: Any, how: Arrangement) -> Sequence[Tensor]:
    if isinstance(arg, ArrangedKV):
        return arg.caches
    return lend(arg, how.split(arg))


def _tensor_of(caches: Sequence[Tensor], how: Arrangement) -> Tensor:
    if all(isinstance(cache, QuantizedKV) for cache in caches):
        return ArrangedKV(caches, how)  # type: ignore[arg-type]
    dense = [x.dequantize() if isinstance(x, QuantizedKV) else x for x in caches]
    made = how.join(dense)
    reason = next(filter(None, map(stays_plain, caches)), None)
    if reason is not None:
        keep_plain(made, reason)
    return made


def _settle(arg: Any, caches: Sequence[Any], how: Arrangement) -> None:
    """Let an argument be packed where its caches are now, and an ordinary tensor where they are not any more."""
    reason = next(filter(None, map(stays_plain, caches)), None)
    if isinstance(arg, ArrangedKV):
        if not all(isinstance(cache, QuantizedKV) for cache in caches):
            thaw_arranged(arg, reason or "")
    elif all(isinstance(cache, QuantizedKV) for cache in caches):
        become_arranged(arg, ArrangedKV(caches, how))
    elif reason is not None:
        keep_plain(arg, reason)
