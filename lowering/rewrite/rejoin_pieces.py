"""Take apart a tensor whose heads or caches share an axis, ``[B, S, H * D]`` or ``[B, H, S, 2 * D]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.cache.arrangement import Arrangement, walk
from kvq_compile.lowering.nodes import insert_call, root_of, value_of, writes_in_place
from kvq_compile.lowering.rewrite.split_pieces import dense

Call = Callable[[fx.Node, str, tuple[Any, ...]], fx.Node]


def rejoin(
    graph: fx.Graph, tensor: fx.Node, caches: Sequence[fx.Node], how: Arrangement, call: Call
) -> None:
    """Let what reads a tensor, or writes into it, read caches and write into these.

    Before:  tensor[:, :, place] = new; attend(query, tensor[..., :D], tensor[..., D:])
    After:   whole = cat([keys, values], -1); whole[:, :, place] = new
             keys.copy_(whole[..., :D]); values.copy_(whole[..., D:])
             again = cat([keys, values], -1); attend(query, again[..., :D], again[..., D:])
    Because: no view of ``keys`` and ``values`` is that tensor. Later passes find by evaluation that the copies write
             tokens, and that ``again[..., :D]`` is a cache.

    Args:
        graph: The graph of the tensor.
        tensor: An argument or an allocation, which stays without readers but the output.
        caches: What it stands for, ``[B, H, S, D]`` each.
        how: How these lie in it.
        call: Inserts a call of a method.
    """
    views = [node for node in graph.nodes if node is not tensor and root_of(node) is tensor]
    aliases = {tensor, *views}
    written = {tensor: tensor} | {
        node: node.args[0] for node in views if writes_in_place(node) and node.args[0] in aliases
    }
    version: fx.Node | None = None

    def whole() -> fx.Node:
        return joined(graph, caches, how, call)

    def again(node: fx.Node, base: fx.Node) -> fx.Node:
        """Return what a view of the tensor is of another one, at the graph's insert point."""
        if node in written:
            return base if node is tensor else again(written[node], base)
        source = next(each for each in node.all_input_nodes if each in aliases)
        taken = again(source, base)
        made = graph.node_copy(node, lambda other: taken if other is source else other)
        revalue(made)
        return made

    for user in [node for node in graph.nodes if node.op != "output"]:
        read = [node for node in dict.fromkeys(user.all_input_nodes) if node in aliases]
        is_write = bool(user.args) and writes_in_place(user) and user.args[0] in aliases
        if not read or (user in aliases and not is_write):
            continue
        with graph.inserting_before(user):
            if version is None or is_write:
                version = whole()
            for node in read:
                user.replace_input_with(node, again(node, version))
        if is_write:
            with graph.inserting_before(user.next):
                for cache, part in zip(caches, walk(version, how.to_caches(), call), strict=True):
                    call(cache, "copy_", (part,))
            version = None


def revalue(view: fx.Node) -> None:
    """Let a view's example value lie in the memory of that of what it is a view of."""
    args, kwargs = fx.node.map_arg((view.args, view.kwargs), lambda node: dense(value_of(node)))
    target: Any = view.target
    if isinstance(target, str):
        target = getattr(type(args[0]), target)
    view.meta["example_value"] = target(*args, **kwargs)


def joined(graph: fx.Graph, caches: Sequence[fx.Node], how: Arrangement, call: Call) -> fx.Node:
    """Return the tensor of some caches, a copy, at the graph's insert point."""
    first = caches[0]
    if how.sizes:
        stacked = torch.stack([dense(value_of(first))] * len(caches))
        first = insert_call(graph, torch.stack, (list(caches),), stacked)
    (seen,) = walk(first, how.from_caches(), call)
    return seen
