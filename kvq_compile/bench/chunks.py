"""Attention of a chunk of a prompt to a long history: over a packed one, and flash attention over an exact one.

The chunk is causal, under a mask as models make it. What its own tokens attend to is exact in both. Times are of calls
that are launched, not replayed: no chunk is recorded as a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile.bench.caches import ROLES, Shape, filled, random_spec, tokens
from kvq_compile.bench.clock import launched
from kvq_compile.bench.rows import reason
from kvq_compile.kernels import ops, reference
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.score import Score

BASELINE = "sdpa-flash"
METHODS = (
    *("int8", "int4", "kivi:bits=2", "tc:bits=4", "tc:bits=2"),
    *("skvq:bits=2", "qaq:bits=2.3", "cq-4c8b"),
)
CHECKED = 32  # queries whose error is measured
CASE = ("method", "batch", "context", "queries", "heads", "kv_heads", "head_size", "dtype")


@dataclass(frozen=True)
class Row:
    """What was measured of a method, or of flash attention, at one shape; ``None`` where it was not.

    Attributes:
        ms: Time of attention [ms].
        baseline_ms: That of `BASELINE` in the same run.
        read_ms: Time of dequantizing keys and values, which is part of it [ms].
        scratch_mib: Most memory on the GPU during the call, without what it is given and returns [MiB].
        error, plain_error: Of the output, relative, and of 16-bit attention to the same tokens.
        refused: Why nothing was measured.
    """

    method: str
    batch: int
    context: int
    queries: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: str
    ms: float | None = None
    baseline_ms: float | None = None
    read_ms: float | None = None
    scratch_mib: float | None = None
    error: float | None = None
    plain_error: float | None = None
    refused: str = ""

    @property
    def times_baseline(self) -> float | None:
        """How many times as long as the baseline."""
        return None if self.ms is None or self.baseline_ms is None else self.ms / self.baseline_ms

    @property
    def is_wrong(self) -> bool:
        """Whether the error is more than a small multiple of that of 16-bit attention."""
        if self.error is None or self.plain_error is None:
            return False
        return not self.error <= 3 * self.plain_error + 2e-3


class Chunk:
    """Queries, keys and values of a chunk, and the caches of what was before it.

    Args:
        method: How those are quantized.
        shape: Of the caches.
        queries: Tokens of the chunk.
        dtype, device: Of all that is not packed.
    """

    def __init__(
        self, method: str, shape: Shape, queries: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        like = dtype, device
        spec = random_spec(method, shape)
        self.shape, self.device = shape, device
        self.caches = [filled(spec, role, shape, *like) for role in ROLES]
        self.query = tokens(shape, shape.heads, queries, *like)
        self.new = [tokens(shape, shape.kv_heads, queries, *like) for _ in ROLES]
        self.score = Score(shape.head_size**-0.5)
        slot = torch.arange(shape.context + queries, dtype=torch.int64, device=device)
        self.mask = slot <= slot[shape.context :, None]

    def attend(self) -> Tensor:
        """Attend causally, under a mask."""
        keys, values = self.caches
        constants = [*keys.constants, *values.constants]
        output: Tensor = ops.attend(
            *(self.query, *self.new, keys.parts, values.parts, constants),
            *(self.mask[None, None], None, self.shape.context),
            *(self.score, keys.layout, values.layout),
        )
        return output

    def read(self) -> list[Tensor]:
        """Dequantize the caches."""
        held = self.shape.context
        return [ops.dequantize(c.parts, c.constants, held, c.layout) for c in self.caches]

    def tokens_of(self, sequence: int, head: int) -> list[Tensor]:
        """Return the keys and values of a KV head, in fp32, as the specification reads them."""
        own, found = (slice(sequence, sequence + 1), slice(head, head + 1)), []
        for cache, new in zip(self.caches, self.new, strict=True):
            codes, params, exact, cursor = cache.parts
            constants = [x[part] for x, part in zip(cache.constants, reversed(own), strict=False)]
            relative = Calibrated.of(constants, cache.layout)
            parts = codes[own], params[own], exact[own].float(), cursor
            held = reference.read(*parts, self.shape.context, cache.layout, relative)
            found.append(torch.cat([held, new[own].float()], 2))
        return found


def measure(
    methods: Sequence[str], shapes: Sequence[Shape], queries: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Iterator[Row]:  # fmt: skip
    """Measure the baseline and then methods, for each shape and number of queries; yield a row for each."""
    for shape, count in product(shapes, queries):
        baseline: float | None = None
        for method in dict.fromkeys((BASELINE, *methods)):
            name = str(dtype).removeprefix("torch.")
            row = Row(method=method, queries=count, **asdict(shape), dtype=name)
            one = _measure_flash if method == BASELINE else _measure
            try:
                with torch.no_grad():
                    row = one(row, shape, dtype, device)
            except Exception as error:  # what stops one method is told of it, and the others go on
                row = replace(row, refused=reason(error))
            if method == BASELINE:
                baseline = row.ms
            if device.type == "cuda":
                torch.cuda.empty_cache()
            yield replace(row, baseline_ms=baseline)


def _measure_flash(row: Row, shape: Shape, dtype: torch.dtype, device: torch.device) -> Row:
    query = tokens(shape, shape.heads, row.queries, dtype, device)
    end = shape.context + row.queries
    key, value = (tokens(shape, shape.kv_heads, end, dtype, device) for _ in ROLES)
    bias: Any = causal_lower_right(row.queries, end)

    def attend() -> Tensor:
        return sdpa(query, key, value, attn_mask=bias, enable_gqa=True)

    return replace(row, ms=1e3 * launched(attend, device), scratch_mib=_scratch(attend, device))


def _measure(row: Row, shape: Shape, dtype: torch.dtype, device: torch.device) -> Row:
    chunk = Chunk(row.method, shape, row.queries, dtype, device)
    error, plain = relative_errors(chunk, chunk.attend())
    return replace(
        row, ms=1e3 * launched(chunk.attend, device), read_ms=1e3 * launched(chunk.read, device),
        scratch_mib=_scratch(chunk.attend, device), error=error, plain_error=plain,
    )  # fmt: skip


def _scratch(attend: Callable[[], Tensor], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = attend()
    peak = torch.cuda.max_memory_allocated() - before - output.numel() * output.element_size()
    return peak / 2**20


def relative_errors(chunk: Chunk, output: Tensor) -> tuple[float, float]:
    """Return the error of a chunk's attention, and of 16-bit attention to the same tokens, against fp64.

    Of some of its queries, the first and the last among them; one sequence and KV head is read at a time.
    """
    shape, count, dtype = chunk.shape, chunk.query.shape[2], chunk.query.dtype
    group = shape.heads // shape.kv_heads
    places = torch.linspace(0, count - 1, min(CHECKED, count), dtype=torch.float64, device="cpu")
    some = places.round().long().to(chunk.device)
    mask = chunk.mask[some]
    off = torch.zeros(3, dtype=torch.float64, device=chunk.device)  # squared: ours, 16 bit's, all
    for sequence, head in product(range(shape.batch), range(shape.kv_heads)):
        own = slice(sequence, sequence + 1), slice(group * head, group * (head + 1)), some
        key, value = chunk.tokens_of(sequence, head)
        query = chunk.query[own]
        with sdpa_kernel(SDPBackend.MATH):
            wide = query.double(), key.double(), value.double()
            expected = sdpa(*wide, attn_mask=mask, enable_gqa=True)
            narrow = query, key.to(dtype), value.to(dtype)
            plain = sdpa(*narrow, attn_mask=mask, enable_gqa=True)
        differences = output[own].double() - expected, plain.double() - expected, expected
        off += torch.stack([each.square().sum() for each in differences])
    ours, plain_error = (off[:2] / off[2]).sqrt().tolist()
    return ours, plain_error
