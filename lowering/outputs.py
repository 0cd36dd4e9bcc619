"""How the values that a captured graph returns are made from what its rewritten form returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvq_compile.kernels.cache.tensor import Kind, QuantizedKV
from kvq_compile.kernels.cache.trim import new_trim
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import part_names
from kvq_compile.lowering.sizes import Size


class Call:
    """The arguments of one call, and what sizes are in it: one that several caches share is computed once."""

    def __init__(self, args: Sequence[Any]) -> None:
        self.args = args
        self._sizes: dict[Size, int] = {}
        self._made: dict[int, QuantizedKV] = {}

    def built(self, plan: Output, results: Sequence[Any]) -> Any:
        """Return an output; of caches of the same parts, each but the first is a view of that."""
        if not isinstance(plan, (Made, Gathered)):
            return plan.build(results, self)
        first = self._made.get(plan.index)
        if first is not None:
            return first._view(first.shape[2])
        made = self._made[plan.index] = plan.build(results, self)
        return made

    def size(self, size: Size) -> int:
        """Return a size in this call."""
        found = self._sizes.get(size)
        if found is None:
            found = self._sizes[size] = size(self.args)
        return found


@dataclass(frozen=True)
class Plain:
    """Return the graph's output number ``index`` as it is."""

    index: int

    def build(self, results: Sequence[Any], call: Call) -> Any:
        """Return the output."""
        return results[self.index]


@dataclass(frozen=True)
class Made:
    """Wrap the outputs from number ``index`` on as a cache of ``length`` cache positions.

    They are its parts and, of rotary keys, the shift. The tables are the same for every call. The cache will forget
    its first tokens if it is ``trimmed``.
    """

    index: int
    layout: Layout
    kind: Kind
    length: Size
    tables: Tensor | None
    trimmed: bool = False

    def build(self, results: Sequence[Any], call: Call) -> QuantizedKV:
        """Return the new cache."""
        behind = self.index + len(part_names(self.layout))
        parts = results[self.index : behind]
        calibrated = [] if self.tables is None else [self.tables]
        calibrated += results[behind : behind + self.layout.rotary]
        trim = new_trim(0, parts[0]) if self.trimmed else None
        about = self.layout, self.kind, call.size(self.length)
        return QuantizedKV(parts, calibrated, *about, trim=trim)


@dataclass(frozen=True)
class Extended:
    """Return argument number ``argument``, a dynamic cache, as a view longer by ``tokens``, or its last ``kept``."""

    argument: int
    tokens: Size
    kept: Size | None = None

    def build(self, results: Sequence[Any], call: Call) -> QuantizedKV:
        """Return the longer view."""
        cache: QuantizedKV = call.args[self.argument]
        return _last(cache.extended(call.size(self.tokens)), self.kept, call)


@dataclass(frozen=True)
class Gathered:
    """Wrap the outputs from number ``index`` on: rows of argument ``argument``, longer by ``tokens``.

    They are its parts and, of rotary keys, the shift. Of the tokens the last ``kept`` are shown.
    """

    index: int
    argument: int
    tokens: Size
    kept: Size | None = None

    def build(self, results: Sequence[Any], call: Call) -> QuantizedKV:
        """Return the new cache."""
        cache: QuantizedKV = call.args[self.argument]
        layout = cache.page_layout
        behind = self.index + len(part_names(layout))
        parts = results[self.index : behind]
        calibrated = [*cache.calibrated[:1], *results[behind : behind + layout.rotary]]
        length = cache.shape[2] + call.size(self.tokens)
        longer = QuantizedKV(parts, calibrated, layout, "grown", length, trim=cache.trim)
        return _last(longer, self.kept, call)


@dataclass(frozen=True)
class Given:
    """Return argument number ``argument`` itself, a cache that was written in place or not at all."""

    argument: int

    def build(self, results: Sequence[Any], call: Call) -> QuantizedKV:
        """Return the argument."""
        cache: QuantizedKV = call.args[self.argument]
        return cache


def _last(cache: QuantizedKV, kept: Size | None, call: Call) -> QuantizedKV:
    """Return the view of the last ``kept`` tokens; of all where it is ``None``."""
    if kept is None:
        return cache
    length = cache.shape[2]
    return cache.part(length - call.size(kept), length)


Output = Plain | Made | Extended | Gathered | Given
