"""Leave caches that grow more than once in a call to be read as ordinary tensors."""

from __future__ import annotations

from torch import fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.movement import gathered_from
from kvq_compile.lowering.find.sites import left_alone
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import argument, target_name, value_of

SEVERAL = "the cache grows more than once in a call"


def refuse_branches(graph: Graph) -> PassReport:
    """Refuse sites that read one of several caches grown from the same one.

    Before:  one = cat([past, a], 2); two = cat([past, b], 2), or two = cat([past, a, b], 2); both are attended to
    After:   no sites that read them
    Because: fused attention appends in place, and what one has appended the other must not see.
    """
    grown: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.fx.nodes:
        if target_name(node) == "cat" and node.users:
            for tensor in argument(node, 0, "tensors"):
                if isinstance(tensor, fx.Node) and _is_quantized(tensor):
                    grown.setdefault(tensor, set()).add(node)
    refused = [
        site
        for site in graph.sites
        if any(len(grown.get(state.past, ())) > 1 for state, _ in site.states() if state.past)
    ]
    graph.sites = [site for site in graph.sites if site not in refused]
    graph.reports += [
        left_alone(site.layer, site.where, site.attention.output, SEVERAL) for site in refused
    ]
    return PassReport(tuple(f"{site.attention.output} is no site" for site in refused))


def _is_quantized(node: fx.Node) -> bool:
    gathered = gathered_from(node)
    return isinstance(value_of(node if gathered is None else gathered[0]), QuantizedKV)
