"""Hand every cache back quantized: plan what the callable around the graph returns."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from kvq_compile.kernels import ops
from kvq_compile.kernels.cache import Kind, QuantizedKV
from kvq_compile.kernels.spec import PageLayout
from kvq_compile.lowering.graph import insert_call, shape_of
from kvq_compile.lowering.sites import AttentionSite, Life, State
from kvq_compile.lowering.sizes import Size, SizeReader


@dataclass(frozen=True)
class Plain:
    """Return the graph's output number ``index`` as it is."""

    index: int

    def build(self, results: Sequence[Any], args: Sequence[Any]) -> Any:
        """Return the output."""
        return results[self.index]


@dataclass(frozen=True)
class Made:
    """Wrap four outputs from number ``index`` on as a cache of ``length`` slots, ``held`` of them written."""

    index: int
    layout: PageLayout
    kind: Kind
    length: Size

    def build(self, results: Sequence[Any], args: Sequence[Any]) -> QuantizedKV:
        """Return the new cache."""
        parts = results[self.index : self.index + len(ops.PARTS)]
        return QuantizedKV(*parts, self.layout, self.kind, self.length(args))


@dataclass(frozen=True)
class Extended:
    """Return argument number ``argument``, a grown cache, as a view longer by ``tokens``."""

    argument: int
    tokens: Size

    def build(self, results: Sequence[Any], args: Sequence[Any]) -> QuantizedKV:
        """Return the longer view."""
        cache: QuantizedKV = args[self.argument]
        return cache.extended(self.tokens(args))


Output = Plain | Made | Extended


def quantize_outputs(
    graph: fx.Graph,
    sites: Sequence[AttentionSite],
    made: dict[fx.Node, tuple[fx.Node, ...]],
    arguments: dict[fx.Node, int],
    sizes: SizeReader,
) -> list[Output]:
    """Return caches as their parts instead of as 16-bit tensors.

    Before:  return (logits, keys, values)                  # keys, values: [B, Hkv, S, D], 16 bit
    After:   return (logits, *kvq.quantize(keys), *kvq.quantize(values))
    Because: what leaves the call is what stays in memory until the next one.

    Args:
        graph: The graph, attention already rewritten.
        sites: Its sites.
        made: Parts that stand for caches allocated in the graph (`attend_to_new_tokens`).
        arguments: Place of each original placeholder among the arguments of a call.
        sizes: Reads lengths from the arguments.

    Returns:
        One plan for each value that the captured graph returned.
    """
    output = next(iter(reversed(graph.nodes)))
    states: dict[Any, tuple[State, PageLayout]] = {}
    for site in sites:
        for state, layout in site.states():
            states[state.past if state.life is Life.ALLOCATED else state.base] = (state, layout)
    flat: list[Any] = []
    plans: dict[Any, Output] = {}
    order: list[Output] = []
    for returned in output.args[0]:
        if returned not in plans or not isinstance(returned, fx.Node):
            plans[returned] = _plan(graph, output, returned, states, made, arguments, sizes, flat)
        order.append(plans[returned])
    output.args = (tuple(flat),)
    return order


def _plan(
    graph: fx.Graph,
    output: fx.Node,
    returned: Any,
    states: dict[Any, tuple[State, PageLayout]],
    made: dict[fx.Node, tuple[fx.Node, ...]],
    arguments: dict[fx.Node, int],
    sizes: SizeReader,
    flat: list[Any],
) -> Output:
    state, layout = states.get(returned, (None, None)) if isinstance(returned, fx.Node) else (None, None)
    if state is not None and state.life is Life.GROWN:
        return Extended(arguments[state.past], sizes.size(shape_of(state.new)[2]))  # type: ignore[index]
    if layout is None or state is None or state.life not in (Life.FRESH, Life.GROWN_PLAIN, Life.ALLOCATED):
        flat.append(returned)
        return Plain(len(flat) - 1)
    shape = shape_of(returned)
    assert shape is not None
    kind: Kind = "static" if state.life is Life.ALLOCATED else "grown"
    parts = made.get(returned)
    if parts is None:
        with graph.inserting_before(output):
            parts = _quantize(graph, returned, shape[2], layout)
    flat.extend(parts)
    return Made(len(flat) - len(parts), layout, kind, sizes.size(shape[2]))


def _quantize(graph: fx.Graph, x: fx.Node, length: Any, layout: PageLayout) -> tuple[fx.Node, ...]:
    slots = length if isinstance(length, int) else graph.call_method("size", (x, 2))
    quantized = insert_call(graph, ops.quantize, (x, slots, True, layout.token))
    return tuple(insert_call(graph, operator.getitem, (quantized, i)) for i in range(len(ops.PARTS)))
