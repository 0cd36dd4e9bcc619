"""Give a graph what its new caches are coded relative to: calibration tables and shifts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource

from kvq_compile.lowering.graph import shape_of, value_of
from kvq_compile.lowering.sites import AttentionSite, Coding, Life, State

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

    Attributes:
        tensors: The further arguments.
    """

    def __init__(self, graph: fx.Graph, sites: Sequence[AttentionSite]) -> None:
        self._graph = graph
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
        return self._nodes[coding.tables.digest], self._shift(
            state
        ) if coding.layout.rotary else None

    def _shift(self, state: State) -> fx.Node:
        """Return position minus slot of each sequence."""
        batch = (shape_of(state.base) or (0,))[0]
        sequences = (
            batch if isinstance(batch, int) else self._graph.call_method("size", (state.base, 0))
        )
        device = value_of(state.base).device
        shift = self._graph.call_function(
            torch.zeros, ([sequences],), {"dtype": torch.int32, "device": device}
        )
        shift.meta["example_value"] = None
        return shift


def _placeholder(graph: fx.Graph, name: str, words: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = ConstantSource(name)
    return node
