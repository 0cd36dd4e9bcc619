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
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.rings import OTHER_LENGTH, RingWrite
from kvq_compile.lowering.shown import (
    ENDS_SEEN,
    OVERWRITES,
    UNHELD,
    shows,
    shows_rows,
    why_row_seen,
    why_seen,
)
from kvq_compile.lowering.sizes import Size

GAPS = "the cache positions written are not consecutive"
SEVERAL = "one token is written to several cache positions"
AHEAD = "tokens are written behind empty cache positions, as those behind an earlier write are"
FROM_THE_END = "the cache is written at positions counted from its end"
BEHIND = "tokens are written at positions behind the end of the cache"
WRAPPED = "cache positions are written of a buffer that keeps the last tokens"
UPDATES_ROWS = "a cache whose rows have lengths of their own is updated in a copy"
NOT_FIRST = "the first tokens of a new cache are not written at its first cache positions"


Held = int | tuple[int, ...]  # of all rows, or of each

_known = attrgetter("_lineage.counted", "_lineage.shared")
_length = attrgetter("_length")


@dataclass(frozen=True)
class Counter:
    """A number that a model keeps on the device: where its next token goes.

    The host knows it without waiting for the device if it knew it before the last call, which added to it, and if
    nothing else has written it since: PyTorch counts the writes to a tensor.

    Attributes:
        argument: Its place among the arguments.
        added: What the call adds to it; ``None`` where the graph does not show that.
    """

    argument: int
    added: Size | None

    def known(self, cache: Any, args: Sequence[Any]) -> int | None:
        """Return its value, if the host knows it from the last call that wrote ``cache``."""
        number = args[self.argument]
        known = cache._lineage.counter if isinstance(cache, QuantizedKV) else None
        if known is None or known[0] is not number or known[1] != number._version:
            return None
        value: int = known[2]
        return value

    def after(self, args: Sequence[Any], value: int) -> tuple[Tensor, int, int] | None:
        """Return what the host knows of it after a call, before which its value was ``value``."""
        number = args[self.argument]
        unknown = self.added is None or number.is_inference()  # whose writes are not counted
        return None if unknown else (number, number._version, value + self.added(args))  # type: ignore[misc]


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
        counter: The number on the device that is the first cache position, where the graph shows that one is.
        end: Up to which cache position attention reads, where it has no mask and the graph does not show that tokens
            are written up to there.
        rows: How many rows are written at positions of their own, one row's behind another's; 0 where all are written
            at the same.
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
    counter: Counter | None = None
    end: Size | None = None
    rows: int = 0


@dataclass(frozen=True)
class Look:
    """What a call is about to write.

    Attributes:
        reason: Why the caches cannot take it; ``None`` if they can.
        updated: Tokens held by each cache of which an updated one is returned, and the first position written, by the
            place of its argument.
        held: Tokens that each quantized cache holds after the call, or each of its rows, by the place of its argument.
        counts: The values of counters before the call, by the places of their arguments.
        end: Tokens that all caches hold after a call of which all is seen at a glance; else ``None``.
    """

    reason: str | None = None
    updated: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    held: Mapping[int | None, Held] = field(default_factory=dict)
    counts: Mapping[int, int] = field(default_factory=dict)
    end: int | None = field(default=None, compare=False)


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
        at_a_glance = self._goes_on(args)
        if at_a_glance is not None:
            return at_a_glance
        reason = next(filter(None, (write.reason(args) for write in self.rings)), None)
        if reason is not None:
            return Look(reason)
        caches = {place: args[place] for place in self._written}
        held, counts, copies = self._numbers(args, caches)
        numbers = self._positions([copies.get(place, x) for place, x in enumerate(args)])
        call = _Call(args, held, {place: int(x.shape[2]) for place, x in caches.items()})
        for write in self.writes:
            if write.counter is not None and write.tokens is not None:
                first, tokens = counts[write.counter.argument], write.tokens(args)
            elif write.first is not None and write.tokens is not None:
                first, tokens = write.first(args), write.tokens(args)
            else:
                assert write.position is not None
                found = numbers[write.position]
                if write.rows:
                    size = len(found) // write.rows
                    rows = [found[at : at + size] for at in range(0, len(found), size)]
                    reason = _look_at_rows(write, call, rows)
                    if reason is not None:
                        return Look(reason)
                    continue
                first, tokens = (found or [0])[0], len(found)
                if found != list(range(first, first + tokens)):
                    return Look(GAPS)
                if write.tokens is not None and write.tokens(args) != tokens:
                    return Look(SEVERAL)
            if isinstance(held.get(write.argument), tuple):
                alike = [list(range(first, first + tokens))] * len(held[write.argument])
                reason = _look_at_rows(write, call, alike, first)
                if reason is not None:
                    return Look(reason)
                continue
            reason = _look_at_range(write, call, first, tokens)
            if reason is not None:
                return Look(reason)
        return Look(None, call.updated, held, counts)

    @cached_property
    def _counters(self) -> list[int]:
        """Places of the counters, one a write, where all writes are alike and nothing else is to be looked at."""
        if self.rings or self.positions is not None or len({x.tokens for x in self.writes}) != 1:
            return []
        plain = all(
            None not in (write.argument, write.counter, write.tokens)
            and not (write.slides or write.is_update or write.end)
            for write in self.writes
        )
        places = [write.counter.argument for write in self.writes if write.counter is not None]
        return places if plain and len(self._written) == len(self.writes) else []

    def _goes_on(self, args: Sequence[Any]) -> Look | None:
        """Return what a step writes that goes on where all caches end, as the last one left them.

        ``None`` where that is not seen at a glance.
        """
        if not self._counters:
            return None
        tokens: Size = self.writes[0].tokens  # type: ignore[assignment]
        caches = [args[write.argument] for write in self.writes]  # type: ignore[index]
        if set(map(type, caches)) != {QuantizedKV}:
            return None
        states = set(map(_known, caches))
        if len(states) != 1:
            return None
        (held, shared), counted = states.pop(), tokens(args)
        slots = min(map(_length, caches))
        if type(held) is not int or shared or not 0 <= held <= held + counted <= slots:
            return None
        for place, arguments in self._counted_by:
            number = args[place]
            version = number._version
            for argument in arguments:
                known = args[argument]._lineage.counter
                if known is None or known[0] is not number or known[2] != held:
                    return None
                if known[1] != version:
                    return None
        ends: dict[int | None, Held] = dict.fromkeys(self._written, held + counted)
        return Look(None, {}, ends, dict.fromkeys(self._counters, held), held + counted)

    @cached_property
    def _counted_by(self) -> list[tuple[int, list[int]]]:
        """Places of the counters, each with those of the caches that it counts for."""
        found: dict[int, list[int]] = {}
        for write, place in zip(self.writes, self._counters, strict=True):
            found.setdefault(place, []).append(write.argument)  # type: ignore[arg-type]
        return list(found.items())

    @cached_property
    def _count_alike(self) -> bool:
        """Whether the call adds to each counter what it writes into the caches that go by it."""
        return all(
            write.counter is not None and write.counter.added is write.tokens
            for write in self.writes
        )

    @cached_property
    def _written(self) -> list[int]:
        return sorted({write.argument for write in self.writes if write.argument is not None})

    def _numbers(
        self, args: Sequence[Any], caches: Mapping[int, Any]
    ) -> tuple[dict[int | None, Any], dict[int, int], dict[Any, Tensor]]:
        """Return how many tokens caches hold, the values of counters, and copies of arguments that are read.

        Waits for the device if the host does not know the numbers from the last call.
        """
        counts: dict[int, int | None] = {}
        for write in self.writes:
            if write.counter is not None and counts.get(write.counter.argument) is None:
                known = write.counter.known(caches.get(write.argument or 0), args)
                counts[write.counter.argument] = known
        quantized = {place: x for place, x in caches.items() if isinstance(x, QuantizedKV)}
        held: dict[int, Held | None] = {
            place: None if x._lineage.shared else x._lineage.counted
            for place, x in quantized.items()
        }
        places = [*self.read, *[place for place, known in counts.items() if known is None]]
        unknown: dict[Any, Tensor] = {
            place: args[place] for place in places if isinstance(args[place], Tensor)
        }
        for place, length in held.items():
            if length is None:
                cursor = quantized[place].cursor
                unknown["held", place] = cursor[:, 0] if cursor.dim() == 2 else cursor[0]
        copies = dict(zip(unknown, on_host(list(unknown.values())), strict=True))
        return (
            {
                at: _held(copies["held", at]) if known is None else known
                for at, known in held.items()
            },
            {at: int(copies[at]) if known is None else known for at, known in counts.items()},
            copies,
        )

    def note(self, args: Sequence[Any], look: Look) -> None:
        """Note what the host knows of caches after a call that it has looked at."""
        if look.end is not None and self._count_alike:
            return self._note_end(args, look.end)
        counters: dict[int, tuple[Tensor, int, int] | None] = {}  # by place
        for write in self.writes:
            place, counter = write.argument, write.counter
            if place is None or place in look.updated or write.slides:
                continue
            cache = args[place]
            if isinstance(cache, QuantizedKV) and not cache._lineage.shared:
                lineage = cache._lineage
                lineage.counted = look.held[place]
                if counter is not None:
                    number = counter.argument
                    if number not in counters:
                        counters[number] = counter.after(args, look.counts[number])
                    lineage.counter = counters[number]
        return None

    def _note_end(self, args: Sequence[Any], end: int) -> None:
        """Note that all caches and all counters have come to one number: `note`, after what was seen at a glance."""
        for place, arguments in self._counted_by:
            number = args[place]
            known = None if number.is_inference() else (number, number._version, end)
            for argument in arguments:
                cache = args[argument]
                if isinstance(cache, QuantizedKV) and not cache._lineage.shared:
                    lineage = cache._lineage
                    lineage.counted, lineage.counter = end, known


def _held(length: Tensor) -> Held:
    return tuple(length.tolist()) if length.dim() else int(length)


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


@dataclass
class _Call:
    """A call whose writes are looked at one after the other.

    Attributes:
        args: Its arguments.
        held: Tokens that each quantized cache holds after the writes so far, or each of its rows, by the place of its
            argument.
        sizes: Cache positions of each cache.
        updated: As `Look.updated`.
        shown: What masks are known to show, which layers share.
    """

    args: Sequence[Any]
    held: dict[int | None, Any]
    sizes: Mapping[int | None, int]
    updated: dict[int, tuple[int, int]] = field(default_factory=dict)
    shown: dict[Any, bool] = field(default_factory=dict)


def _look_at_range(write: Write, call: _Call, first: int, tokens: int) -> str | None:
    """Return why a cache cannot take a write at ``first``, the same in all rows; else note what it holds then."""
    args, held, sizes = call.args, call.held, call.sizes
    place, end = write.argument, first + tokens
    if first < 0:
        return FROM_THE_END
    if place is None and first != 0:
        return NOT_FIRST
    if write.end is not None and write.end(args) != end:
        return UNHELD
    if write.slides:
        return _look_at_slide(write, call, first, tokens)
    if write.is_evaluated and end > sizes.get(place, end):
        return BEHIND
    if place not in held:
        seen = place is not None and shows(write, args, end)
        return why_seen(write, args, end, 0) if seen else None
    if write.is_update and place is not None:
        call.updated[place] = held[place], first
    if first > held[place]:
        return AHEAD
    if first > 0 and held[place] > sizes[place]:
        return WRAPPED
    if first < held[place] and shows(write, args, end) is not False:
        return why_seen(write, args, end, held[place])
    held[place] = end
    return None


def _look_at_slide(write: Write, call: _Call, first: int, tokens: int) -> str | None:
    """Do the same for a cache that is rolled once it is full: a position behind its end stands for that."""
    place, held = write.argument, call.held
    slots = call.sizes[place]
    first = min(first, slots)
    if place in held and first != min(held[place], slots):
        return OTHER_LENGTH
    end = min(first + tokens, slots)
    if end < slots and shows(write, call.args, end) is not False:
        return why_seen(write, call.args, end, 0)
    held[place] = end
    return None


def _look_at_rows(
    write: Write, call: _Call, rows: Sequence[Sequence[int]], first: int | None = None
) -> str | None:
    """Return why a cache cannot take a write at ``rows``, the positions of each; else note what it holds then.

    ``first`` is where all rows are written at the same, which nothing else may tell: of no tokens.
    """
    args, held, sizes = call.args, call.held, call.sizes
    starts = [row[0] if row else first or 0 for row in rows]
    ends = [start + len(row) for start, row in zip(starts, rows, strict=True)]
    if any(
        list(row) != list(range(at, end)) for row, at, end in zip(rows, starts, ends, strict=True)
    ):
        return GAPS
    if min(starts) < 0:
        return FROM_THE_END
    if write.tokens is not None and write.rows and write.tokens(args) != len(rows[0]):
        return SEVERAL
    if write.is_update:
        return UPDATES_ROWS
    if max(ends) > sizes.get(write.argument, max(ends)):
        return BEHIND
    if write.end is not None and {*ends} != {write.end(args)}:
        return UNHELD
    before = held.get(write.argument)
    seen = _shows_rows(write, call, tuple(ends))
    if before is None:
        return why_row_seen(write, args, max(ends), ENDS_SEEN) if seen else None
    lengths = [before] * len(rows) if isinstance(before, int) else before
    if any(start > length for start, length in zip(starts, lengths, strict=True)):
        return AHEAD
    goes_on = starts == list(lengths)
    if seen or (seen is None and not goes_on):
        why = ENDS_SEEN if goes_on else OVERWRITES
        return why_row_seen(write, args, max(*ends, *lengths), why)
    held[write.argument] = tuple(ends)
    return None


def _shows_rows(write: Write, call: _Call, ends: tuple[int, ...]) -> bool | None:
    """Return whether attention sees cache positions of a row behind its end; ``None`` where that is not known."""
    if write.hides is None or isinstance(write.hides, bool):
        return None if write.hides is None else not write.hides
    about = write.hides, write.inverted, ends
    if about not in call.shown:  # layers share a mask
        call.shown[about] = shows_rows(write, call.args, ends)
    return call.shown[about]
