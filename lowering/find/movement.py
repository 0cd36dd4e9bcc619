"""Trace the elements of a tensor to where they come from, whatever operations moved them.

A cache that grows can be spelled in many ways: ``cat``, ``F.pad`` and a write, an allocation filled by slices,
``scatter``, ``where``, a sum of one-hot products. None of them is matched here. What lies between the returned
tensor and the cache is *evaluated*, on the CPU and on random numbers, at several lengths where lengths are symbols
of the graph. The tensor is a dynamic cache if it equals ``cat([past, new], 2)`` every time, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.replay import is_integer, number
from kvq_compile.lowering.nodes import (
    argument,
    getitem_index,
    is_full,
    order_of,
    root_of,
    same,
    shape_of,
    target_name,
    value_of,
    writes_in_place,
)
from kvq_compile.lowering.sites import Refusal

MIXING = (
    *("matmul", "bmm", "mm", "addmm", "baddbmm", "linear", "einsum", "softmax", "embedding"),
    *("scaled_dot_product_attention", "flex_attention", "layer_norm", "rms_norm", "group_norm"),
    *("conv1d", "conv2d", "conv3d", "batch_norm", "multi_head_attention_forward"),
)
# Operations that take nothing but shape, dtype or device of their first argument.
_SHAPED = (
    *("size", "dim", "new_empty", "new_zeros", "new_ones", "new_full"),
    *("empty_like", "zeros_like", "ones_like", "full_like"),
)
_EMPTY = ("empty", "new_empty", "empty_like")
_REACH = 64  # nodes looked at between a tensor and the cache, far more than any spelling takes
_TRIES = 12  # nodes tried as the new tokens
_LARGEST = 1 << 26  # elements evaluated at once; 256 MiB in float32
_SIZES = (5, 3, 7, 4, 11, 6, 13, 9)  # what symbolic sizes are set to


@dataclass(frozen=True)
class Growth:
    """A tensor that holds the tokens of a cache and new ones behind them.

    Attributes:
        past: The placeholder that holds the cache.
        new: The new tokens, ``[B, H, T, D]``.
        index: Node of the rows of ``past`` that make up the batch; ``None`` for all, in order.
        rows: The same as numbers, where no node has them.
        steps: The nodes from there to the tensor, in order; their writes are into memory of their own.
    """

    past: fx.Node
    new: fx.Node
    index: fx.Node | None = None
    rows: tuple[int, ...] | None = None
    steps: tuple[fx.Node, ...] = ()


def is_cache_like(node: Any) -> bool:
    """Return whether a node is an argument ``[B, H, S, D]`` of floating-point elements."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return False
    value = value_of(node)
    held = isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)
    return held and value.dim() == 4 and value.is_floating_point()


def moved_from(node: Any) -> Any:
    """Return the tensor whose elements ``node`` holds unchanged, walking back along copies and whole views."""
    while isinstance(node, fx.Node):
        name = _plain_name(node)
        if (
            name in ("contiguous", "clone", "detach", "alias")
            or _keeps_dtype(node, name)
            or (name == "getitem" and _takes_all(node))
        ):
            node = node.args[0]
        else:
            return node
    return node


def _keeps_dtype(node: fx.Node, name: str) -> bool:
    """Return whether a cast casts nothing."""
    if name not in ("to", "type", "type_as", "float", "half", "bfloat16"):
        return False
    before, after = value_of(node.args[0]), value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return (before.dtype, before.device) == (after.dtype, after.device)


def _takes_all(node: fx.Node) -> bool:
    index, shape = getitem_index(node), shape_of(node.args[0])
    if index is None or shape is None or len(index) != len(shape):
        return False
    return all(is_full(part, size) for part, size in zip(index, shape, strict=True))


def is_whole_cache(node: fx.Node) -> bool:
    """Return whether a subscript takes all of a cache: another name for it."""
    return is_cache_like(node.args[0]) and _takes_all(node)


def cache_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the cache-like arguments whose elements may be among those of ``node``, moved or changed."""
    return [found for found in _reached(node) if is_cache_like(found)]


def made_of(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the tensors whose elements, moved or changed, may be among those of ``node``; products end the search."""
    return _reached(node)


def _reached(node: fx.Node, cuts: Iterable[fx.Node] = ()) -> Iterator[fx.Node]:
    """Yield the tensors of three dimensions and more that ``node`` is made of, nearest first."""
    writers = _writers(node.graph)
    seen, front = set(cuts), [] if _plain_name(node) in MIXING else [node]
    for _ in range(_REACH):
        following: list[fx.Node] = []
        for current in front:
            for other in (*data_of(current), *writers.get(root_of(current), ())):
                wide = len(shape_of(other) or ()) >= 3 or _plain_name(other) == "setitem"
                if other not in seen and wide:
                    seen.add(other)
                    yield other
                    if _plain_name(other) not in MIXING:
                        following.append(other)
        front = following


def data_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose elements, not only shapes, a node depends on."""
    name = _plain_name(node)
    if name in _SHAPED or (name == "getattr" and node.args[1] in ("shape", "dtype", "device")):
        return []
    if name in ("type_as", "to", "expand_as", "view_as"):
        first = node.args[0]
        return [first] if isinstance(first, fx.Node) else []
    return node.all_input_nodes


def _writers(graph: fx.Graph) -> dict[Any, list[fx.Node]]:
    """Return the nodes that write in place, by the tensor whose memory they write into."""
    writers: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and node.args and writes_in_place(node):
            writers.setdefault(root_of(node.args[0]), []).append(node)
    return writers


def _plain_name(node: Any) -> str:
    """Return the name of what a node calls without the overload: ``"cat"`` of ``aten.cat.default``."""
    return target_name(node).partition(".")[0]


def find_growth(grown: fx.Node) -> Growth | None:
    """Return what ``grown`` ``[B, H, S + T, D]`` is made of, if it is a cache with new tokens behind it."""
    shape = shape_of(grown)
    if shape is None or len(shape) != 4 or grown.op == "placeholder":
        return None
    near = list(_reached(grown))
    for past in [node for node in near if gathered_from(node) is not None or is_cache_like(node)]:
        before = shape_of(past) or ()
        if not (same(before[1], shape[1]) and same(before[3], shape[3])):
            continue
        tokens = shape[2] - before[2]
        tried = 0
        for new in near:
            if new is past or not _fits(new, past, (shape[0], shape[1], tokens, shape[3])):
                continue
            tried += 1
            found = _Trial(grown, past, new).growth() if tried <= _TRIES else None
            if found is not None:
                return found
    return None


def _fits(new: fx.Node, past: fx.Node, shape: tuple[Any, ...]) -> bool:
    mine, value, held = shape_of(new), value_of(new), value_of(past)
    if mine is None or len(mine) != 4 or value.dtype != held.dtype:
        return False
    return all(same(a, b) for a, b in zip(mine, shape, strict=True))


def gathered_from(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """Return the cache and the index of which ``node`` takes rows along the batch."""
    name = _plain_name(node)
    index: Any = None
    if name == "index_select" and argument(node, 1, "dim") in (0, -4):
        index = argument(node, 2, "index")
    elif name == "getitem" and (found := getitem_index(node)) is not None and len(found) == 4:
        shape = shape_of(node.args[0]) or ()
        if len(shape) == 4 and all(is_full(found[dim], shape[dim]) for dim in (1, 2, 3)):
            index = found[0]
    if not isinstance(index, fx.Node) or not is_integer(index) or len(shape_of(index) or ()) != 1:
        return None
    if value_of(index).dtype == torch.bool:
        return None
    past = moved_from(node.args[0])
    return (past, index) if is_cache_like(past) else None


class _Trial:
    """The operations between a cache and its new tokens and what may be the dynamic cache.

    Args:
        grown: What may be the dynamic cache.
        past: A cache-like placeholder, or rows taken from one.
        new: What may be the new tokens.
    """

    def __init__(self, grown: fx.Node, past: fx.Node, new: fx.Node) -> None:
        self._grown, self._past, self._new = grown, past, new
        self._place = order_of(grown.graph)
        self._steps: list[fx.Node] = []

    def growth(self) -> Growth | None:
        """Return the growth if evaluation bears it out."""
        if not self._collect():
            return None
        gathered = gathered_from(self._past)
        past, index = gathered if gathered is not None else (self._past, None)
        rows: tuple[int, ...] | None = None
        try:
            for sizes in self._assignments():
                found = self._holds(sizes, fixed=gathered is not None)
                if found is None or (rows is not None and rows != found):
                    return None
                rows = found
        except (Refusal, RuntimeError, IndexError, TypeError, ValueError, AttributeError):
            return None  # what cannot be evaluated is not understood
        if rows is None:
            return None
        return Growth(past, self._new, index, rows or None, tuple(self._steps))

    def _collect(self) -> bool:
        """Collect the nodes to run; say whether nothing but they decides on the result."""
        place, writers = self._place, _writers(self._grown.graph)
        needed: set[fx.Node] = set()
        stack = [self._grown]
        while stack:
            node = stack.pop()
            if node in needed or node in (self._past, self._new):
                continue
            if node.op not in ("call_function", "call_method", "get_attr"):
                if isinstance(value_of(node), (torch.SymInt, int)):
                    continue
                return False
            if _plain_name(node) in MIXING or len(needed) > _REACH:
                return False
            needed.add(node)
            if not isinstance(value_of(node), torch.SymInt):
                stack.extend(data_of(node))
            stack.extend(writers.get(root_of(node), ()))
        self._steps = sorted(needed, key=place.__getitem__)
        end = place[self._steps[-1]]
        for cut in (self._past, self._new):
            changes = [place[node] for node in writers.get(root_of(cut), ())]
            if any(place[cut] < change <= end for change in changes):
                return False  # it changes before it is moved
        last = max((place[node] for node in self._steps if writes_in_place(node)), default=-1)
        memory = root_of(self._grown)
        readers = [user for node in self._steps if root_of(node) is memory for user in node.users]
        return all(place[user] > last for user in readers if user not in needed)

    def _assignments(self) -> Iterator[Mapping[Any, int]]:
        """Yield the sizes to try for the symbols of the graph."""
        nodes = (*self._steps, self._past, self._new)
        symbols: set[Any] = set()
        for node in nodes:
            value = value_of(node)
            sizes = value.shape if isinstance(value, Tensor) else (value,)
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    symbols |= size.node.expr.free_symbols
        ordered = sorted(symbols, key=str)
        for trial in range(3 if ordered else 1):
            yield {
                symbol: _SIZES[(place + trial) % len(_SIZES)] + len(_SIZES) * (place // len(_SIZES))
                for place, symbol in enumerate(ordered)
            }

    def _holds(self, sizes: Mapping[Any, int], fixed: bool) -> tuple[int, ...] | None:
        """Return the rows of the past in the dynamic cache, ``()`` for all in order; ``None`` if it is none."""
        known: dict[fx.Node, Any] = {}
        for node in (self._past, self._new):
            known[node] = _random(value_of(node), sizes)
        past, new = known[self._past], known[self._new]
        for node in self._steps:
            known[node] = _run(node, known, sizes)
        grown, length = known[self._grown], past.shape[2]
        if grown.dtype != past.dtype or grown.shape[2] != length + new.shape[2]:
            return None
        if not torch.equal(grown[:, :, length:], new):
            return None
        kept = grown[:, :, :length]
        if torch.equal(kept, past):
            return ()
        if fixed or length == 0 or isinstance((shape_of(self._grown) or ())[0], torch.SymInt):
            return None
        rows = tuple(
            next((row for row in range(past.shape[0]) if torch.equal(past[row], one)), -1)
            for one in kept
        )
        return None if -1 in rows else rows


def _random(like: Tensor, sizes: Mapping[Any, int]) -> Tensor:
    shape = [_size(size, sizes) for size in like.shape]
    count = 1
    for size in shape:
        count *= size
    if count > _LARGEST:
        raise Refusal("the cache is too large to be evaluated")
    return torch.rand(shape, dtype=torch.float32, device="cpu").add_(0.5).to(like.dtype)


def _size(size: Any, sizes: Mapping[Any, int]) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = sympy.sympify(size.node.expr).xreplace(
        {symbol: sympy.Integer(chosen) for symbol, chosen in sizes.items()}
    )
    return int(expression) if expression.is_number else number(size)


def _run(node: fx.Node, known: Mapping[fx.Node, Any], sizes: Mapping[Any, int]) -> Any:
    """Evaluate one node on the CPU."""

    def fill(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return known[x] if x in known else _blank(x, sizes)
        if isinstance(x, torch.device) or (isinstance(x, str) and x.startswith("cuda")):
            return torch.device("cpu")
        return _size(x, sizes) if isinstance(x, torch.SymInt) else x

    value = value_of(node)
    if isinstance(value, torch.SymInt):
        return _size(value, sizes)
    if node.op == "get_attr":
        return _constant(node)
    args: Any = fx.node.map_aggregate(node.args, fill)
    kwargs: Any = fx.node.map_aggregate(node.kwargs, fill)
    target: Any = node.target
    if node.op == "call_method":
        result = getattr(args[0], target)(*args[1:], **kwargs)
    else:
        result = target(*args, **kwargs)
    if _plain_name(node) in _EMPTY and result.is_floating_point():
        result.fill_(float("nan"))  # no element of it may pass for one that was moved here
    return result


def _blank(node: fx.Node, sizes: Mapping[Any, int]) -> Any:
    """Return what stands for a node of which only shape, dtype and device count."""
    value = value_of(node)
    if isinstance(value, Tensor):
        shape = [_size(size, sizes) for size in value.shape]
        return torch.zeros((), dtype=value.dtype, device="cpu").expand(shape)
    return _size(value, sizes)


def _constant(node: fx.Node) -> Any:
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value.detach().cpu() if isinstance(value, Tensor) else value
