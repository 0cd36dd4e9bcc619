"""Find caches that are made for more sequences than a call has: all that it reads and writes are the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.rows import why_not_by_row
from kvq_compile.kernels.cache.tensor import Kind, QuantizedKV
from kvq_compile.kernels.layout import Layout
from kvq_compile.lowering.nodes import (
    argument,
    getitem_index,
    is_full,
    root_of,
    same,
    shape_of,
    target_name,
    value_of,
    writers_of,
)
from kvq_compile.lowering.sites import Refusal

SOME_ROWS_TAKEN = "a call takes some rows of the cache"
LAST_KEPT = f"{SOME_ROWS_TAKEN}, and its last tokens are kept, as many of each row"
OTHER_AXIS = f"{SOME_ROWS_TAKEN}, along an axis that numbers more than these"
UPDATED_ROWS = f"{SOME_ROWS_TAKEN}, and updates them in a copy"
_AXES = 3  # the fewest that a tensor of tokens has
Writers = Mapping[Any, list[fx.Node]]


class Rows(NamedTuple):
    """Rows as a graph names them, in numbers or nodes: from ``first`` up to ``last``, or ``count`` of them."""

    first: Any = None
    last: Any = None
    count: Any = None

    @property
    def are_all(self) -> bool:
        """Whether these are all rows whatever a tensor has, as ``:`` says."""
        return self == (None, None, None)

    def among(self, size: int) -> range:
        """Return them among ``size``, guarding on those that Dynamo knows by symbols."""
        first, last, count = (None if x is None else int(value_of(x)) for x in self)
        return range(size)[first : last if count is None else (first or 0) + count]


def row_ranges(graph: fx.Graph) -> dict[fx.Node, range]:
    """Return the arguments of which a graph takes the same rows wherever it reads or writes them, with these rows.

    Raises:
        Refusal: One of them is a quantized cache that cannot count its rows.
    """
    written = writers_of(graph)
    found: dict[fx.Node, range] = {}
    for node in graph.find_nodes(op="placeholder"):
        if not _may_be_lent(node, written) or _is_returned(node):
            continue
        taken = [taken_by(user, node) for user in node.users if user.op != "output"]
        rows = [part for part in taken if part is not None]
        if len(rows) == len(taken) and rows and _are_one(rows) and not rows[0].are_all:
            _settle(value_of(node))
            size = int(value_of(node).shape[0])
            among = rows[0].among(size)
            if len(among) < size:
                _check_can_be_lent(value_of(node))
            found |= {node: among} if len(among) > 0 else {}
    return found


def _settle(value: Any) -> None:
    """Guard on the sizes of a tensor and of its parts: rows of it are no tensors that Dynamo knows the symbols of."""
    caches = value.caches if isinstance(value, ArrangedKV) else (value,)
    parts = [x for cache in caches for x in (cache, *getattr(cache, "parts", ()))]
    for size in (size for x in (value, *parts) for size in (*x.shape, *x.stride())):
        int(size)


def taken_by(user: fx.Node, node: fx.Node) -> Rows | None:
    """Return the rows of a tensor that ``user`` takes or assigns; ``None`` where it does something else with it."""
    name, dims = target_name(user), len(shape_of(node) or ())
    if not user.args or user.args[0] is not node or list(user.all_input_nodes).count(node) != 1:
        return None
    if name == "narrow":
        rows = Rows(argument(user, 2, "start"), None, argument(user, 3, "length"))
        return rows if argument(user, 1, "dim") in (0, -dims) and _are_numbers(rows) else None
    index = getitem_index(user)
    if name == "setitem" and user.args[2] is not node:
        given = user.args[1]
        index = given if isinstance(given, tuple) else (given,)
    part = index[0] if index else None
    if part is Ellipsis and len(index or ()) <= dims:
        part = slice(None)
    if not isinstance(part, slice) or part.step not in (None, 1):
        return None
    rows = Rows(part.start, part.stop)
    return rows if _are_numbers(rows) else None


def _are_numbers(rows: Rows) -> bool:
    values = [value_of(x) for x in rows if x is not None]
    return all(
        type(x) is int or (isinstance(x, torch.SymInt) and x.node.has_hint()) for x in values
    )


def _are_one(rows: Iterable[Rows]) -> bool:
    """Return whether rows are the same in every call, without a guard on what may be a number of tokens."""
    first, *rest = rows
    spelled = [
        (value_of(x.first) or 0, value_of(x.last), value_of(x.count)) for x in (first, *rest)
    ]
    return all(
        (a is None) is (b is None) and (a is None or same(a, b))
        for other in spelled[1:]
        for a, b in zip(spelled[0], other, strict=True)
    )


def _may_be_lent(node: fx.Node, written: Writers) -> bool:
    """Return whether an argument is a static cache that can count its rows, or a tensor that may become one."""
    value = value_of(node)
    if isinstance(value, ArrangedKV):
        return value.arrangement.groups[0] == "B" and value.caches[0].kind != "grown"
    if isinstance(value, QuantizedKV):
        return value.kind != "grown"
    is_tensor = isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= _AXES
    if not is_tensor or value.requires_grad:
        return False
    return any(_writes_part(write, node) for write in written.get(node, ()))


def _is_returned(node: fx.Node) -> bool:
    """Return whether a graph returns a tensor's rows as a tensor of their own, which outlives the call."""
    whole = shape_of(node) or ()
    results = node.graph.output_node().all_input_nodes
    shapes = [shape_of(x) or () for x in results if x is not node and root_of(x) is node]
    return any(
        len(shape) == len(whole) and all(map(same, shape[1:], whole[1:])) for shape in shapes
    )


def _check_can_be_lent(value: Any) -> None:
    for cache in value.caches if isinstance(value, ArrangedKV) else (value,):
        if isinstance(cache, QuantizedKV):
            reason = why_not_lent(cache.page_layout, cache.kind)
            if reason is not None:
                raise Refusal(reason)


def why_not_lent(layout: Layout, kind: Kind) -> str | None:
    """Return why some rows of a cache cannot be taken as a cache of their own; ``None`` if they can."""
    if kind != "static":
        return LAST_KEPT
    reason = why_not_by_row(layout)
    return None if reason is None else f"{SOME_ROWS_TAKEN}, and {reason}; take another method"


def _writes_part(write: fx.Node, node: fx.Node) -> bool:
    """Return whether a write takes a part of a tensor along some axis behind the first: tokens of the rows."""
    whole = shape_of(node) or ()
    if target_name(write) == "setitem" and isinstance(write.args[1], tuple):
        apart = [part for part in write.args[1][1:] if not isinstance(part, int)]
        if not all(map(is_full, apart)):
            return True
    sources = (shape_of(x) or () for x in write.all_input_nodes if x is not write.args[0])
    return any(
        len(shape) == len(whole)
        and any(not same(a, b) for a, b in zip(shape[1:], whole[1:], strict=True))
        for shape in sources
    )
