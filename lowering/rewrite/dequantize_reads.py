"""Serve what is left that touches a quantized cache: read it as an ordinary tensor, write it quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvq_compile.kernels import ops
from kvq_compile.lowering.find.writes import is_write, read_write
from kvq_compile.lowering.nodes import (
    insert_call,
    root_of,
    shape_of,
    target_name,
    value_of,
    writes_in_place,
)
from kvq_compile.lowering.rewrite.unwrap_caches import CacheInput
from kvq_compile.lowering.sites import Refusal


def dequantize_reads(graph: fx.Graph, caches: dict[fx.Node, CacheInput]) -> None:
    """Replace the remaining users of every quantized cache and drop its wrapped placeholder.

    Before:  x = some_op(cache); cache.index_copy_(2, position, y); cache.zero_()
    After:   x = some_op(kvq.dequantize(*cache)); kvq.append_(*cache, y, position); cache_cursor.zero_()
    Because: a site that was refused still has to see the cache that an earlier call has quantized.

    Raises:
        NotImplementedError: A write cannot be expressed on the quantized cache; it would be lost.
    """
    for placeholder, cache in caches.items():
        for node in [n for n in graph.nodes if _writes_into(n, placeholder)]:
            _write(graph, node, placeholder, cache)
        for user in [n for n in graph.nodes if n in placeholder.users]:
            if not user.users:
                graph.erase_node(user)
                continue
            with graph.inserting_before(user):
                length = (
                    cache.length
                    if isinstance(cache.length, fx.Node)
                    else (shape_of(placeholder) or ())[2]
                )
                arguments = (*cache.parts, length, cache.layout.token, *cache.frame)
                dense = insert_call(graph, ops.dequantize, arguments, value_of(placeholder))
            user.replace_input_with(placeholder, dense)
        graph.erase_node(placeholder)


def _writes_into(node: fx.Node, cache: fx.Node) -> bool:
    """Say whether a node writes into a cache or into a view of it."""
    called = node.op in ("call_function", "call_method") and bool(node.args)
    return called and writes_in_place(node) and root_of(node.args[0]) is cache


def _write(graph: fx.Graph, write: fx.Node, placeholder: fx.Node, cache: CacheInput) -> None:
    with graph.inserting_before(write):
        if target_name(write) == "zero_" and write.args[0] is placeholder:
            graph.call_method("zero_", (cache.parts[ops.PARTS.index("cursor")],))
        elif is_write(write) and write.args[0] is placeholder:
            _append(graph, write, cache)
        else:
            raise NotImplementedError(
                f"{target_name(write)} cannot write into a quantized cache; write whole tokens with index_copy_"
            )
    write.replace_all_uses_with(placeholder)
    graph.erase_node(write)


def _append(graph: fx.Graph, write: fx.Node, cache: CacheInput) -> None:
    try:
        position, new = read_write(write)
    except Refusal as reason:
        raise NotImplementedError(f"a quantized cache cannot take this write: {reason}") from None
    is_tensor = isinstance(value_of(position), torch.Tensor)
    where: tuple[Any, Any] = (position, None) if is_tensor else (None, position)
    tokens = graph.call_method("detach", (new,)) if torch.is_grad_enabled() else new
    arguments = (*cache.parts, tokens, *where, cache.layout.token, None, *cache.frame)
    insert_call(graph, ops.append_, arguments)
