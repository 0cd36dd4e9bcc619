"""Return the operands of a graph's attentions, whatever the model's modules are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.lowering.arranged import Arranged
from kvq_compile.lowering.find.arrangements import propose
from kvq_compile.lowering.find.sites import NOT_OF_LATENTS, find_sites, left_alone
from kvq_compile.lowering.graph import Graph
from kvq_compile.lowering.nodes import changed_roots, insert_call, value_of
from kvq_compile.lowering.rewrite.arrange_caches import arrange_caches
from kvq_compile.lowering.rewrite.hold_slots import hold_slots
from kvq_compile.lowering.rewrite.name_updates import name_updates
from kvq_compile.lowering.rewrite.spell_attributes import spell_attributes
from kvq_compile.lowering.rewrite.spell_growth import spell_growth
from kvq_compile.lowering.rewrite.spell_reads import spell_reads
from kvq_compile.lowering.rewrite.unchain_writes import unchain_writes
from kvq_compile.lowering.sites import AttentionSite, Refusal, SiteReport

SINKS = "calibration does not know logits of sinks in a softmax"
Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # query, key, value and output of a site


@dataclass(frozen=True)
class Watched:
    """A graph that returns query, key, value and output of each attention behind its own results.

    Attributes:
        module: The graph.
        sites: The attentions that keep a cache, in order of execution.
        reports: Why others were left out.
        placeholders: The graph's inputs.
        written: Places of the inputs that the graph writes into.
        returned: How many results the captured graph has.
        arranged: How the captured graph's caches are laid out, where that is not as ``[B, H, S, D]``.
    """

    module: fx.GraphModule
    sites: list[AttentionSite]
    reports: list[SiteReport]
    placeholders: list[fx.Node]
    written: list[int]
    returned: int
    arranged: Arranged | None = None

    def take(self, args: Sequence[Any]) -> list[Any]:
        """Return the graph's inputs for the arguments of the captured one."""
        return list(args) if self.arranged is None else self.arranged.take(args)

    def run(self, args: Sequence[Any]) -> tuple[list[Any], list[Operands]]:
        """Run the graph eagerly; what it would write into is copied first, so no input changes.

        Returns:
            The results of the captured graph, and ``(query, key, value, output)`` of each site.
        """
        own = self.take(args)
        for index in self.written:
            own[index] = own[index].detach().clone()
        outputs = list(self.module.forward(*own))
        seen = outputs[self.returned :]
        results = outputs[: self.returned]
        if self.arranged is not None:
            results = self.arranged.give(args, own, results)
        return results, [
            (seen[i], seen[i + 1], seen[i + 2], seen[i + 3]) for i in range(0, len(seen), 4)
        ]


def watch_attentions(gm: fx.GraphModule, spec: CacheSpec, gradients: bool) -> Watched:
    """Return a copy of a captured graph that also returns the operands of its attentions.

    Before:  attend(query, key, value); return logits, key, value
    After:   key' = with_gradient(key); value' = with_gradient(value); attend(query, key', value');
             return logits, key', value', query, key', value', output
    Because: calibration needs queries, keys, values and gradients of a loss with respect to keys, values and outputs.
             ``with_gradient`` makes these leaves: with frozen parameters nothing else requires a gradient.

    Leaves alone: attentions that keep no cache; ``reports`` has the reasons.

    Args:
        gm: The graph that Dynamo captured; it is left untouched.
        spec: What the caches would be quantized to, which decides on the attentions that can be.
        gradients: Whether keys and values begin a gradient.

    Raises:
        ValueError: The graph reads a quantized cache.
    """
    gm = spell_attributes(gm)
    watched = _watched(gm, spec, gradients)
    known = propose(gm.graph) if len(watched.sites) < len(watched.reports) else {}
    if not known:
        return watched
    try:
        form = arrange_caches(gm, known)
    except Refusal:
        return watched
    other = _watched(form.module, spec, gradients)
    return replace(other, arranged=form) if len(other.sites) > len(watched.sites) else watched


def _watched(gm: fx.GraphModule, spec: CacheSpec, gradients: bool) -> Watched:
    """Return the watched copy of a graph whose caches are ``[B, H, S, D]``."""
    unknown = [None for node in gm.graph.nodes if node.op == "placeholder"]  # no constant decides
    graph = Graph.copy_of(gm, spec, unknown)
    unchain_writes(graph)  # first: the finders know a cache by one node
    hold_slots(graph)
    spell_growth(graph)
    name_updates(graph)
    spell_reads(graph)
    find_sites(graph)
    _leave_out_sinks(graph)
    _leave_out_latents(graph)
    placeholders = list(graph.inputs)
    changed = changed_roots(graph.fx.nodes)
    written = [index for index, node in enumerate(placeholders) if node in changed]
    seen: list[fx.Node] = []
    for site in graph.sites:
        key, value = site.key.new, site.value.new
        if gradients:
            key, value = _begin_gradient(graph.fx, key), _begin_gradient(graph.fx, value)
        seen += [site.attention.query, key, value, site.attention.output]
    graph.results = [*graph.results, *seen]
    graph.fx.lint()
    graph.module.recompile()
    return Watched(graph.module, graph.sites, graph.reports, placeholders, written, graph.returned)


def _leave_out_sinks(graph: Graph) -> None:
    """Leave out attentions whose outputs are not told by what is returned."""
    for site in [site for site in graph.sites if site.attention.score.has_sinks]:
        about = site.layer, site.where, site.attention.output, SINKS
        graph.reports.append(left_alone(*about))
        graph.sites.remove(site)


def _leave_out_latents(graph: Graph) -> None:
    """Leave out attentions whose keys and values are not what is kept."""
    for site in [site for site in graph.sites if site.expansion is not None]:
        about = site.layer, site.where, site.attention.output, NOT_OF_LATENTS
        graph.reports.append(left_alone(*about))
        graph.sites.remove(site)


def with_gradient(x: Tensor) -> Tensor:
    """Return a tensor that a gradient can be taken with respect to: ``x`` itself, or a new leaf."""
    return x if x.requires_grad else x.detach().requires_grad_()


def _begin_gradient(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Let everything that reads ``node`` read what a gradient can be taken with respect to."""
    place = node
    while place.next.op == "placeholder":
        place = place.next
    with graph.inserting_after(place):
        begun = insert_call(graph, with_gradient, (node,), value_of(node))
    node.replace_all_uses_with(begun, delete_user_cb=lambda user: user is not begun)
    return begun
