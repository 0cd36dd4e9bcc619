"""Keep a quantized cache quantized where the attention that reads it was refused."""

from __future__ import annotations

import torch
from torch import fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.cache_nodes import CacheNodes, tokens_for
from kvq_compile.lowering.find.movement import gathered_from
from kvq_compile.lowering.find.trims import suffix_of
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import argument, shape_of, target_name, value_of
from kvq_compile.lowering.rewrite.gather_rows import copy_of, rows_of
from kvq_compile.lowering.sites import Life, Quantization, Refusal, State
from kvq_compile.lowering.sizes import SizeReader


def extend_refused(graph: Graph) -> PassReport:
    """Append the new tokens of every dynamic cache that no rewritten site has taken over.

    Before:  one = cat([past_keys, a], 2); two = cat([past_keys, b], 2); ...; return one, two
    After:   copy = clone(past_keys); kvq.append_(*copy, a); kvq.append_(*past_keys, b); ...
             return copy, past_keys, each one view longer
    Because: the cache stays quantized between calls, even if this call reads it dense. Of several caches
             grown from one, the last takes over its memory.

    Of a cache that is returned in part the last tokens are shown (a sliding window).

    Leaves alone: a cache that grows in another way. It is returned in 16 bit.
    """
    changes = []
    taken = {state.returned for state, _ in graph.states()}
    in_place = {state.past for state, _ in graph.states()}
    returned = set(graph.output.all_input_nodes)
    for kept in [node for node in reversed(graph.fx.nodes) if node in returned - taken]:
        base = suffix_of(kept) or kept
        growth = _growth(graph, base)
        if growth is None:
            continue
        past, new, cache = growth
        copied = past in in_place
        if copied and cache.layout.keep_exact:
            continue  # exact copies in host memory have one owner
        in_place.add(past)
        with graph.fx.inserting_before(base.next):
            if copied:
                cache = graph.caches[base] = copy_of(graph.fx, cache)
            tokens = tokens_for(graph.fx, new, past)
            cache.append(graph.fx, tokens, (None, cache.end(graph.fx)))
        gathered = gathered_from(past)
        source: fx.Node | None = past if gathered is None else gathered[0]
        held = base if copied else past
        source = None if held is source else source
        trimmed = None if base is kept else kept
        state = State(Life.GROWN, base, new, held, source=source, kept=trimmed)
        graph.extended.append((state, Quantization(cache.layout)))
        changes.append(f"{held} takes {new}; {base} is still read as an ordinary tensor")
    return PassReport(tuple(changes))


def _growth(graph: Graph, base: fx.Node) -> tuple[fx.Node, fx.Node, CacheNodes] | None:
    """Return the cache that ``base`` joins new tokens to, or rows of one; the tokens; and its packed form."""
    if target_name(base) != "cat" or argument(base, 1, "dim", 0) not in (2, -2):
        return None
    tensors = argument(base, 0, "tensors")
    if len(tensors) != 2:
        return None
    past, new = tensors
    gathered = gathered_from(past)
    if gathered is not None and past not in graph.caches and gathered[0] in graph.caches:
        if not _takes(graph, gathered[0], new):
            return None
        graph.caches[past] = rows_of(graph.fx, past, graph.caches[gathered[0]], gathered[1])
    if past not in graph.caches or not _takes(
        graph, past if gathered is None else gathered[0], new
    ):
        return None
    return past, new, graph.caches[past]


def _takes(graph: Graph, cache: fx.Node, new: fx.Node) -> bool:
    """Return whether a quantized cache can take the new tokens."""
    if value_of(cache).kind != "grown" or isinstance(value_of(new), QuantizedKV):
        return False
    held = value_of(cache).dtype
    return torch.promote_types(held, value_of(new).dtype) == held and _is_known(graph.sizes, new)


def _is_known(sizes: SizeReader, new: fx.Node) -> bool:
    try:
        sizes.size((shape_of(new) or ())[2])
    except Refusal:
        return False
    return True
