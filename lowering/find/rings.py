"""Find static caches that keep the last tokens: a buffer that a call overwrites as a whole with its own last tokens.

A static layer with a sliding window rolls its buffer, puts a token at its end and copies the result back; or it joins
new tokens to what it holds, attends to that and keeps the last of it. Neither spelling is matched. What lies between
the buffer, the new tokens and what is copied is evaluated, as growth is (`movement`): the buffer is a ring if the
result is the end of ``cat([buffer, new], 2)``, or ``cat([buffer[:, :, :held], new], 2)`` where the buffer is not full,
every time and bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.movement import cache_inputs, is_cache_like, made_of, moved_from
from kvq_compile.lowering.find.trial import (
    CANNOT_BE_RUN,
    Trial,
    plain_name,
    random_like,
    size_of_trial,
)
from kvq_compile.lowering.find.trims import suffix_of
from kvq_compile.lowering.find.updates import ALLOCATIONS, ENDS, TRIES, is_like
from kvq_compile.lowering.nodes import (
    argument,
    is_full,
    order_of,
    root_of,
    same,
    shape_of,
    target_name,
    value_of,
)

_TRIALS = 8  # assignments of sizes, of which some are none that the call can have


@dataclass(frozen=True)
class Ring:
    """A buffer of S slots of which a call keeps the last S of the tokens held and its own.

    Attributes:
        past: The buffer, a placeholder; or, of one that the call allocates and fills, what it returns instead.
        new: The call's tokens, ``[B, H, T, D]``.
        held: How many slots of the buffer come before them: a number or a node; ``None`` for all, of a full buffer.
        position: Of a buffer that is filled first and then rolled, by a condition on the device, a node of the T
            positions: so many slots come before, or all.
        write: The node that overwrites the buffer; ``None`` where the call allocates it.
        base: What attention reads: the tokens held and the new ones, or the end of them. Of a buffer that holds
            nothing, the new tokens.
    """

    past: fx.Node
    new: fx.Node
    held: Any
    write: fx.Node | None
    base: fx.Node
    position: Any = None

    @property
    def is_filled_anew(self) -> bool:
        """Whether nothing of what the buffer held is kept."""
        return self.held is not None and same(value_of(self.held), 0)


@dataclass(frozen=True)
class RolledBuffer:
    """What a call overwrites a buffer with, before it is spelled as a `Ring`.

    Attributes:
        past, write: As a `Ring` has them.
        new: The call's tokens.
        whole: Of which the last are copied; itself, where all are.
        is_full: Whether all slots of the buffer come before the new tokens; else as many as ``whole`` is longer.
        steps: The nodes between, in order.
    """

    past: fx.Node
    new: fx.Node
    whole: fx.Node
    write: fx.Node
    is_full: bool
    steps: tuple[fx.Node, ...]


def find_ring(
    buffer: fx.Node, writers: list[fx.Node], known: dict[str, bool | None]
) -> RolledBuffer | None:
    """Return what a call overwrites a buffer with, if those are the last of its tokens and of the call's.

    Args:
        buffer: What is overwritten.
        writers: The nodes that write into it.
        known: What evaluation has found of the same steps on tensors of the same shapes: layers are alike.
    """
    allocated = target_name(buffer) in ALLOCATIONS
    if len(writers) != 1 or not (allocated or is_cache_like(buffer)):
        return None
    (write,) = writers
    copied = copied_by(write, buffer)
    if copied is None:
        return None
    if allocated:
        return _filled(buffer, write, copied)
    if _is_read_late(buffer, write):
        return None
    whole = suffix_of(copied) or copied
    if buffer not in cache_inputs(whole):
        anew = not cache_inputs(whole) and whole is not copied
        return RolledBuffer(buffer, whole, whole, write, False, ()) if anew else None
    near = [node for node in made_of(whole, ENDS) if node is not whole]
    news = [node for node in near if node is not buffer and is_like(node, value_of(buffer))]
    for new in news[:TRIES]:
        found = _RingTrial(whole, buffer, new, write).ring(known)
        if found is not None:
            return found
    return None


def _filled(buffer: fx.Node, write: fx.Node, copied: fx.Node) -> RolledBuffer | None:
    """Return what a call fills a buffer with that it allocates and returns, if those are the last of its tokens."""
    whole = suffix_of(copied)
    users = {user for node in (buffer, write) for user in node.users} - {write}
    if whole is None or cache_inputs(whole) or {user.op for user in users} != {"output"}:
        return None
    return RolledBuffer(buffer, whole, whole, write, False, (copied,))


def copied_by(write: fx.Node, buffer: fx.Node) -> fx.Node | None:
    """Return the tensor ``[B, H, S, D]`` that a node overwrites a whole buffer with."""
    name = plain_name(write)
    if write.args[0] is not buffer:
        return None
    if name == "copy_":
        copied = argument(write, 1, "src")
    elif name == "setitem" and _takes_whole(write, buffer):
        copied = write.args[2]
    else:
        return None
    mine, theirs = value_of(buffer), value_of(copied)
    if not isinstance(copied, fx.Node) or not isinstance(theirs, Tensor) or theirs.dim() != 4:
        return None
    alike = (mine.dtype, mine.device) == (theirs.dtype, theirs.device)
    sizes = all(same(a, b) for a, b in zip(mine.shape, theirs.shape, strict=True))
    return copied if alike and sizes else None


def _takes_whole(write: fx.Node, buffer: fx.Node) -> bool:
    index: Any = write.args[1]
    index = index if isinstance(index, tuple) else (index,)
    if index == (Ellipsis,):
        return True
    shape = shape_of(buffer) or ()
    return all(is_full(part, size) for part, size in zip(index, shape, strict=False))


def _is_read_late(buffer: fx.Node, write: fx.Node) -> bool:
    """Return whether a view of a buffer that was taken before a write is read after it, or the buffer is returned."""
    place = order_of(buffer.graph)
    views = [
        node
        for node in buffer.graph.nodes
        if node is not buffer and node is not write and root_of(node) is buffer
    ]
    early = [view for view in views if place[view] < place[write]]
    late = any(place[user] > place[write] for view in early for user in view.users)
    return late or any(user.op == "output" for node in (buffer, *views) for user in node.users)


class _RingTrial(Trial):
    """The operations between a buffer, new tokens and what the buffer is overwritten with."""

    def __init__(self, whole: fx.Node, buffer: fx.Node, new: fx.Node, write: fx.Node) -> None:
        super().__init__(
            whole, [buffer, new, write], ENDS
        )  # what is read is what was there before the write
        self._past, self._new, self._write = buffer, new, write

    def ring(self, known: dict[str, bool | None]) -> RolledBuffer | None:
        """Return what is written if evaluation bears it out; ``known`` as `find_ring` has it."""
        if self.result is self._new or not self.collect():
            return None
        form = self._form()
        if form not in known:
            known[form] = self._is_full()
        is_full = known[form]
        if is_full is None:
            return None
        about = self._past, self._new, self.result, self._write
        return RolledBuffer(*about, is_full, tuple(self.steps))

    def _form(self) -> str:
        """Return all that evaluation depends on, nodes named by their place among the steps."""
        names = {node: f"cut {place}" for place, node in enumerate(self.cuts)}
        names |= {node: f"step {place}" for place, node in enumerate(self.steps)}

        def name(node: fx.Node) -> str:
            return f"<{names.get(node, '')} {_like(node)}>"

        steps = [
            (name(node), node.op, str(node.target), fx.node.map_arg((node.args, node.kwargs), name))
            for node in self.steps
        ]
        return repr((name(self.result), [name(cut) for cut in self.cuts], steps))

    def _is_full(self) -> bool | None:
        """Return whether the new tokens are joined to a full buffer, ``None`` if they are not joined to any."""
        kinds = {True, False}
        borne_out = False
        for sizes in self.assignments(_TRIALS):
            try:
                found = self._kinds(sizes)
            except CANNOT_BE_RUN:
                if sizes:
                    continue  # these sizes leave no room
                return None
            if found is None:
                continue
            kinds &= found
            borne_out = True
        return kinds.pop() if borne_out and len(kinds) == 1 else None

    def _kinds(self, sizes: Any) -> set[bool] | None:
        """Return whether the result joins the new tokens to a full buffer, or to one that is not; or may be either.

        ``None`` for sizes that no call has.
        """
        past, new = (random_like(value_of(node), sizes) for node in (self._past, self._new))
        given = {self._past: past.clone(), self._new: new.clone()}
        result = self.run(sizes, given)
        length = size_of_trial((shape_of(self.result) or ())[2], sizes)
        if result.shape[2] != length:
            return None
        if result.dtype != past.dtype:
            return set()
        slots, held = past.shape[2], length - new.shape[2]
        found = set()
        joined = torch.cat([past, new], 2)
        if slots + new.shape[2] >= length and torch.equal(result, joined[:, :, -length:]):
            found.add(True)
        joined = torch.cat([past[:, :, : max(held, 0)], new], 2)
        if 0 < held < slots and torch.equal(result, joined):
            found.add(False)
        return found


def _like(node: fx.Node) -> str:
    """Return the shape and dtype of a tensor, or a number."""
    value = value_of(node)
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else str(value)


def base_of(new: fx.Node) -> fx.Node:
    """Return the node by which an attention that reads nothing but new tokens knows them."""
    base: fx.Node = moved_from(new)
    return base
