"""Keep a quantized cache quantized where the attention that reads it was refused."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from kvq_compile.kernels import ops
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.nodes import argument, insert_call, shape_of, target_name, value_of
from kvq_compile.lowering.rewrite.unwrap_caches import CacheInput
from kvq_compile.lowering.sites import Life, Refusal, State
from kvq_compile.lowering.sizes import SizeReader


def extend_refused(
    graph: fx.Graph, caches: dict[fx.Node, CacheInput], fused: Iterable[State], sizes: SizeReader
) -> list[State]:
    """Append the new tokens of every grown cache that no rewritten site has taken over.

    Before:  keys = cat([past_keys, key], 2); ...; return keys
    After:   kvq.append_(*past_keys, key); ...; return past_keys, one view longer
    Because: what leaves the call stays quantized, even if this call has to read it as ordinary tensors.

    Leaves alone: a cache that grows in another way, or twice. It leaves the call in 16 bit.

    Returns:
        The caches that leave the call as longer views.
    """
    output = next(iter(reversed(graph.nodes)))
    taken = {state.base for state in fused}
    extended: list[State] = []
    for past, cache in caches.items():
        grown = [
            user for user in past.users if user in output.all_input_nodes and user not in taken
        ]
        if (
            value_of(past).kind != "grown"
            or len(grown) != 1
            or any(user in taken for user in past.users)
        ):
            continue
        new = _new_tokens(grown[0], past)
        if new is None or not _is_known(sizes, new):
            continue
        with graph.inserting_before(grown[0].next):
            tokens = graph.call_method("detach", (new,)) if torch.is_grad_enabled() else new
            arguments = (*cache.parts, tokens, None, cache.length, cache.layout.token)
            insert_call(graph, ops.append_, (*arguments, None, *cache.frame, None, cache.originals))
        extended.append(State(Life.GROWN, grown[0], new, past))
    return extended


def _new_tokens(cat: fx.Node, past: fx.Node) -> fx.Node | None:
    """Return the one tensor that ``cat`` joins behind ``past``."""
    if target_name(cat) not in ("cat", "concat") or argument(cat, 1, "dim", 0) not in (2, -2):
        return None
    tensors = argument(cat, 0, "tensors")
    if len(tensors) != 2 or tensors[0] is not past or isinstance(value_of(tensors[1]), QuantizedKV):
        return None
    new: fx.Node = tensors[1]
    return new if value_of(new).dtype == value_of(past).dtype else None


def _is_known(sizes: SizeReader, new: fx.Node) -> bool:
    try:
        sizes.size((shape_of(new) or ())[2])
    except Refusal:
        return False
    return True
