"""Serve what is left that touches a quantized cache: read it as an ordinary tensor, write it quantized."""

from __future__ import annotations

from typing import Any

from torch import fx

from kvq_compile.kernels import ops
from kvq_compile.lowering.find_state import is_write, read_write
from kvq_compile.lowering.graph import insert_call, shape_of, value_of
from kvq_compile.lowering.sites import Refusal
from kvq_compile.lowering.unwrap_caches import CacheInput


def dequantize_reads(graph: fx.Graph, caches: dict[fx.Node, CacheInput]) -> None:
    """Replace the remaining users of every quantized cache and drop its wrapped placeholder.

    Before:  x = some_op(cache); cache.index_copy_(2, position, y)
    After:   x = some_op(kvq.dequantize(*cache)); kvq.append_(*cache, y, position)
    Because: a site that was refused still has to see the cache that an earlier call has quantized.

    Raises:
        Refusal: A write cannot be expressed on the quantized cache.
    """
    for placeholder, cache in caches.items():
        for user in [n for n in graph.nodes if n in placeholder.users]:
            if not user.users and not is_write(user) and user.op != "output":
                graph.erase_node(user)
            elif is_write(user) and user.args[0] is placeholder:
                _append(graph, user, placeholder, cache)
            elif user.op == "output":
                raise Refusal("a quantized cache is returned by a call that does not change it")
            else:
                with graph.inserting_before(user):
                    length = cache.length if isinstance(cache.length, fx.Node) else shape_of(placeholder)[2]  # type: ignore[index]
                    arguments = (*cache.parts, length, cache.layout.token)
                    dense = insert_call(graph, ops.dequantize, arguments, value_of(placeholder))
                user.replace_input_with(placeholder, dense)
        graph.erase_node(placeholder)


def _append(graph: fx.Graph, write: fx.Node, placeholder: fx.Node, cache: CacheInput) -> None:
    position, new = read_write(write)
    is_tensor = hasattr(value_of(position), "dim")
    where: tuple[Any, Any] = (position, None) if is_tensor else (None, position)
    with graph.inserting_before(write):
        insert_call(graph, ops.append_, (*cache.parts, new, *where, cache.layout.token))
    write.replace_all_uses_with(placeholder)
    graph.erase_node(write)
