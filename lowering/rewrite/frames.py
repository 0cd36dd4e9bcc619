"""Give a graph what its new caches are coded relative to: calibration tables and shifts."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource

from kvq_compile.lowering.find.rotation import find_rotation
from kvq_compile.lowering.nodes import insert_call, shape_of, value_of
from kvq_compile.lowering.sites import AttentionSite, Coding, Life, Refusal, State

FrameNodes = tuple[fx.Node | None, fx.Node | None]
MAKES_CACHE = (Life.FRESH, Life.GROWN_PLAIN, Life.ALLOCATED)


class Frames:
    """Tables as further arguments of a graph, behind all others.

    Before:  return kvq.quantize(keys, layout)
    After:   tables = placeholder; shift = zeros([B]); return kvq.quantize(keys, layout, tables, shift)
    Because: a calibrated layout is nothing without its tables. As arguments they are shared by all
        graphs and all caches of a layer, and a CUDA graph knows that their address stays.

    Args:
        graph: The graph.
        sites: Its sites; those that make a cache get a placeholder for its tables.
        inputs: The arguments of the call that is being compiled, by placeholder.

    Attributes:
        tensors: The further arguments.
    """

    def __init__(
        self, graph: fx.Graph, sites: Sequence[AttentionSite], inputs: Mapping[fx.Node, Any]
    ) -> None:
        self._graph = graph
        self._positions = _positions(sites, inputs)
        self._nodes: dict[str, fx.Node] = {}
        self._words: dict[str, Tensor] = {}
        for site in sites:
            for state, coding in site.states():
                if state.life in MAKES_CACHE and coding.tables is not None:
                    device = value_of(state.base).device
                    self._words[coding.tables.digest] = coding.tables.on(device)
        last = list(graph.find_nodes(op="placeholder"))[-1]
        for number, (digest, words) in enumerate(self._words.items()):
            with graph.inserting_after(last):
                last = self._nodes[digest] = _placeholder(graph, f"kvq_tables_{number}", words)

    @property
    def tensors(self) -> list[Tensor]:
        """The further arguments, in order."""
        return list(self._words.values())

    def words(self, coding: Coding) -> Tensor | None:
        """Return the tables of a new cache."""
        return None if coding.tables is None else self._words[coding.tables.digest]

    def of(self, state: State, coding: Coding) -> FrameNodes:
        """Return tables and shift of a new cache, inserting what is missing at the graph's insert point."""
        if coding.tables is None:
            return None, None
        shift = self._shift(state) if coding.layout.rotary else None
        return self._nodes[coding.tables.digest], shift

    def _shift(self, state: State) -> fx.Node:
        """Return position minus slot of each sequence, taken from the last token of the call.

        Where the graph does not tell positions they are taken to be the slots. That would cost quality under
        left padding, never correctness: a key is rotated back by the angle by which it was unrotated.
        """
        batch, _, length, _ = shape_of(state.base) or (0, 0, 0, 0)
        graph, device = self._graph, value_of(state.base).device
        sequences = batch if isinstance(batch, int) else graph.call_method("size", (state.base, 0))
        position = self._positions.get(state.new)
        if position is None:
            return graph.call_function(
                torch.zeros, ([sequences],), {"dtype": torch.int32, "device": device}
            )
        last = insert_call(graph, operator.getitem, (position, (..., -1)))
        if isinstance(value_of(state.position), Tensor):
            slot = insert_call(graph, operator.getitem, (state.position, -1))
        else:
            slots = (
                length if isinstance(length, int) else graph.call_method("size", (state.base, 2))
            )
            if state.life is Life.ALLOCATED:
                tokens = (shape_of(state.new) or (0, 0, 0))[2]
                count = (
                    tokens if isinstance(tokens, int) else graph.call_method("size", (state.new, 2))
                )
                slots = insert_call(graph, operator.add, (state.position, count))
            slot = insert_call(graph, operator.sub, (slots, 1))
        shift = insert_call(graph, operator.sub, (last, slot))
        shift = graph.call_method("to", (shift,), {"device": device, "dtype": torch.int32})
        shift = graph.call_method("expand", (shift, sequences))
        return graph.call_method("clone", (shift,))


def _positions(
    sites: Sequence[AttentionSite], inputs: Mapping[fx.Node, Any]
) -> dict[fx.Node, fx.Node | None]:
    """Return the node of the positions of each site's new keys, where they are to be coded unrotated."""
    found: dict[fx.Node, fx.Node | None] = {}
    position: fx.Node | None = None
    for site in sites:
        if not site.key_coding.layout.rotary or site.key.life not in MAKES_CACHE:
            continue
        if position is None:  # one search serves all layers: a model's layers share their positions
            try:
                position = find_rotation(site.key.new, inputs).position
            except Refusal:
                return {}
        found[site.key.new] = position
    return found


def _placeholder(graph: fx.Graph, name: str, words: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = ConstantSource(name)
    return node
