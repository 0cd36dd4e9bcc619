"""Find the cache tensor behind the key or the value of an attention.

From the operand back: repeated heads and cut-off slots are peeled away until the tensor that the model
keeps is reached. How that tensor enters and leaves the graph is its `Life`::

    cat([past, new], 2), returned                 GROWN (past is quantized) or GROWN_PLAIN
    new, returned                                 FRESH
    zeros(...), index_copy_(2, pos, new), returned   ALLOCATED
    placeholder, index_copy_(2, pos, new)         BUFFER or BUFFER_PLAIN; ``cache[:, :, pos] = new`` as well
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.cache import QuantizedKV
from kvq_compile.lowering.graph import (
    argument,
    getitem_index,
    is_full,
    same,
    shape_of,
    sizes_argument,
    target_name,
    value_of,
)
from kvq_compile.lowering.sites import Life, Refusal, State

ALLOCATIONS = ("zeros", "new_zeros", "zeros_like", "empty", "new_empty")
NO_CACHE = "keys and values are not kept after the call"


@dataclass(frozen=True)
class _Read:
    base: fx.Node
    repeats: Any
    slots: Any


def find_state(operand: fx.Node, outputs: set[fx.Node]) -> State:
    """Return the state behind an attention's key or value.

    Args:
        operand: The key, not transposed, or the value: ``[B, H, S, D]``.
        outputs: Nodes that the graph returns.

    Raises:
        Refusal: The tensor is not a cache, or not one that can be quantized.
    """
    read = _peel(operand)
    base = read.base
    shape = shape_of(base)
    if shape is None or len(shape) != 4:
        raise Refusal(f"keys and values must be [B, H, S, D], got {shape}")
    if target_name(base) in ("cat", "concat"):
        return _grown(read, outputs)
    if is_write(base) or base.op == "placeholder" or target_name(base) in ALLOCATIONS:
        return _written(read, outputs)
    if base in outputs:
        return State(Life.FRESH, base, base, repeats=read.repeats, slots=read.slots)
    raise Refusal(_why_not_kept(base, outputs))


def _why_not_kept(base: fx.Node, outputs: set[fx.Node]) -> str:
    for user in base.users:
        if user in outputs and target_name(user) == "getitem":
            return "only a part of the keys and values is kept (sliding window); left in 16 bit"
    return NO_CACHE


def _peel(node: fx.Node) -> _Read:
    """Walk back along repeated heads and cut-off slots."""
    repeats: Any = 1
    slots: Any = None
    while True:
        name = target_name(node)
        step = _repeat_of(node)
        if step is not None:
            node, times = step
            repeats = repeats * times
        elif name == "contiguous" or (name == "to" and value_of(node).dtype == value_of(node.args[0]).dtype):
            node = node.args[0]
        elif name == "getitem" and (cut := _prefix_of(node)) is not None:
            slots, node = cut, node.args[0]
        else:
            return _Read(node, repeats, slots)


def _repeat_of(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """Return the tensor whose heads ``node`` repeats next to one another, and how often."""
    name = target_name(node)
    if name == "repeat_interleave" and argument(node, 2, "dim") == 1:
        times = argument(node, 1, "repeats")
        return (node.args[0], times) if isinstance(times, int) else None
    if name == "expand":
        source, shape = shape_of(node.args[0]), shape_of(node)
        if source and shape and len(source) == len(shape) == 4 and same(source[1], 1) and same(source[0], shape[0]):
            return node.args[0], shape[1]
    if name in ("reshape", "view", "flatten") and target_name(node.args[0]) == "expand":
        expand = node.args[0]
        wide, inner, shape = shape_of(expand), shape_of(expand.args[0]), shape_of(node)
        if wide is None or inner is None or shape is None or (len(wide), len(inner), len(shape)) != (5, 5, 4):
            return None
        merged = same(shape[1], wide[1] * wide[2]) and same(shape[2], wide[3]) and same(shape[3], wide[4])
        if same(inner[2], 1) and same(inner[1], wide[1]) and merged:
            source = _inserted_axis(expand.args[0])
            return None if source is None else (source, wide[2])
    return None


def _inserted_axis(node: fx.Node) -> fx.Node | None:
    """Return the 4-d tensor that ``node`` gave an axis of size 1 behind its heads."""
    if target_name(node) == "unsqueeze" and argument(node, 1, "dim") in (2, -3):
        return node.args[0]  # type: ignore[return-value]
    index = getitem_index(node)
    if index is not None and len(index) == 5 and index[2] is None and all(is_full(i) for i in index if i is not None):
        return node.args[0]  # type: ignore[return-value]
    return None


def _prefix_of(node: fx.Node) -> Any:
    """Return how many leading slots a subscript keeps, if that is all it does."""
    index, shape = getitem_index(node), shape_of(node.args[0])
    if index is None or shape is None or len(index) != 4:
        return None
    cut = index[2]
    if not all(is_full(index[i], shape[i]) for i in (0, 1, 3)) or not isinstance(cut, slice):
        return None
    starts = cut.start is None or same(value_of(cut.start), 0)
    return cut.stop if starts and cut.step in (None, 1) and cut.stop is not None else None


def _grown(read: _Read, outputs: set[fx.Node]) -> State:
    cat = read.base
    tensors = [t for t in argument(cat, 0, "tensors") if not _is_empty(t)]
    if argument(cat, 1, "dim", 0) not in (2, -2):
        raise Refusal("new tokens are joined along another dimension than 2")
    if read.slots is not None:
        raise Refusal("attention reads only a part of the grown cache")
    if cat not in outputs:
        raise Refusal(_why_not_kept(cat, outputs))
    if len(tensors) == 1:
        return State(Life.FRESH, cat, cat, repeats=read.repeats)
    past, *new = tensors
    if len(new) != 1:
        raise Refusal("more than one tensor is joined to the cache")
    if past.op != "placeholder":
        return State(Life.FRESH, cat, cat, repeats=read.repeats)
    if isinstance(value_of(past), QuantizedKV):
        if value_of(past).kind != "grown":
            raise Refusal("a quantized buffer of fixed size is grown by cat")
        return State(Life.GROWN, cat, new[0], past, repeats=read.repeats)
    return State(Life.GROWN_PLAIN, cat, cat, past, repeats=read.repeats)


def _is_empty(node: Any) -> bool:
    shape = shape_of(node)
    return shape is not None and len(shape) == 1 and same(shape[0], 0)


def _written(read: _Read, outputs: set[fx.Node]) -> State:
    past = read.base.args[0] if is_write(read.base) else read.base
    writes = [user for user in past.users if is_write(user) and user.args[0] is past]
    if not writes:
        raise Refusal("attention reads a cache that this call does not write" if past.op == "placeholder" else NO_CACHE)
    if len(writes) > 1:
        raise Refusal("the cache is written more than once in a call")
    position, new = read_write(writes[0])
    quantized = isinstance(value_of(past), QuantizedKV)
    if past.op != "placeholder":
        if past not in outputs:
            raise Refusal(NO_CACHE)
        life = Life.ALLOCATED
    else:
        life = Life.BUFFER if quantized else Life.BUFFER_PLAIN
    _check_read_once(past, writes[0])
    return State(life, past, new, past, writes[0], position, read.repeats, read.slots)


def _check_read_once(past: fx.Node, write: fx.Node) -> None:
    """Make sure that nobody but the attention sees the cache: its write moves behind the attention."""
    readers = [user for user in (*past.users, *write.users) if user is not write and not _is_dead(user)]
    if len([user for user in readers if user.op != "output"]) > 1:
        raise Refusal("the cache is read outside attention in the same call")


def _is_dead(node: fx.Node) -> bool:
    return not node.users and node.op != "output" and not is_write(node)


def is_write(node: fx.Node) -> bool:
    """Say whether a node writes into its first argument as a cache update does."""
    return target_name(node) in ("index_copy_", "setitem", "index_put_")


def read_write(node: fx.Node) -> tuple[Any, fx.Node]:
    """Return the slots (a node of positions, or the first slot) and the tokens of a cache write.

    Raises:
        Refusal: It writes something else than whole tokens, one behind the other.
    """
    if target_name(node) == "index_copy_":
        if argument(node, 1, "dim") not in (2, -2):
            raise Refusal("the cache is written along another dimension than 2")
        return argument(node, 2, "index"), argument(node, 3, "source")
    index: Any = node.args[1]
    shape = shape_of(node.args[0])
    index = tuple(index) if isinstance(index, (tuple, list)) else (index,)
    assert shape is not None
    if target_name(node) == "index_put_":
        index = tuple(slice(None) if i is None else i for i in index)
    if len(index) not in (3, 4) or not all(is_full(index[i], shape[i]) for i in range(len(index)) if i != 2):
        raise Refusal("the cache is written at something else than whole tokens")
    slots, new = index[2], node.args[2]
    if not isinstance(new, fx.Node) or len(shape_of(new) or ()) != 4:
        raise Refusal("the cache is written with something else than [B, H, T, D]")
    if isinstance(slots, slice):
        if slots.step not in (None, 1):
            raise Refusal("the cache is written with gaps")
        return (0 if slots.start is None else slots.start), new
    value = value_of(slots)
    if not isinstance(value, torch.Tensor) or value.dim() != 1 or value.dtype not in (torch.int64, torch.int32):
        raise Refusal("the slots written are no vector of positions")
    return slots, new


def writes_of(placeholder: fx.Node) -> list[fx.Node]:
    """Return the nodes that write into a placeholder."""
    return [user for user in placeholder.users if is_write(user) and user.args[0] is placeholder]


