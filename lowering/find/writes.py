"""Read the writes that a model makes into a cache tensor of fixed size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kvq_compile.lowering.nodes import (
    argument,
    is_full,
    order_of,
    same,
    shape_of,
    source_name,
    target_name,
    value_of,
    writers_of,
)
from kvq_compile.lowering.sites import Refusal

WRITES = ("index_copy_", "setitem", "index_put_", "write_rows_")
RESETS = ("zero_", "fill_")
ADDING = ("index_add", "scatter_add")
ADDS = "adds to what the cache holds, where tokens are to be written over it"
NO_WRITE = "in a way that is not understood as tokens written at some cache positions"


def write_rows_(cache: Tensor, position: Tensor, new: Tensor) -> Tensor:
    """Write ``new`` ``[B, H, T, D]`` into ``cache`` ``[B, H, S, D]``, each row at its own positions ``[B, T]``.

    By this call graphs know such writes, whatever the model calls.
    """
    row = torch.arange(cache.shape[0], dtype=torch.int64, device=cache.device)[:, None]
    cache[row, :, position] = new.transpose(1, 2)
    return cache


def is_write(node: fx.Node) -> bool:
    """Return whether a node writes into its first argument as a cache update does."""
    return target_name(node) in WRITES


def writes_of(cache: fx.Node) -> list[fx.Node]:
    """Return the nodes that write into a cache tensor, in order."""
    writes = [user for user in cache.users if is_write(user) and user.args[0] is cache]
    if len(writes) < 2:
        return writes
    return sorted(writes, key=order_of(cache.graph).__getitem__)


def other_write(memory: fx.Node) -> str | None:
    """Return what is wrong with the first write in place into a cache that is in no known spelling, if there is one."""
    for writer in writers_of(memory.graph).get(memory, ()):
        name = target_name(writer).partition(".")[0]
        if name in RESETS or (is_write(writer) and writer.args[0] is memory):
            continue
        if name.rstrip("_") in ADDING:
            return f"{name} {ADDS}"
        return f"{name} writes {source_name(memory)} {NO_WRITE}"
    return None


def read_write(node: fx.Node) -> tuple[Any, fx.Node]:
    """Return the cache positions (a node of positions, or the first cache position) and the tokens of a cache write.

    Positions are ``[T]``, or ``[B, T]`` where each row has its own.

    Raises:
        Refusal: It writes something else than whole tokens, one behind the other.
    """
    if target_name(node) == "write_rows_":
        return node.args[1], node.args[2]  # type: ignore[return-value]
    slots, new = _index_copy(node) if target_name(node) == "index_copy_" else _assignment(node)
    shape, cache = shape_of(new), shape_of(node.args[0])
    if cache is None or shape is None or len(cache) != 4 or len(shape) != 4:
        raise Refusal("the cache is written with something else than [B, H, T, D]")
    if not all(same(shape[dim], cache[dim]) for dim in (0, 1, 3)):
        raise Refusal("the cache is written with less than whole tokens of every sequence")
    if isinstance(slots, slice):
        return _first_slot(slots, cache[2], shape[2]), new
    value = value_of(slots)
    if (
        not isinstance(value, torch.Tensor)
        or value.dim() != 1
        or value.dtype not in (torch.int64, torch.int32)
    ):
        raise Refusal("the cache positions written are no vector")
    if statically_known_true(value.shape[0] != shape[2]):
        raise Refusal("one token is written to several cache positions")
    return slots, new


def _index_copy(node: fx.Node) -> tuple[Any, Any]:
    if argument(node, 1, "dim") not in (2, -2):
        raise Refusal("the cache is written along another dimension than 2")
    return argument(node, 2, "index"), argument(node, 3, "source")


def _assignment(node: fx.Node) -> tuple[Any, Any]:
    """Return the cache positions and the tokens of ``cache[:, :, slots] = new``."""
    index: Any = argument(node, 1, "indices")
    index = tuple(index) if isinstance(index, (tuple, list)) else (index,)
    shape = shape_of(node.args[0]) or ()
    if target_name(node) == "index_put_":
        index = tuple(slice(None) if i is None else i for i in index)
        if argument(node, 3, "accumulate", False):
            raise Refusal(f"{target_name(node)} {ADDS}")
    if len(index) not in (3, 4) or len(index) > len(shape):
        raise Refusal("the cache is written at something else than whole tokens")
    if isinstance(value_of(index[0]), torch.Tensor):
        raise Refusal(
            "the cache is written at rows of an index, which is not understood as all its rows, each once a call at "
            "positions of its own"
        )
    if not all(is_full(index[i], shape[i]) for i in range(len(index)) if i != 2):
        raise Refusal("the cache is written at something else than whole tokens")
    return index[2], argument(node, 2, "values")


def _first_slot(slots: slice, size: Any, tokens: Any) -> Any:
    """Return the first cache position of a slice that takes ``tokens`` cache positions of ``size``."""
    if slots.step not in (None, 1):
        raise Refusal("the cache is written with gaps")
    start = 0 if slots.start is None else slots.start
    stop = size if slots.stop is None else slots.stop
    if any(statically_known_true(value_of(bound) < 0) for bound in (start, stop)):
        raise Refusal("the cache is written at positions counted from its end")
    if statically_known_true(value_of(stop) - value_of(start) != tokens):
        raise Refusal("one token is written to several cache positions")
    return start
