"""Check the cache positions that a call writes before anything is written.

A quantized cache of fixed size takes tokens one behind another, and forgets what lies behind a write. A model may
write otherwise: with gaps, from right to left, in a ring, over tokens that it goes on to read. What the graph alone
does not tell is read on the host, once a call. Where a write does not fit, the buffers become ordinary tensors
again and the call runs as it was captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import HIDES
from kvq_compile.lowering.rings import OTHER_LENGTH, RingWrite
from kvq_compile.lowering.sizes import Size

GAPS = "the cache positions written are not consecutive"
SEVERAL = "one token is written to several cache positions"
AHEAD = "tokens are written behind empty cache positions"
OVERWRITES = "cache positions are overwritten that attention goes on to read behind the new tokens"
FROM_THE_END = "the cache is written at positions counted from its end"
BEHIND = "tokens are written at positions behind the end of the cache"
WRAPPED = "cache positions are written of a buffer that keeps the last tokens"
NOT_FIRST = "the first tokens of a new cache are not written at its first cache positions"


@dataclass(frozen=True)
class Write:
    """One write into a cache of fixed size, as far as it is not understood from the graph alone.

    Attributes:
        name: How the model names the cache.
        argument: Its place among the arguments; ``None`` for one that the call allocates.
        position: Which result of `SlotCheck.positions` holds the cache positions; ``None`` where the first is a number.
        first: The first cache position, where it is a number.
        tokens: How many tokens are written, where the first cache position is a number, or where the graph does not
            show that there is a cache position for each.
        hides: What hides the cache positions behind the new tokens: a part of the graph that computes the mask of the
            attention, ``True`` where nothing behind them is read, ``None`` where that is not known.
        inverted: Whether the mask marks what is hidden.
        is_update: Whether the call leaves the cache as it was and returns an updated one.
        is_evaluated: Whether it stands for other operations, which evaluation has shown to be that within the cache.
        slides: Whether the cache is rolled once it is full: positions behind its end stand for that.
    """

    name: str
    argument: int | None
    position: int | None = None
    first: Size | None = None
    tokens: Size | None = None
    hides: fx.GraphModule | bool | None = None
    inverted: bool = False
    is_update: bool = False
    is_evaluated: bool = False
    slides: bool = False


@dataclass(frozen=True)
class Look:
    """What a call is about to write.

    Attributes:
        reason: Why the caches cannot take it; ``None`` if they can.
        updated: Tokens held by each cache of which an updated one is returned, and the first position written, by the
            place of its argument.
    """

    reason: str | None = None
    updated: Mapping[int, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class SlotCheck:
    """The writes of a graph into caches of fixed size.

    Attributes:
        positions: The part of the graph that computes cache positions which are tensors, if any are.
        writes: The writes, in order.
        rings: Those into quantized buffers that keep the last tokens.
    """

    positions: fx.GraphModule | None
    writes: tuple[Write, ...]
    rings: tuple[RingWrite, ...] = ()

    @property
    def written(self) -> set[int]:
        """Places of the arguments that are written."""
        places = {write.argument for write in self.writes if write.argument is not None}
        return places | {write.argument for write in self.rings}

    def is_behind(self, args: Sequence[Any]) -> bool:
        """Return whether a call writes behind the end of a cache, where operations do what nobody has evaluated."""
        evaluated = any(write.is_evaluated for write in self.writes)
        return evaluated and self.look(args).reason == BEHIND

    @cached_property
    def read(self) -> tuple[int, ...]:
        """Places of the arguments that cache positions are computed from."""
        if self.positions is None:
            return ()
        nodes = enumerate(self.positions.graph.find_nodes(op="placeholder"))
        return tuple(place for place, node in nodes if node.users)

    def _positions(self, args: Sequence[Any]) -> list[list[int]]:
        """Return the cache positions of each write, from arguments in host memory."""
        if self.positions is None:
            return []
        return [x.reshape(-1).tolist() for x in self.positions(*args)]

    def look(self, args: Sequence[Any]) -> Look:
        """Look at the writes of a call before it runs."""
        reason = next(filter(None, (write.reason(args) for write in self.rings)), None)
        if reason is not None:
            return Look(reason)
        places = {write.argument for write in self.writes if write.argument is not None}
        caches = {place: args[place] for place in sorted(places)}
        cursors = {place: x.cursor[:1] for place, x in caches.items() if isinstance(x, QuantizedKV)}
        read = {place: args[place] for place in self.read if isinstance(args[place], Tensor)}
        copies = on_host([*read.values(), *cursors.values()])
        given = dict(zip(read, copies, strict=False))
        numbers = self._positions([given.get(place, x) for place, x in enumerate(args)])
        held: dict[int | None, int] = {
            place: int(found) for place, found in zip(cursors, copies[len(read) :], strict=True)
        }
        sizes: dict[int | None, int] = {place: int(x.shape[2]) for place, x in caches.items()}
        updated: dict[int, tuple[int, int]] = {}
        for write in self.writes:
            if write.first is not None and write.tokens is not None:
                first, tokens = write.first(args), write.tokens(args)
            else:
                assert write.position is not None
                found = numbers[write.position]
                first, tokens = (found or [0])[0], len(found)
                if found != list(range(first, first + tokens)):
                    return Look(GAPS)
                if write.tokens is not None and write.tokens(args) != tokens:
                    return Look(SEVERAL)
            if first < 0:
                return Look(FROM_THE_END)
            if write.argument is None and first != 0:
                return Look(NOT_FIRST)
            if write.slides:
                assert write.argument is not None
                slots = sizes[write.argument]
                first = min(first, slots)
                if write.argument in held and first != min(held[write.argument], slots):
                    return Look(OTHER_LENGTH)
                end = min(first + tokens, slots)
                if end < slots and _shows(write, args, end) is not False:
                    return Look(OVERWRITES)
                held[write.argument] = end
                continue
            if write.is_evaluated and first + tokens > sizes.get(write.argument, first + tokens):
                return Look(BEHIND)
            if write.argument in held:
                if write.is_update and write.argument is not None:
                    updated[write.argument] = held[write.argument], first
                if first > held[write.argument]:
                    return Look(AHEAD)
                if first > 0 and held[write.argument] > sizes[write.argument]:
                    return Look(WRAPPED)
                if (
                    first < held[write.argument]
                    and _shows(write, args, first + tokens) is not False
                ):
                    return Look(OVERWRITES)
                held[write.argument] = first + tokens
            elif write.argument is not None and _shows(write, args, first + tokens):
                return Look(OVERWRITES)
        return Look(None, updated)


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors in host memory, waiting for a device once for each dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, x in enumerate(tensors):
        if x.device.type != "cpu":
            alike.setdefault((x.device, x.dtype), []).append(place)
    copies = list(tensors)
    for places in alike.values():
        flat = torch.cat([tensors[place].reshape(-1) for place in places]).cpu()
        parts = flat.split([tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            copies[place] = part.view(tensors[place].shape)
    return copies


def _shows(write: Write, args: Sequence[Any], end: int) -> bool | None:
    """Return whether the attention that follows a write sees positions from ``end`` on; ``None`` where unknown."""
    if write.hides is None or isinstance(write.hides, bool):
        return None if write.hides is None else not write.hides
    (mask,) = write.hides(*args)
    behind = mask[..., end:]
    if behind.dtype != torch.bool:
        return not bool((behind <= HIDES).all())
    return not bool(behind.all()) if write.inverted else bool(behind.any())
