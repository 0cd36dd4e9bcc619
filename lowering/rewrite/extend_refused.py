"""Keep a quantized cache quantized where the attention that reads it was refused."""

from __future__ import annotations

import torch
from torch import fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import argument, shape_of, target_name, value_of
from kvq_compile.lowering.sites import Coding, Life, Refusal, State
from kvq_compile.lowering.sizes import SizeReader


def extend_refused(graph: Graph) -> PassReport:
    """Append the new tokens of every grown cache that no rewritten site has taken over.

    Before:  keys = cat([past_keys, key], 2); ...; return keys
    After:   kvq.append_(*past_keys, key); ...; return past_keys, one view longer
    Because: what leaves the call stays quantized, even if this call has to read it as ordinary tensors.

    Leaves alone: a cache that grows in another way, or twice. It leaves the call in 16 bit.
    """
    changes = []
    taken = {state.base for state, _ in graph.states()}
    returned = graph.output.all_input_nodes
    for past, cache in graph.caches.items():
        grown = [user for user in past.users if user in returned and user not in taken]
        if (
            past.op != "placeholder"
            or value_of(past).kind != "grown"
            or len(grown) != 1
            or any(user in taken for user in past.users)
        ):
            continue
        new = _new_tokens(grown[0], past)
        if new is None or not _is_known(graph.sizes, new):
            continue
        with graph.fx.inserting_before(grown[0].next):
            tokens = graph.fx.call_method("detach", (new,)) if torch.is_grad_enabled() else new
            if value_of(new).dtype != value_of(past).dtype:
                tokens = graph.fx.call_method("to", (tokens, value_of(past).dtype))
            cache.append(graph.fx, tokens, (None, cache.length))
        graph.extended.append((State(Life.GROWN, grown[0], new, past), Coding(cache.layout)))
        changes.append(f"{past} takes {new}; {grown[0]} is still read as an ordinary tensor")
    return PassReport(tuple(changes))


def _new_tokens(cat: fx.Node, past: fx.Node) -> fx.Node | None:
    """Return the one tensor that ``cat`` joins behind ``past``."""
    if target_name(cat) not in ("cat", "concat") or argument(cat, 1, "dim", 0) not in (2, -2):
        return None
    tensors = argument(cat, 0, "tensors")
    if len(tensors) != 2 or tensors[0] is not past or isinstance(value_of(tensors[1]), QuantizedKV):
        return None
    new: fx.Node = tensors[1]
    held = value_of(past).dtype
    return new if torch.promote_types(held, value_of(new).dtype) == held else None


def _is_known(sizes: SizeReader, new: fx.Node) -> bool:
    try:
        sizes.size((shape_of(new) or ())[2])
    except Refusal:
        return False
    return True
