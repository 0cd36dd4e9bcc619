"""What a pass takes and returns: the graph with all that is known of it, and a report of what changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch.fx
from torch.fx import GraphModule, Node

from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.lowering.cache_nodes import CacheNodes, CalibrationInputs, Seen
from kvq_compile.lowering.find.rings import Ring
from kvq_compile.lowering.find.rotation import Rotation
from kvq_compile.lowering.find.updates import Update
from kvq_compile.lowering.lengths import Lengths
from kvq_compile.lowering.outputs import Output
from kvq_compile.lowering.runtime import Conversion
from kvq_compile.lowering.sites import (
    Attention,
    AttentionSite,
    Quantization,
    Refusal,
    SiteReport,
    State,
    StateReport,
)
from kvq_compile.lowering.sizes import SizeReader
from kvq_compile.lowering.slots import SlotCheck


@dataclass
class Graph:
    """A copy of a captured graph, and what the passes have found and made so far.

    Attributes:
        module: The copy that the passes rewrite.
        spec: What caches are quantized to.
        inputs: The arguments of the call that is being compiled, by placeholder, in order.
        sizes: Reads lengths from the arguments of a call.
        returned: How many values the captured graph returned.
        by_order: Whether ``spec`` numbers layers in the order in which the graph runs its attentions.
        used: Nodes whose result another node of the captured graph reads.
        rotations: How keys are rotated, by what tells keys that are rotated alike.
        expansions: How keys and values are made of latents, by what tells those that are made alike.
        sites: Attentions to rewrite.
        attentions: Every attention by the name of its output; one that is not understood is a node.
        reports: What became of each attention.
        state_reports: What became of each cache.
        contractions: Attentions found by evaluation, by their softmax; or why what is there is none.
        updates: Fixed-size caches of which the graph returns an updated copy, by that copy.
        rings: Buffers of fixed size that keep the last tokens, by what attention reads of each.
        calibration: Calibration constants of new caches.
        caches: The quantized caches among the inputs.
        made: The quantized caches that stand for the buffers which the graph allocates.
        seen: Importance scores and queries for caches that the graph makes of its own tokens.
        dense: Caches that become quantized in this call, or are returned updated, although their attention was refused.
        reasons: Why what reads a cache dense does not read it packed.
        extended: Dynamic caches whose attention was refused, and which take new tokens all the same.
        conversions: 16-bit buffers to convert after a call.
        check: Writes to check before a call.
        thaw: The reason why the call runs as captured; ``None`` if it does not.
        thawed: The quantized caches that become ordinary tensors for that reason.
        plans: How each value that the captured graph returned is made.
        lengths: What stands for the lengths of growing caches, where steps may be recorded.
        hindrance: Why they are not to be, if so, though nothing in the graph is in the way.
        unrecorded: Why they may not; ``None`` if they may, or where the graph is no step.
        changes_memory: Whether a cache gets other memory in this call, for a ring, or to count each of its rows.
        by_row: Quantized caches that count each row from this call on.
    """

    module: GraphModule
    spec: CacheSpec
    inputs: dict[Node, Any]
    sizes: SizeReader
    returned: int
    used: set[Node]
    by_order: bool = False
    rotations: dict[Hashable, Rotation] = field(default_factory=dict)
    expansions: dict[Hashable, Any] = field(default_factory=dict)
    sites: list[AttentionSite] = field(default_factory=list)
    attentions: dict[str, Attention | Node] = field(default_factory=dict)
    readers: list[AttentionSite] = field(default_factory=list)
    reports: list[SiteReport] = field(default_factory=list)
    state_reports: list[StateReport] = field(default_factory=list)
    contractions: dict[Node, Attention | Refusal] = field(default_factory=dict)
    updates: dict[Node, Update] = field(default_factory=dict)
    rings: dict[Node, Ring] = field(default_factory=dict)
    calibration: CalibrationInputs = field(default_factory=CalibrationInputs)
    caches: dict[Node, CacheNodes] = field(default_factory=dict)
    made: dict[Node, CacheNodes] = field(default_factory=dict)
    seen: dict[Node, Seen] = field(default_factory=dict)
    dense: list[tuple[State, Quantization]] = field(default_factory=list)
    reasons: dict[Node, str] = field(default_factory=dict)
    extended: list[tuple[State, Quantization]] = field(default_factory=list)
    conversions: list[Conversion] = field(default_factory=list)
    check: SlotCheck | None = None
    thaw: str | None = None
    thawed: set[Node] = field(default_factory=set)
    plans: list[Output] = field(default_factory=list)
    lengths: Lengths | None = None
    hindrance: str | None = None
    unrecorded: str | None = None
    changes_memory: bool = False
    by_row: set[Node] = field(default_factory=set)

    @classmethod
    def copy_of(
        cls, gm: GraphModule, spec: CacheSpec, example_inputs: Sequence[Any], by_order: bool = False
    ) -> Graph:
        """Return a graph whose rewriting leaves ``gm`` untouched."""
        module = copy_module(gm)
        placeholders = list(module.graph.find_nodes(op="placeholder"))
        inputs = dict(zip(placeholders, example_inputs, strict=True))
        returned = len(module.graph.output_node().args[0])  # type: ignore[arg-type]
        used = {node for node in module.graph.nodes if node.users}
        return cls(module, spec, inputs, SizeReader(placeholders), returned, used, by_order)

    @property
    def fx(self) -> torch.fx.Graph:
        """The nodes."""
        return self.module.graph

    @property
    def output(self) -> Node:
        """The node that returns."""
        return self.fx.output_node()

    @property
    def results(self) -> list[Any]:
        """What the graph returns."""
        return list(self.output.args[0])  # type: ignore[arg-type]

    @results.setter
    def results(self, results: Sequence[Any]) -> None:
        self.output.args = (tuple(results),)

    def replace(self, old: Node, new: Node) -> None:
        """Let ``new`` stand for ``old`` in the graph and in all that passes have learnt of it."""
        old.replace_all_uses_with(new)
        self.fx.erase_node(old)
        self.sites = [_renamed(site, old, new) for site in self.sites]
        self.readers = [_renamed(site, old, new) for site in self.readers]
        self.made = {new if node is old else node: cache for node, cache in self.made.items()}
        self.seen = {
            _renamed(key, old, new): _renamed(seen, old, new) for key, seen in self.seen.items()
        }

    def readers_of(self, site: AttentionSite) -> list[AttentionSite]:
        """Return the further attentions over the caches of a site, in order."""
        return [reader for reader in self.readers if reader.shares(site)]

    def states(self) -> list[tuple[State, Quantization]]:
        """Return the caches that the call keeps quantized, each with its quantization."""
        return [pair for site in self.sites for pair in site.states()] + self.dense + self.extended

    @cached_property
    def arguments(self) -> Mapping[Node, int]:
        """Place of each captured placeholder among the arguments of a call."""
        return {node: index for index, node in enumerate(self.inputs)}


@dataclass(frozen=True)
class PassReport:
    """What a pass changed, one line a change; none where it had nothing to do."""

    changes: tuple[str, ...] = ()


Pass = Callable[[Graph], PassReport]


def _renamed(x: Any, old: Node, new: Node) -> Any:
    """Return a site, or a part of one, with one node in place of another."""
    if x is old:
        return new
    if isinstance(x, tuple):
        return tuple(_renamed(item, old, new) for item in x)
    if isinstance(x, (AttentionSite, Attention, State)):
        changed = {name: _renamed(value, old, new) for name, value in vars(x).items()}
        return replace(x, **changed)
    return x


def copy_module(gm: GraphModule) -> GraphModule:
    """Copy a captured graph with all that AOTAutograd looks for; Dynamo still needs the original."""
    return module_of(gm, copy_graph(gm))


def copy_graph(gm: GraphModule) -> torch.fx.Graph:
    """Copy the graph of a module, to be changed and made a module by `module_of`."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for node, copy in copies.items():
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
    return graph


def module_of(gm: GraphModule, graph: torch.fx.Graph) -> GraphModule:
    """Return a module that runs a changed copy of the graph of ``gm``; code is made of it here."""
    module = GraphModule(gm, graph)
    module.meta = gm.meta
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, name):
            setattr(module, name, getattr(gm, name))
    return module
