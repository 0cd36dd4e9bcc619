"""Take KV heads in blocks where query heads take them in turn."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from kvq_compile.lowering.find.states import read_base
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import argument, calls, insert_call, shape_of, value_of
from kvq_compile.lowering.rewrite.spell_reads import find_read, is_cache, spell


def spell_heads(graph: Graph) -> PassReport:
    """Order the heads of a query, of its mask and of its output so that each KV head serves neighbours.

    Before:  output = scaled_dot_product_attention(query, keys.repeat(1, G, 1, 1), values.repeat(1, G, 1, 1), mask)
    After:   blocks = scaled_dot_product_attention(order(query), keys.repeat_interleave(G, 1), ..., order(mask))
             output = order_back(blocks)
    Because: later passes and kernels know heads that are repeated next to one another.

    Leaves alone: what evaluation does not prove to be heads in turn, and operands that something else reads.
    """
    changes = []
    returned = set(graph.output.all_input_nodes)
    kept = {*returned, *graph.updates}
    for node in list(calls(graph.fx, "scaled_dot_product_attention")):
        operands = [argument(node, place, name) for place, name in ((1, "key"), (2, "value"))]
        if any(is_cache(read_base(x)) or [*x.users] != [node] for x in operands):
            continue
        reads = [find_read(operand, kept, in_turn=True) for operand in operands]
        key, value = reads
        if key is None or value is None or key.times != value.times:
            continue
        heads = (shape_of(key.cache) or ())[1]
        if (shape_of(argument(node, 0, "query")) or ())[1] != heads * key.times:
            continue
        for read in (key, value):
            graph.updates.pop(read.result, None)
            spell(graph.fx, read)
        output = _in_blocks(graph.fx, node, heads, key.times)
        changes.append(f"{output} is the output of query heads that take KV heads in turn")
    graph.used |= {node for node in graph.fx.nodes if node.users}
    return PassReport(tuple(changes))


def _in_blocks(graph: fx.Graph, node: fx.Node, heads: int, times: int) -> fx.Node:
    """Order query and mask before an attention, and its output behind it, which is returned."""
    query, mask = argument(node, 0, "query"), argument(node, 3, "attn_mask")
    with graph.inserting_before(node):
        node.replace_input_with(query, _ordered(graph, query, times, heads))
        shape = shape_of(mask) or ()
        if len(shape) == 4 and shape[1] == heads * times:
            node.replace_input_with(mask, _ordered(graph, mask, times, heads))
    readers = list(node.users)
    with graph.inserting_after(node):
        anchor = graph.call_function(Tensor.detach, (node,))
    with graph.inserting_before(anchor):
        output = _ordered(graph, node, heads, times)
    graph.erase_node(anchor)
    for reader in readers:
        reader.replace_input_with(node, output)
    return output


def _ordered(graph: fx.Graph, node: fx.Node, outer: int, inner: int) -> fx.Node:
    """Return a tensor with the heads ``outer * inner`` in the order ``inner * outer``."""
    value: Any = value_of(node)
    for call, *args in (
        (Tensor.unflatten, 1, (outer, inner)),
        (Tensor.transpose, 1, 2),
        (Tensor.flatten, 1, 2),
    ):
        value = call(value, *args)
        node = insert_call(graph, call, (node, *args), value)
    return node
