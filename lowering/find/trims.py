"""Find what a layer with a sliding window keeps: the last tokens of a tensor."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from kvq_compile.lowering.find.movement import moved_from
from kvq_compile.lowering.nodes import (
    argument,
    fixed_number,
    getitem_index,
    is_full,
    same,
    shape_of,
    target_name,
    value_of,
)


def suffix_of(node: Any) -> fx.Node | None:
    """Return the tensor ``[B, H, S, D]`` of which ``node`` holds the last tokens; ``None`` if it is no such cut."""
    cut = _cut(node)
    if cut is None:
        return None
    source, start, stop = cut
    size = (shape_of(source) or ())[2]
    ends = stop is None or same(value_of(stop), size)
    return source if ends and not same(value_of(start), 0) else None


def kept_of(base: fx.Node, outputs: Collection[fx.Node]) -> fx.Node | None:
    """Return what a graph keeps of the keys or values ``base``: themselves, or their last tokens.

    Args:
        base: What attention reads.
        outputs: Nodes that the graph returns.
    """
    if base in outputs:
        return base
    kept = []
    for node in outputs:
        moved = moved_from(
            node
        )  # a cut that takes all, as long as the window is not full, is but a move
        is_of_it = isinstance(moved, fx.Node) and moved.args[:1] == (base,)
        if moved is base or (is_of_it and suffix_of(moved) is base):
            kept.append(node)
    return kept[0] if len(kept) == 1 else None


def window_of(kept: fx.Node) -> int | None:
    """Return how many tokens a cut keeps at most, where that is a number."""
    cut = _cut(moved_from(kept))
    if cut is None:
        return None
    source, start, _ = cut
    number = fixed_number(start)
    if number is not None and number < 0:
        return -int(number)
    size, whole = (shape_of(node)[2] for node in (kept, source))  # type: ignore[index]
    fixed = not isinstance(size, torch.SymInt) and not same(size, whole)
    return int(size) if fixed else None


def _cut(node: Any) -> tuple[fx.Node, Any, Any] | None:
    """Return the tensor that ``node`` takes consecutive tokens of, the first and the one behind the last."""
    shape = shape_of(node)
    if shape is None or len(shape) != 4:
        return None
    if target_name(node) == "narrow" and argument(node, 1, "dim") in (2, -2):
        source, start = node.args[0], argument(node, 2, "start")
        whole = (shape_of(source) or ())[2]
        ends = same(value_of(start) + shape[2], whole)
        return (source, start, None) if ends else None
    index, whole = getitem_index(node), shape_of(node.args[0]) if node.args else None
    if index is None or whole is None or len(index) != 4 or len(whole) != 4:
        return None
    cut = index[2]
    if not isinstance(cut, slice) or cut.step not in (None, 1) or cut.start is None:
        return None
    if not all(is_full(index[dim], whole[dim]) for dim in (0, 1, 3)):
        return None
    return node.args[0], cut.start, cut.stop
