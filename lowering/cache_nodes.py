"""The nodes that stand for one quantized cache in a graph, and every call of an operator on them.

No other file of the lowering spells out the arguments of an operator.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels import ops
from kvq_compile.kernels.cache.trim import first_of
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import MIN_SIZE, PARTS, part_names
from kvq_compile.kernels.spec import QUERIES
from kvq_compile.lowering.nodes import insert_call, same, size_of, value_of
from kvq_compile.lowering.sites import Attention, Quantization

Slots = tuple[Any, Any]  # ``position, start`` as the operators take them: one of the two is None
# Importance of a cache's tokens and the queries that it is to hold, where its layout asks.
Seen = tuple[fx.Node | None, fx.Node | None]
UNSEEN: Seen = (None, None)


def same_slots(a: Slots, b: Slots) -> bool:
    """Return whether tokens go to the same slots, as far as nodes and symbols tell."""
    (position, start), (other_position, other_start) = a, b
    return position is other_position and same(value_of(start), value_of(other_start))


def slots_from(first: Any) -> Slots:
    """Return the cache positions of a write: a node of all, or the first as a number or a node."""
    return (first, None) if isinstance(value_of(first), Tensor) else (None, first)


@dataclass(frozen=True)
class CacheNodes:
    """One quantized cache, an input of the graph or made in it.

    Attributes:
        parts: Nodes of its parts.
        layout: Its layout.
        calibrated: Nodes of what its tokens are quantized relative to: tables and shift, of which only what it has.
        length: Of an input, the node of its length, or the length where it is constant.
        owns_length: Whether that node is an input made for this cache.
        trim: Of a dynamic cache that forgets its first tokens, the node whose size says how many are out of sight.
        is_ring: Whether it shows the last ``length`` tokens of its memory.
    """

    parts: tuple[fx.Node, ...]
    layout: Layout
    calibrated: tuple[fx.Node, ...] = ()
    length: Any = None
    owns_length: bool = False
    trim: fx.Node | None = None
    is_ring: bool = False

    def room(self, graph: fx.Graph) -> fx.Node:
        """Return for how many tokens a static cache has room, at the graph's insert point."""
        codes = self.parts[PARTS.index("codes")]
        pages = graph.call_method("size", (codes, 2))
        size, rest = self.layout.page_size, self.layout.token_rows - 1
        pages.meta["example_value"] = room = value_of(codes).shape[2]
        slots = insert_call(graph, operator.mul, (pages, size), room * size)
        return insert_call(graph, operator.add, (slots, rest), room * size + rest)

    def first(self, graph: fx.Graph) -> Any:
        """Return how many slots of a dynamic cache are out of sight, at the graph's insert point."""
        first = first_of(None if self.trim is None else value_of(self.trim))
        if self.trim is None or not isinstance(first, torch.SymInt):
            return first
        return insert_call(graph, operator.sub, (size_of(self.trim, 0), MIN_SIZE), first)

    def end(self, graph: fx.Graph) -> Any:
        """Return the slots of a dynamic cache, those out of sight included, at the graph's insert point."""
        if self.trim is None:
            return self.length
        end = value_of(self.length) + first_of(value_of(self.trim))
        return insert_call(graph, operator.add, (self.first(graph), self.length), end)

    def append(
        self,
        graph: fx.Graph,
        new: fx.Node,
        slots: Slots,
        after: fx.Node | None = None,
        seen: Seen = UNSEEN,
    ) -> fx.Node:
        """Write ``new`` ``[B, H, T, D]`` into the cache; ``after`` is what has to read it first."""
        arguments = (self.parts, self.calibrated, new, *slots, self.layout, *seen, after)
        return insert_call(graph, ops.append_, arguments)

    def append_both(
        self,
        graph: fx.Graph,
        values: CacheNodes,
        new: tuple[fx.Node, fx.Node],
        slots: Slots,
        after: fx.Node,
        seen: Seen,
    ) -> fx.Node:
        """Write new keys into this cache and values of the same tokens into ``values``."""
        constants = *self.calibrated, *values.calibrated
        arguments = self.parts, values.parts, constants, *new, *slots, self.layout, values.layout
        return insert_call(graph, ops.append_both_, (*arguments, *seen, after))

    def attend(
        self,
        graph: fx.Graph,
        values: CacheNodes,
        attention: Attention,
        new: tuple[fx.Node, fx.Node],
        mask: Any,
        slots: Slots,
    ) -> fx.Node:
        """Attend to these keys, to ``values`` and to the exact new tokens behind them."""
        constants = *self.calibrated, *values.calibrated, *_sink_logits(graph, attention)
        arguments = (
            *(attention.query, *new, self.parts, values.parts),
            *(constants, mask, *slots, attention.score),
            *(self.layout, values.layout),
        )
        return insert_call(graph, ops.attend, arguments, value_of(attention.output))

    def dequantize(self, graph: fx.Graph, like: fx.Node) -> fx.Node:
        """Read the cache as the ordinary tensor that ``like`` stands for."""
        if self.is_ring:
            return self._dequantize_ring(graph, like)
        length = size_of(like, 2) if self.length is None else self.end(graph)
        arguments = (self.parts, self.calibrated, length, self.layout)
        if self.trim is None:
            return insert_call(graph, ops.dequantize, arguments, value_of(like))
        whole = insert_call(graph, ops.dequantize, arguments)
        seen = (slice(None), slice(None), slice(self.first(graph), None))
        return insert_call(graph, operator.getitem, (whole, seen), value_of(like))

    def _dequantize_ring(self, graph: fx.Graph, like: fx.Node) -> fx.Node:
        arguments = self.parts, self.calibrated, self.room(graph), self.layout
        whole = insert_call(graph, ops.dequantize, arguments)
        cursor = self.parts[PARTS.index("cursor")]
        held = insert_call(graph, operator.getitem, (cursor, 0))
        behind = insert_call(graph, operator.sub, (held, self.length))
        first = graph.call_method("clamp_min", (behind, 0))
        device = value_of(cursor).device
        slots = graph.call_function(
            torch.arange, (self.length,), {"dtype": torch.int64, "device": device}
        )
        shown = insert_call(graph, operator.add, (slots, first))
        return insert_call(graph, torch.index_select, (whole, 2, shown), value_of(like))


def _sink_logits(graph: fx.Graph, attention: Attention) -> tuple[fx.Node, ...]:
    """Return what an attention's sinks weigh, a logit a row, at the graph's insert point; nothing without sinks."""
    logits = attention.sink_logits
    if logits is None:
        return ()
    if not isinstance(logits, fx.Node):
        device = value_of(attention.query).device
        return (
            graph.call_function(
                torch.full, ((1,), logits), {"dtype": torch.float32, "device": device}
            ),
        )
    if value_of(logits).dim() < 4:
        return (graph.call_method("unsqueeze", (logits, -1)),)
    if value_of(logits).shape[-1] != 1:
        value = value_of(logits).logsumexp(-1, keepdim=True)
        logits = insert_call(graph, torch.logsumexp, (logits, -1, True), value)
    return (logits,)


def tokens_for(graph: fx.Graph, new: fx.Node, cache: fx.Node) -> fx.Node:
    """Return tokens as ``cache`` takes them, in its dtype and without a gradient, at the graph's insert point."""
    tokens, dtype = new, value_of(cache).dtype
    if torch.is_grad_enabled():
        tokens = graph.call_method("detach", (tokens,))
    if value_of(new).dtype != dtype:
        tokens = graph.call_method("to", (tokens, dtype))
    tokens.meta.setdefault("example_value", value_of(new))
    return tokens


def quantize(
    graph: fx.Graph,
    x: fx.Node,
    slots: Any,
    grows: bool,
    like: CacheNodes,
    seen: Seen = UNSEEN,
) -> CacheNodes:
    """Make a cache of ``x`` with room for ``slots`` tokens, laid out and quantized as ``like``, which has no parts."""
    arguments = x, slots, grows, like.layout, like.calibrated, *seen
    made, count = insert_call(graph, ops.quantize, arguments), len(part_names(like.layout))
    parts = (insert_call(graph, operator.getitem, (made, i)) for i in range(count))
    return replace(like, parts=tuple(parts))


def importance(
    graph: fx.Graph,
    attention: Attention,
    key: fx.Node,
    mask: Any,
    slots: Slots,
    held: Any,
    keys: CacheNodes,
) -> fx.Node:
    """Compute importance scores of ``held`` tokens: those in ``keys``, which may have no parts yet, and ``key``."""
    causal = attention.causal and mask is None
    arguments = (
        *(attention.query, key, keys.parts, keys.calibrated if keys.parts else ()),
        *(mask, *slots, held, attention.score, causal, QUERIES, keys.layout),
    )
    return insert_call(graph, ops.importance, arguments)


@dataclass
class CalibrationInputs:
    """Calibration constants of new caches, as further inputs of the graph, and positions of new keys.

    Attributes:
        tensors: The tables, further arguments of the graph behind all others, by digest.
        nodes: Their placeholders.
        positions: Node of the positions of new keys, where keys are quantized before RoPE.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    positions: dict[fx.Node, fx.Node | None] = field(default_factory=dict)

    def tables_of(self, quantization: Quantization) -> Tensor | None:
        """Return the tables of a new cache."""
        return None if quantization.tables is None else self.tensors[quantization.tables.digest]
