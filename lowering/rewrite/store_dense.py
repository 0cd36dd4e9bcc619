"""Write the caches quantized whose attention was refused, beside what that reads."""

from __future__ import annotations

from dataclasses import replace

from kvq_compile.lowering.cache_nodes import slots_from, tokens_for
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.rewrite.attend_to_new_tokens import allocate
from kvq_compile.lowering.rewrite.fuse_attention import check_room
from kvq_compile.lowering.sites import Life


def store_dense(graph: Graph) -> PassReport:
    """Append the new tokens of caches of fixed size to a quantized one, where their attention was refused.

    Before:  keys = zeros([B, H, S, D]); keys.index_copy_(2, position, key); ...; return keys
             keys = index_copy(past, 2, position, key); ...; return keys                    # past is quantized
    After:   the same; made = kvq.quantize(key[:, :, :0], S); kvq.append_(*made, key, position); return *made
             the same; kvq.append_(*past, key, position); return past
    Because: what reads the tensor is not understood and goes on to read it, but it lives in this call only.
    """
    changes = []
    for state, quantization in graph.dense:
        if state.life not in (Life.ALLOCATED, Life.BUFFER):
            continue
        past = state.past
        assert state.write is not None and past is not None
        with graph.fx.inserting_before(state.write):
            check_room(graph.fx, state)
        with graph.fx.inserting_before(state.write.next):
            state = replace(state, new=tokens_for(graph.fx, state.new, state.base))
            if state.life is Life.ALLOCATED:
                graph.made[state.base] = allocate(graph, state, quantization)
            else:
                slots = slots_from(state.position)
                graph.caches[past].append(graph.fx, state.new, slots)
                graph.results = [past if x is state.base else x for x in graph.results]
        changes.append(f"{state.new} is written quantized beside {state.base}")
    return PassReport(tuple(changes))
