"""Decode attention, one token a sequence: its time over a packed cache and over a 16-bit one, and its error.

Caches are written as a prompt is and read by the operators that compiled models call. The error of a row is that of
the output against attention in fp64 to the tokens that the cache stands for, so it is the kernel's, not that of the
codes; beside it stands the error of 16-bit attention to the same tokens.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile.bench.caches import ROLES, Cache, Shape, boundary, filled, random_spec, tokens
from kvq_compile.bench.clock import layers_in_turn, microseconds
from kvq_compile.bench.peers import BASELINE, PEERS, peer
from kvq_compile.bench.rows import PLACE, add_rows, key_of, read_rows, reason, short_cell
from kvq_compile.kernels import ops, reference
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.score import Score

METHODS = (
    *("int8", "int4", "int3", "int2", "kivi:bits=2"),
    *("tc:bits=4", "tc:bits=3", "tc:bits=2.5", "tc:bits=2"),
    *("skvq:bits=2", "skvq:bits=2,value_bits=1.5,packing=trits"),
    *("qaq:bits=2.3", "cq-4c8b", "cq-8c8b"),
)


@dataclass(frozen=True)
class Case:
    """One method or peer at one shape."""

    method: str
    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    writes: bool = False  # whether writing is timed, too

    @property
    def is_peer(self) -> bool:
        """Whether it is attention to a 16-bit cache."""
        return self.method in PEERS


@dataclass(frozen=True)
class Row:
    """What was measured of a case; ``None`` where it was not.

    Attributes:
        us: Time of attention [µs].
        baseline_us: That of `BASELINE` in the same run.
        bits: Bits an element of packed tokens, parameters included.
        gbps: Bytes of keys and values that are read each second [GB/s].
        error, plain_error: Of the output, relative, and of 16-bit attention to the same tokens.
        append_us: Time of writing a token's keys and values [µs].
        flush_us: That in the one step of ``page_size`` that fills a page in every sequence [µs].
        refused: Why nothing was measured.
    """

    method: str
    batch: int
    context: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: str
    us: float | None = None
    baseline_us: float | None = None
    bits: float | None = None
    gbps: float | None = None
    error: float | None = None
    plain_error: float | None = None
    append_us: float | None = None
    flush_us: float | None = None
    refused: str = ""

    @classmethod
    def of(cls, line: Mapping[str, str]) -> Row:
        """Return the row that a line of a file holds."""
        texts, counts = ("method", "dtype", "refused"), CASE[1:-1]
        values: dict[str, Any] = {name: line.get(name) or "" for name in texts}
        values |= {name: int(line[name]) for name in counts}
        for name in (field.name for field in fields(cls) if field.name not in values):
            values[name] = float(line[name]) if line.get(name) else None
        return cls(**values)

    @property
    def speedup(self) -> float | None:
        """How many times faster than the baseline."""
        return None if self.us is None or self.baseline_us is None else self.baseline_us / self.us

    @property
    def is_wrong(self) -> bool:
        """Whether the error is more than a small multiple of that of 16-bit attention."""
        if self.error is None or self.plain_error is None:
            return False
        return not self.error <= 3 * self.plain_error + 2e-3


CASE = ("method", "batch", "context", "heads", "kv_heads", "head_size", "dtype")


def cases(
    methods: Sequence[str],
    peers: Sequence[str],
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    writes: bool = False,
) -> list[Case]:
    """Return the cases of every shape: the baseline first, then peers, then methods, each once."""
    names = dict.fromkeys((BASELINE, *peers, *methods))
    return [Case(name, shape, dtype, writes) for shape in shapes for name in names]


def measure(
    wanted: Sequence[Case], device: torch.device, known: Callable[[Case], Row | None] = lambda case: None
) -> Iterator[Row]:  # fmt: skip
    """Measure cases in order, the baseline of a shape before the others of it; yield a row for each.

    Args:
        wanted: What `cases` returns.
        device: Where to.
        known: Returns the row of a case that is not to be measured again.
    """
    baseline: float | None = None
    for case in wanted:
        row = known(case) or _row(case, device)
        if case.method == BASELINE:
            baseline = row.us
        yield row if row.baseline_us is not None else replace(row, baseline_us=baseline)


def key(measured: Case | Row | Mapping[str, str]) -> tuple[str, ...]:
    """Return what tells a case, its row, or its line in a file, from others of the same place."""
    flat: Mapping[str, object]
    if isinstance(measured, Case):
        flat = {**asdict(measured.shape), "method": measured.method, "dtype": _name(measured.dtype)}
    else:
        flat = asdict(measured) if isinstance(measured, Row) else measured
    return key_of(flat, CASE)


def rows_in(path: Path, about: Mapping[str, str]) -> dict[tuple[str, ...], Row]:
    """Return the rows of a file that were measured in the same place, by their key; refused ones left out."""
    found: dict[tuple[str, ...], Row] = {}
    for line in read_rows(path):
        if key_of(line, PLACE) == key_of(about, PLACE) and line.get("us"):
            found[key(line)] = Row.of(line)
    return found


def add(path: Path, row: Row, about: Mapping[str, str]) -> None:
    """Add a row to a file, with where it was measured."""
    add_rows(path, [{**asdict(row), "speedup": row.speedup, **about}], (*PLACE, *CASE), short_cell)


def _row(case: Case, device: torch.device) -> Row:
    """Measure a case; what does not run says why."""
    sizes: dict[str, Any] = asdict(case.shape)
    row = Row(case.method, **sizes, dtype=_name(case.dtype))
    try:
        with torch.no_grad():
            return _measure_peer(case, row, device) if case.is_peer else _measure(case, row, device)
    except Exception as error:  # whatever stops one method is told of it, and the others go on
        return replace(row, refused=reason(error))
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measure_peer(case: Case, row: Row, device: torch.device) -> Row:
    shape = case.shape
    query = tokens(shape, shape.heads, 1, case.dtype, device)
    pair = [tokens(shape, shape.kv_heads, shape.context, case.dtype, device) for _ in ROLES]
    attend = peer(case.method)
    read = sum(each.numel() * each.element_size() for each in pair)
    others = [[each.clone() for each in pair] for _ in range(1, layers_in_turn(read, device))]
    time = microseconds([partial(attend, query, *each) for each in (pair, *others)], device)
    return replace(row, us=time, bits=8.0 * case.dtype.itemsize, gbps=read / time / 1e3)


class Step:
    """One layer of a decoding step over packed caches: what attends, and what writes.

    Attention has a mask, since `generate` gives one at every step.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        shape, like = case.shape, (case.dtype, device)
        spec = random_spec(case.method, shape)
        self.shape, self.device = shape, device
        self.caches: list[Cache] = [filled(spec, role, shape, *like) for role in ROLES]
        self.query = tokens(shape, shape.heads, 1, *like)
        self.new = [tokens(shape, shape.kv_heads, 1, *like) for _ in ROLES]
        self.score = Score(shape.head_size**-0.5)
        self.mask = torch.ones(
            shape.batch, 1, 1, shape.context + 1, dtype=torch.bool, device=device
        )

    def in_turn(self) -> list[Step]:
        """Return this layer and as many like it, with caches of their own, as have to be read in turn."""
        layers = [self]
        for _ in range(
            1, layers_in_turn(sum(each.packed_bytes for each in self.caches), self.device)
        ):
            layers.append(copy.copy(self))
            layers[-1].caches = [
                replace(cache, parts=[part.clone() for part in cache.parts])
                for cache in self.caches
            ]
        return layers

    def slots(self, slot: int) -> tuple[Tensor | None, int | None]:
        """Return where a token goes: a position on a GPU, which does not wait for it, a number elsewhere."""
        if self.device.type == "cuda":
            return torch.tensor([slot], dtype=torch.int64, device=self.device), None
        return None, slot

    def attend(self) -> Callable[[], Tensor]:
        """Return attention to the cache and the new token."""
        keys, values = self.caches
        place = self.slots(self.shape.context)
        constants = [*keys.constants, *values.constants]
        return lambda: ops.attend(
            *(self.query, *self.new, keys.parts, values.parts, constants, self.mask, *place),
            *(self.score, keys.layout, values.layout),
        )

    def append(self, slot: int) -> Callable[[], None]:
        """Return the writing of the new token to a slot."""
        keys, values = self.caches
        constants = [*keys.constants, *values.constants]
        position, start = self.slots(slot)
        layout = keys.layout

        def write() -> None:
            weights = None
            if layout.attentive and (position is not None or slot + 1 == boundary(layout, slot)):
                weights = ops.importance(
                    *(self.query, self.new[0], keys.parts, keys.constants, None, position, start),
                    *(slot + 1, self.score, True, layout.queries, layout),
                )
            ops.append_both_(
                *(keys.parts, values.parts, constants, *self.new, position, start),
                *(layout, values.layout, weights, self.query if layout.queries else None),
            )

        return write


def append_time(layers: Sequence[Step], slot: int) -> float:
    """Return the time of writing a layer's new token to a slot [µs], where cursors are put back in every step."""
    cursors = [cache.parts[3] for layer in layers for cache in layer.caches]
    pages = int(cursors[0][1])
    held = torch.tensor([slot, pages], dtype=torch.int32, device=layers[0].device)

    def put_back() -> None:
        torch._foreach_copy_(cursors, [held] * len(cursors))

    put_back()
    return microseconds([layer.append(slot) for layer in layers], layers[0].device, put_back)


def _measure(case: Case, row: Row, device: torch.device) -> Row:
    step, shape = Step(case, device), case.shape
    error, plain = relative_errors(step, step.attend())
    layers = step.in_turn()
    time = microseconds([layer.attend() for layer in layers], device)
    packed = sum(cache.packed_bytes for cache in step.caches)
    widths = [cache.layout.bits_per_element for cache in step.caches]
    row = replace(
        row, us=time, bits=sum(widths) / len(widths), gbps=packed / time / 1e3, error=error,
        plain_error=plain,
    )  # fmt: skip
    if not case.writes:
        return row
    last = boundary(step.caches[0].layout, shape.context) - 1
    return replace(
        row,
        append_us=append_time(layers, shape.context),
        flush_us=append_time(layers, last),
    )


def relative_errors(step: Step, attend: Callable[[], Tensor]) -> tuple[float, float]:
    """Return the error of a step's attention, and of 16-bit attention to the same tokens, against fp64.

    One sequence and KV head is read at a time, by the specification, so that a long cache does not have to fit in fp32.
    """
    group = step.shape.heads // step.shape.kv_heads
    output = attend().double()
    off = torch.zeros(3, dtype=torch.float64, device=step.device)  # squared: ours, 16 bit's, all
    for sequence, head in product(range(step.shape.batch), range(step.shape.kv_heads)):
        own = slice(sequence, sequence + 1), slice(head, head + 1)
        asking = own[0], slice(group * head, group * (head + 1))
        pair = [
            torch.cat([_tokens_of(cache, own, step.shape.context), new[own].float()], 2)
            for cache, new in zip(step.caches, step.new, strict=True)
        ]
        query = step.query[asking]
        with sdpa_kernel(SDPBackend.MATH):
            expected = sdpa(query.double(), pair[0].double(), pair[1].double(), enable_gqa=True)
        rounded = [each.to(query.dtype) for each in pair]
        plain = sdpa(query, rounded[0], rounded[1], enable_gqa=True)
        differences = output[asking] - expected, plain.double() - expected, expected
        off += torch.stack([each.square().sum() for each in differences])
    ours, plain_error = (off[:2] / off[2]).sqrt().tolist()
    return ours, plain_error


def _tokens_of(cache: Cache, own: tuple[slice, slice], context: int) -> Tensor:
    """Return the tokens of one sequence and head in fp32, as the specification reads them."""
    codes, params, exact, cursor = cache.parts
    constants = [each[which] for each, which in zip(cache.constants, reversed(own), strict=False)]
    relative = Calibrated.of(constants, cache.layout)
    held: Tensor = reference.read(
        codes[own], params[own], exact[own].float(), cursor, context, cache.layout, relative
    )
    return held


def compile_ahead(
    wanted: Sequence[Case], device: torch.device, jobs: int
) -> Iterator[tuple[int, int]]:
    """Run cases once in processes of their own, so that Triton finds their kernels compiled.

    The shapes of a method that share kernels run one after another.

    Yields:
        How many methods and head sizes are done, and of how many.
    """
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in wanted:
        same = replace(case.shape, batch=1, context=1)
        groups.setdefault((case.method, same), []).append(case)
    ended = contextlib.suppress(
        BrokenProcessPool
    )  # what ended a process is met again, and told then
    with ended, ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        every = pool.map(_run_once, groups.values(), [str(device)] * len(groups))
        for done, _ in enumerate(every, 1):
            yield done, len(groups)


def _run_once(wanted: Sequence[Case], device: str) -> None:
    for case in wanted:
        with (
            contextlib.suppress(Exception),
            torch.no_grad(),
        ):  # it is met again where it is measured
            step = Step(case, torch.device(device))
            step.attend()()
            if case.writes:
                step.append(case.shape.context)()
            del step
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
