"""Hand every cache back quantized: plan what the callable around the graph returns."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from kvq_compile.kernels import ops
from kvq_compile.kernels.cache.tensor import Kind, QuantizedKV
from kvq_compile.kernels.layout import PageLayout
from kvq_compile.lowering.nodes import insert_call, shape_of, value_of
from kvq_compile.lowering.rewrite.frames import Frames
from kvq_compile.lowering.sites import Coding, Life, Seen, State
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
    """Wrap four outputs from number ``index`` on as a cache of ``length`` slots.

    Of rotary keys the shift is a fifth; exact copies in host memory are the last. The tables are the same for every
    call.
    """

    index: int
    layout: PageLayout
    kind: Kind
    length: Size
    tables: Tensor | None

    def build(self, results: Sequence[Any], args: Sequence[Any]) -> QuantizedKV:
        """Return the new cache."""
        behind = self.index + len(ops.PARTS)
        codes, params, exact, cursor = results[self.index : behind]
        return QuantizedKV(
            *(codes, params, exact, cursor, self.layout, self.kind, self.length(args)),
            tables=self.tables,
            shift=results[behind] if self.layout.rotary else None,
            originals=results[behind + self.layout.rotary] if self.layout.keep_exact else None,
        )


@dataclass(frozen=True)
class Extended:
    """Return argument number ``argument``, a grown cache, as a view longer by ``tokens``."""

    argument: int
    tokens: Size

    def build(self, results: Sequence[Any], args: Sequence[Any]) -> QuantizedKV:
        """Return the longer view."""
        cache: QuantizedKV = args[self.argument]
        return cache.extended(self.tokens(args))


@dataclass(frozen=True)
class Given:
    """Return argument number ``argument`` itself, a cache that was written in place or not at all."""

    argument: int

    def build(self, results: Sequence[Any], args: Sequence[Any]) -> QuantizedKV:
        """Return the argument."""
        cache: QuantizedKV = args[self.argument]
        return cache


Output = Plain | Made | Extended | Given


def quantize_outputs(
    graph: fx.Graph,
    states: Sequence[tuple[State, Coding]],
    made: dict[fx.Node, tuple[fx.Node, ...]],
    frames: Frames,
    seen: dict[fx.Node, Seen],
    arguments: dict[fx.Node, int],
    sizes: SizeReader,
) -> list[Output]:
    """Return caches as their parts instead of as 16-bit tensors.

    Before:  return (logits, keys, values)                  # keys, values: [B, Hkv, S, D], 16 bit
    After:   return (logits, *kvq.quantize(keys), *kvq.quantize(values))
    Because: what leaves the call is what stays in memory until the next one.

    Args:
        graph: The graph, attention already rewritten.
        states: The caches of its sites, each with its coding.
        made: Parts that stand for caches allocated in the graph (`attend_to_new_tokens`).
        frames: What new caches are coded relative to.
        seen: What attention says to new caches, where their bits depend on it.
        arguments: Place of each original placeholder among the arguments of a call.
        sizes: Reads lengths from the arguments.

    Returns:
        One plan for each value that the captured graph returned.
    """
    output = next(iter(reversed(graph.nodes)))
    planner = _Planner(
        graph,
        output,
        {state.base: (state, coding) for state, coding in states},
        made,
        frames,
        seen,
        arguments,
        sizes,
    )
    plans: dict[Any, Output] = {}
    order: list[Output] = []
    for returned in output.args[0]:
        if returned not in plans or not isinstance(returned, fx.Node):
            plans[returned] = planner.plan(returned)
        order.append(plans[returned])
    output.args = (tuple(planner.flat),)
    return order


class _Planner:
    """Plan one output after the other; ``flat`` collects what the rewritten graph returns."""

    def __init__(
        self,
        graph: fx.Graph,
        output: fx.Node,
        states: dict[fx.Node, tuple[State, Coding]],
        made: dict[fx.Node, tuple[fx.Node, ...]],
        frames: Frames,
        seen: dict[fx.Node, Seen],
        arguments: dict[fx.Node, int],
        sizes: SizeReader,
    ) -> None:
        self.graph, self.output, self.states, self.made = graph, output, states, made
        self.frames, self.seen = frames, seen
        self.arguments, self.sizes = arguments, sizes
        self.flat: list[Any] = []

    def plan(self, returned: Any) -> Output:
        """Return how the captured graph's output ``returned`` is made."""
        if (
            isinstance(returned, fx.Node)
            and isinstance(value_of(returned), QuantizedKV)
            and returned in self.arguments
        ):
            return Given(self.arguments[returned])
        if not isinstance(returned, fx.Node) or returned not in self.states:
            self.flat.append(returned)
            return Plain(len(self.flat) - 1)
        state, coding = self.states[returned]
        if state.life is Life.GROWN:
            assert state.past is not None
            return Extended(
                self.arguments[state.past], self.sizes.size((shape_of(state.new) or ())[2])
            )
        if state.life in (Life.FRESH, Life.GROWN_PLAIN, Life.ALLOCATED):
            return self._made(returned, state, coding)
        self.flat.append(returned)
        return Plain(len(self.flat) - 1)

    def _made(self, returned: fx.Node, state: State, coding: Coding) -> Made:
        length = (shape_of(returned) or ())[2]
        parts = self.made.get(returned)
        if parts is None:
            with self.graph.inserting_before(self.output):
                frame = self.frames.of(state, coding)
                more = (*frame, *self.seen.get(returned, (None, None)))
                parts = _quantize(self.graph, returned, length, coding.layout, more)
        self.flat.extend(parts)
        kind: Kind = "static" if state.life is Life.ALLOCATED else "grown"
        index, tables = len(self.flat) - len(parts), self.frames.words(coding)
        return Made(index, coding.layout, kind, self.sizes.size(length), tables)


def _quantize(
    graph: fx.Graph,
    x: fx.Node,
    length: Any,
    layout: PageLayout,
    more: tuple[fx.Node | None, ...],
) -> tuple[fx.Node, ...]:
    slots = length if isinstance(length, int) else graph.call_method("size", (x, 2))
    quantized = insert_call(graph, ops.quantize, (x, slots, True, layout.token, *more))
    rest: tuple[fx.Node, ...] = () if more[1] is None else (more[1],)
    if layout.keep_exact:
        rest += (insert_call(graph, ops.originals, (x, slots, True, layout.token)),)
    return (
        *(insert_call(graph, operator.getitem, (quantized, i)) for i in range(len(ops.PARTS))),
        *rest,
    )
