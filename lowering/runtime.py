"""What happens around the compiled call: caches are unwrapped on the way in and wrapped on the way out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.become import (
    become,
    check_can_become_quantized,
    keep_plain,
    stays_plain,
    thaw,
    thaw_arranged,
)
from kvq_compile.kernels.cache.rows import count_by_row_
from kvq_compile.kernels.cache.tensor import Kind, QuantizedKV
from kvq_compile.kernels.cache.together import extended, have_room
from kvq_compile.kernels.cache.views import alone
from kvq_compile.lowering.arranged import Arranged
from kvq_compile.lowering.lengths import Lengths
from kvq_compile.lowering.outputs import Call, Extended, Gathered, Output, Plain
from kvq_compile.lowering.sites import Quantization, SiteReport, StateReport
from kvq_compile.lowering.sizes import Size
from kvq_compile.lowering.slots import Look, SlotCheck
from kvq_compile.lowering.some_rows import SomeRows

NOT_EMPTY = "the buffer holds something behind its tokens, which its attention may read"

Compiled = Callable[..., Any]
Run = Callable[[Sequence[Any]], Sequence[Any]]  # of the captured graph's arguments
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Conversion:
    """A 16-bit buffer to quantize in place once the call has run.

    Attributes:
        argument: Its place among the arguments.
        position: Number of the output that holds the cache positions just written, or ``None``.
        end: Tokens held after the call, where that is known from the arguments.
        quantization: What to convert to.
        query: Number of the output that holds the queries of the call, where bits depend on them.
        output: Number of the output that holds the tokens, where the call leaves the argument as it was.
        is_read_whole: Whether what reads the buffer may see cache positions behind its tokens.
        kind: What the buffer becomes.
    """

    argument: int
    position: int | None
    end: Size | None
    quantization: Quantization
    query: int | None = None
    output: int | None = None
    is_read_whole: bool = False
    kind: Kind = "static"

    def held(self, args: Sequence[Any], outputs: Sequence[Any]) -> int | list[int]:
        """Return how many tokens the buffer holds after a call, of each row where they differ."""
        if self.end is not None:
            return self.end(args)
        assert self.position is not None
        if outputs[self.position].dim() == 2:
            ends: list[int] = (outputs[self.position].amax(1) + 1).tolist()
            return ends
        end = int(outputs[self.position].max()) + 1
        return min(end, args[self.argument].shape[2]) if self.kind == "ring" else end


@dataclass(frozen=True)
class Lowered:
    """A graph to hand to the inner compiler, and how to call what it makes of it.

    Attributes:
        module: The graph. Where it was rewritten no tensor subclass goes in or comes out; else it is the captured one.
        outputs: How each value that the captured graph returned is made from what ``module`` returns; behind
            them, the cache positions that ``conversions`` ask for. Empty where nothing was rewritten.
        returned: How many values the captured graph returned.
        conversions: 16-bit buffers to convert after a call.
        pairs: Places of grown keys and of the values that belong to them.
        unwrapped: Places of the quantized caches; ``True`` where the length is an input of its own.
        tables: Tables of the caches that the graph makes, arguments of ``module`` behind all others.
        compiles: Whether the inner compiler may have ``module``; not where it takes quantized caches as they are.
        reports: What became of each attention.
        captured: The captured graph, to be run on ordinary tensors where a cache cannot take a write.
        check: The writes to look at before a call.
        thaw: Why every call has to run as captured, if it has.
        thaws: Places of the quantized caches that become ordinary tensors for that. The others run as captured,
            too, if they can take what is written.
        states: What became of each cache.
        updated: Numbers of the outputs that are updated caches, by the places of the caches that they are made of.
        lengths: What stands for the lengths of growing caches, where the graph takes bounds of them.
        unrecorded: Why a step of this graph is not to be recorded, if it is a step.
        changes_memory: Whether its caches get other memory when it runs, so that it is run once and not compiled.
        by_row: Places of the quantized caches that count each row from this call on.
        arranged: How the captured graph's caches are laid out, where that is not as ``[B, H, S, D]``: all else here is
            about a graph whose are.
        rows: Which rows of the captured graph's caches it takes, where these are made for more sequences: all else
            here, ``arranged`` included, is about a graph that takes these rows alone.
    """

    module: fx.GraphModule
    reports: list[SiteReport]
    outputs: list[Output]
    returned: int
    conversions: list[Conversion]
    pairs: list[tuple[int, int]]
    unwrapped: dict[int, bool]
    tables: list[Tensor]
    compiles: bool = True
    captured: fx.GraphModule | None = None
    check: SlotCheck | None = None
    thaw: str | None = None
    thaws: frozenset[int] = frozenset()
    states: tuple[StateReport, ...] = ()
    updated: Mapping[int, int] = field(default_factory=dict)
    lengths: Lengths | None = None
    unrecorded: str | None = None
    changes_memory: bool = False
    by_row: tuple[int, ...] = ()
    arranged: Arranged | None = None
    rows: SomeRows | None = None

    @classmethod
    def as_captured(
        cls, gm: fx.GraphModule, reports: list[SiteReport], inputs: Sequence[Any]
    ) -> Lowered:
        """Return a captured graph as it is: for the inner compiler, unless quantized caches are among its inputs."""
        compiles = not any(isinstance(x, (QuantizedKV, ArrangedKV)) for x in inputs)
        return cls(gm, reports, [], 0, [], [], {}, [], compiles)

    @classmethod
    def thawed(
        cls,
        gm: fx.GraphModule,
        reports: list[SiteReport],
        reason: str,
        thaws: frozenset[int],
        check: SlotCheck | None,
    ) -> Lowered:
        """Return a captured graph that makes ordinary tensors of some of its quantized caches before it runs."""
        none = cls(gm, reports, [], 0, [], [], {}, [], captured=gm)
        return replace(none, thaw=reason, thaws=thaws, check=check)

    @property
    def rewritten(self) -> bool:
        """Whether ``module`` takes and returns something else than the captured graph."""
        return bool(self.unwrapped) or not all(isinstance(plan, Plain) for plan in self.outputs)

    @property
    def quantizes(self) -> bool:
        """Whether a call reads or makes packed caches by operators of their own."""
        return self.rewritten or bool(self.conversions)

    def serves(self, place: int) -> bool:
        """Return whether an argument is packed, is so after the call, or becomes an ordinary tensor for it."""
        kept = {conversion.argument for conversion in self.converted(place)}
        taken = self._taken_as(place)
        return self.thaw is not None or all(at in self.unwrapped or at in kept for at in taken)

    def converted(self, place: int) -> list[Conversion]:
        """Return how an argument becomes quantized in place after the call, cache by cache."""
        taken = self._taken_as(place)
        return [x for x in self.conversions if x.output is None and x.argument in taken]

    def updates(self, place: int) -> bool:
        """Return whether the call leaves an argument as it was, and returns an updated cache made of it."""
        return not self.updated.keys().isdisjoint(self._taken_as(place))

    def _taken_as(self, place: int) -> Sequence[int]:
        return (place,) if self.arranged is None else self.arranged.caches_of(place)

    def around(self, inner: Compiled, tell: Tell, run: Run | None = None) -> Compiled:
        """Return a callable like the captured graph from one like ``module``.

        Args:
            inner: Compiled from ``module``.
            tell: Called with the reason why caches become ordinary tensors again, before anything is written.
            run: Runs ``inner``, where that is not to be called as it is.
        """
        run = run or self.running(inner)
        if self.thaw is None and self.check is None:
            return (lambda *args: self.call(run, args)) if self.rewritten else inner

        def call(*args: Any) -> list[Any]:
            look = self.look(args)
            if look.reason is None:
                outputs = self.call(run, _passed_on(args, look.updated))
                if self.check is not None:
                    self.check.note(args, look)
                return outputs
            tell(look.reason)
            return self._as_captured(args, look.reason)

        return call

    def look(self, args: Sequence[Any]) -> Look:
        """Look at what a call writes into quantized caches of fixed size, before it runs."""
        return (
            Look(self.thaw)
            if self.thaw is not None or self.check is None
            else self.check.look(args)
        )

    def _as_captured(self, args: Sequence[Any], reason: str) -> list[Any]:
        """Run the captured graph on ordinary tensors, and leave them so."""
        self.keep_plain(args, reason)
        assert self.captured is not None
        outputs = list(self.captured(*args))
        self._keep_updated_plain(outputs, reason)
        return outputs

    def _keep_updated_plain(self, outputs: Sequence[Any], reason: str) -> None:
        for place in self.updated.values():
            keep_plain(outputs[place], reason)

    def _told(self, args: Sequence[Any]) -> str | None:
        """Return why a buffer of the call is not to be quantized, where an earlier call has found out."""
        places = (conversion.argument for conversion in self.conversions)
        return next(filter(None, (stays_plain(args[place]) for place in places)), None)

    def keep_plain(self, args: Sequence[Any], reason: str) -> None:
        """Make ordinary tensors of the quantized caches that the call writes in place, and leave them so."""
        if self.thaw is not None and (self.check is None or self.check.look(args).reason is None):
            places = set(self.thaws)
        elif self.thaw is not None or self.check is None:
            places = {place for place, x in enumerate(args) if isinstance(x, QuantizedKV)}
        else:
            places = self.check.written
        for place in places:
            if isinstance(args[place], QuantizedKV):
                thaw(args[place], reason)
            elif isinstance(args[place], ArrangedKV):
                thaw_arranged(args[place], reason)
            else:
                keep_plain(args[place], reason)

    def running(self, inner: Compiled) -> Run:
        """Return a callable that takes the arguments of the captured graph to ``inner``, compiled from ``module``."""
        return lambda args: inner(*self.flatten(args))

    def call(self, run: Run, args: Sequence[Any]) -> list[Any]:
        """Call ``run`` with the arguments of the captured graph, and make what that returns of its results."""
        with alone([args[place] for place in self._appended], together=True):
            return self._call(run, args)

    @cached_property
    def _appended(self) -> list[int]:
        """Places of the dynamic caches that take tokens."""
        return list(dict.fromkeys(argument for argument, _ in self._room))

    def _call(self, run: Run, args: Sequence[Any]) -> list[Any]:
        about = Call(args)
        self._claim(about)
        rings = () if self.check is None else self.check.rings
        for write in rings:
            write.claim(args)
        for place in self._uncounted:
            lineage = args[place]._lineage
            lineage.counted = lineage.counter = None
        for place in self.by_row:
            count_by_row_(args[place])
        results = run(args)
        for write in rings:
            write.note(args)
        outputs = self._extended(about)
        for place, plan in self._others:
            built = outputs[place] = about.built(plan, results)
            if isinstance(built, QuantizedKV) and not isinstance(built.cursor, FakeTensor):
                built._lineage.compiled = int(built.end)
        return outputs

    def _extended(self, call: Call) -> list[Any]:
        """Return the outputs, of which those are filled in that are longer views of caches of the call."""
        outputs: list[Any] = [None] * len(self.outputs)
        for tokens, (places, arguments) in self._longer.items():
            views = [call.args[argument] for argument in arguments]
            for place, view in zip(places, extended(views, call.size(tokens)), strict=True):
                outputs[place] = view
        return outputs

    @cached_property
    def _longer(self) -> dict[Size, tuple[list[int], list[int]]]:
        """Outputs that are longer views of whole caches, and the places of those, by how many tokens they take."""
        found: dict[Size, tuple[list[int], list[int]]] = {}
        for place, plan in enumerate(self.outputs):
            if isinstance(plan, Extended) and plan.kept is None:
                places, arguments = found.setdefault(plan.tokens, ([], []))
                places.append(place)
                arguments.append(plan.argument)
        return found

    @cached_property
    def _others(self) -> list[tuple[int, Output]]:
        longer = {place for places, _ in self._longer.values() for place in places}
        return [(place, plan) for place, plan in enumerate(self.outputs) if place not in longer]

    @cached_property
    def _uncounted(self) -> list[int]:
        """Places of the caches of which the host does not know how many tokens they hold after a call."""
        rings = () if self.check is None else self.check.rings
        known = {write.argument for write in rings} | set(self._appended)  # these count views
        return sorted(self.unwrapped.keys() - known)

    @cached_property
    def _room(self) -> list[tuple[int, Size]]:
        """Places of the dynamic caches that take tokens, and how many; several times where there are several views."""
        plans = (plan for plan in self.outputs if isinstance(plan, (Extended, Gathered)))
        return sorted({(plan.argument, plan.tokens) for plan in plans}, key=itemgetter(0))

    @cached_property
    def _grown(self) -> tuple[set[Size], set[int]]:
        """How many tokens dynamic caches take, and the places of those that do or belong to one that does."""
        return {size for _, size in self._room}, {*self._appended, *chain(*self.pairs)}

    def _claim(self, call: Call) -> None:
        """Make room for the call's tokens in the dynamic caches.

        Raises:
            ValueError: The keys and the values of a layer hold different numbers of tokens.
        """
        args = call.args
        sizes, grown = self._grown
        if len(sizes) == 1 and have_room([args[place] for place in grown], call.size(*sizes)):
            return  # as at nearly every step
        for key, value in self.pairs:
            if args[key].shape[2] != args[value].shape[2]:
                lengths = f"{int(args[key].shape[2])} keys and {int(args[value].shape[2])} values"
                raise ValueError(
                    f"keys and values of a cache must hold equally many tokens, got {lengths}"
                )
        for argument, tokens in self._room:
            args[argument].claim(call.size(tokens))
        for key, value in self.pairs:
            keys, values = args[key], args[value]
            if keys.trim is not values.trim and keys.first != values.first:
                hidden = f"{int(keys.first)} keys and {int(values.first)} values"
                raise ValueError(
                    f"keys and values of a cache must hide equally many tokens, got {hidden}"
                )

    def flatten(self, args: Sequence[Any]) -> list[Any]:
        """Return the arguments of ``module`` for the arguments of the captured graph."""
        flat: list[Any] = []
        for index, arg in enumerate(args):
            if index in self.unwrapped:
                flat.extend(arg.parts)
                flat.extend(arg.calibrated)
                if arg.trim is not None:
                    flat.append(arg.trim)
                if self.unwrapped[index]:
                    flat.append(arg.shape[2])
            else:
                flat.append(arg)
        held = [] if self.lengths is None else self.lengths.held(args)
        return flat + self.tables + held

    def run_once_then_convert(
        self,
        compile_inner: Callable[[Sequence[Any]], Compiled],
        tell: Tell,
    ) -> Compiled:
        """Return a callable that runs the graph as it is and quantizes its 16-bit buffers afterwards.

        Each buffer meets this graph once, and then is no longer what it was compiled for, so compiling it
        would cost more than it brings. Where a buffer cannot be converted none is, and the graph is compiled
        after all.

        Args:
            compile_inner: Compiles ``module`` for arguments of the captured graph.
            tell: Called with the reason why a buffer stays as it is.
        """
        compiled: list[tuple[Compiled, str]] = []

        def call(*args: Any) -> list[Any]:
            told = self._told(args)
            look = Look() if compiled else Look(told) if told else self.look(args)
            if look.reason is not None:
                if told is None:
                    tell(look.reason)
                if self.unwrapped:
                    return self._as_captured(args, look.reason)
                self.keep_plain(args, look.reason)
                compiled.append((compile_inner(args), look.reason))
            if compiled and self.check is not None and self.check.is_behind(args):
                return self._as_captured(args, compiled[0][1])
            args = tuple(_passed_on(args, look.updated))
            inner = compiled[0][0] if compiled else self.module.forward
            outputs = self.call(self.running(inner), args)
            if compiled:
                self._keep_updated_plain(outputs, compiled[0][1])
                return outputs[: self.returned]
            try:
                convert(self.conversions, args, outputs)
            except RuntimeError as error:
                tell(str(error))
                compiled.append((compile_inner(args), str(error)))
            return outputs[: self.returned]

        return call


def convert(conversions: Sequence[Conversion], args: Sequence[Any], outputs: list[Any]) -> None:
    """Quantize the buffers that a call has written, or none of them.

    Args:
        conversions: Which arguments to quantize, and how.
        args: The arguments of the call.
        outputs: What it returned, the cache positions that the conversions ask for included.

    Raises:
        RuntimeError: One of them cannot be converted in place, or would lose what is read. Nothing has changed then.
    """
    for conversion in conversions:
        updated = conversion.output
        if updated is None:
            check_can_become_quantized(args[conversion.argument])
        if conversion.is_read_whole:
            buffer = args[conversion.argument] if updated is None else outputs[updated]
            if not _is_empty_behind(buffer, conversion.held(args, outputs)):
                raise RuntimeError(NOT_EMPTY)
    for conversion in conversions:
        updated, held = conversion.output, conversion.held(args, outputs)
        buffer = args[conversion.argument] if updated is None else outputs[updated]
        with torch.no_grad():
            quantization = conversion.quantization
            tables = quantization.tables.on(buffer.device) if quantization.tables else None
            query = None if conversion.query is None else outputs[conversion.query]
            quantized = QuantizedKV.from_dense(
                buffer,
                quantization.layout,
                kind=conversion.kind,
                length=held,
                tables=tables,
                query=query,
            )
        if updated is None:
            become(buffer, quantized)
        else:
            outputs[:] = [quantized if output is buffer else output for output in outputs]


def _is_empty_behind(buffer: Tensor, held: int | list[int]) -> bool:
    if isinstance(held, int):
        return not buffer[:, :, held:].any()
    return not any(row[:, end:].any() for row, end in zip(buffer, held, strict=True))


def _passed_on(args: Sequence[Any], updated: Mapping[int, tuple[int, int]]) -> Sequence[Any]:
    """Return the arguments with a cache that may be written in place of each that the call leaves as it was."""
    if not updated:
        return args
    own = list(args)
    for place, (held, first) in updated.items():
        cache: QuantizedKV = args[place]
        own[place] = cache.pass_on(held) if first == held else cache.clone_packed()
    return own
