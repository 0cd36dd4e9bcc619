"""The same cache written by the reference and by the kernel; the reference always runs on the CPU, where division
of a tensor by a number is another operation than on a GPU.
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import Layout, exact_row_index
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.schemes import Channelwise, Mixed
from kvq_compile.kernels.tables import Tables
from kvq_compile.kernels.triton import backend
from native import DEVICE, NATIVE, frame_on_device

# The interpreter truncates where fp32 becomes bf16, which reopening a page does.
REOPENING_DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * NATIVE
DTYPES = [torch.float16, torch.float32, torch.bfloat16]
SPECIAL = (0.0, -0.0, 1e-7, -1e-7, 6e-5, 1.0, -3.0, 65504.0, -65504.0, 7e4, -7e4)
# Of e4m3: halves between normal and between subnormal numbers, the largest, and beyond.
SPECIAL_E4M3 = (17.0, -17.0, 2.0**-10, 3 * 2.0**-10, 448.0, 463.9, -464.0, 1e4)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def full(layout: Layout, pages: int) -> int:
    """Return the number of tokens that fill so many pages."""
    return layout.sinks + layout.window + pages * layout.page_size


def spoil(data: st.DataObject, x: Tensor, special: tuple[float, ...] = SPECIAL) -> None:
    """Put unusual numbers into contiguous tokens: in one place, or all over a stretch."""
    for _ in range(data.draw(st.integers(1, 8))):
        value = data.draw(st.sampled_from(special + NOT_FINITE) | st.floats(width=32))
        ends = st.integers(0, x.numel())
        first, last = sorted(data.draw(st.tuples(ends, ends)))
        x.view(-1)[first : last if data.draw(st.booleans()) else first + 1] = value


def pieces(data: st.DataObject, layout: Layout, count: int) -> list[int]:
    """Draw where ``count`` tokens are cut, often just before or where they fill a page."""
    edges = [full(layout, 1) - 1, full(layout, 1), data.draw(st.integers(1, count))]
    return sorted({0, count, *data.draw(st.lists(st.sampled_from(edges), max_size=3))})


def calibrated(layout: Layout, tables: Tables | None) -> Calibrated:
    """Return what one sequence is coded relative to that begins at position 0."""
    if tables is None:
        return UNCALIBRATED
    return Calibrated(tables.words, torch.zeros(1, dtype=torch.int32) if layout.rotary else None)


class Caches:
    """One cache kept twice; what writing leaves alone is not zero."""

    def __init__(
        self, layout: Layout, dtype: torch.dtype, frame: Calibrated = UNCALIBRATED, batch: int = 1,
        capacity: int = 4,
    ) -> None:  # fmt: skip
        self.layout, self.frame, self.batch = layout, frame, batch
        self.moved = frame_on_device(frame)
        like = torch.zeros(batch, 2, 1, layout.head_dim, dtype=dtype)
        self.expected = Packed.empty(like, capacity, layout)
        self.actual: tuple[Tensor, ...] = tuple(part.to(DEVICE) for part in self.expected)
        for codes, params, _, _ in (self.expected, self.actual):
            codes.view(torch.uint8).fill_(0x5A)
            params.view(torch.uint8).fill_(0xA5)

    def append(
        self, x: Tensor, start: int, by_position: bool, importance: Tensor | None = None,
        query: Tensor | None = None,
    ) -> None:  # fmt: skip
        x = x[: self.batch]
        reference.append_(*self.expected, x, start, self.layout, self.frame, importance, query)
        position = torch.arange(start, start + x.shape[2], device=DEVICE) if by_position else None
        weights = None if importance is None else importance.to(DEVICE)
        known = None if by_position else start
        backend.append_(
            self.actual, self.moved, x.to(DEVICE), position, known, self.layout, weights,
            None if query is None else query.to(DEVICE),
        )  # fmt: skip

    def held(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what counts: packed pages, exact rows that hold a token or a query, cursor."""
        codes, params, exact, cursor = (part.cpu() for part in parts)
        length, pages = cursor.tolist()
        first = self.layout.sinks + pages * self.layout.page_size
        rows = exact_row_index(first, max(first, length), self.layout, exact.device)
        sinks = torch.arange(min(length, self.layout.sinks))
        queries = torch.arange(exact.shape[2] - self.layout.tail_rows, exact.shape[2])
        exact = exact[:, :, torch.cat([sinks, rows, queries])]
        return codes[:, :, :pages], params[:, :, :pages], exact, cursor

    def assert_equal(self) -> None:
        names = ("codes", "params", "exact", "cursor")
        parts = self.held(self.expected), self.held(self.actual)
        for name, expected, actual in zip(names, *parts, strict=True):
            if name == "params":
                expected, actual = (unsigned_zeros(x, self.layout) for x in (expected, actual))
            rtol, atol = rounding_of_rows(expected, self.layout) if name == "exact" else (0.0, 0.0)
            torch.testing.assert_close(
                actual, expected, rtol=rtol, atol=atol, equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )  # fmt: skip


def rounding_of_rows(exact: Tensor, layout: Layout) -> tuple[float, float]:
    """Return how far exact rows may be apart, relative and absolute: not at all, unless a rotated page was cut open.

    The specification rotates back by a matrix product, whose sums of ``head_dim`` terms have no order of their own;
    what is off by less than their rounding may be stored as the number beside.
    """
    if layout.transform != "hadamard":
        return 0.0, 0.0
    finite = exact[exact.isfinite()].abs().float()
    largest = float(finite.max()) if finite.numel() else 0.0
    return torch.finfo(exact.dtype).eps, layout.head_dim * 2.0**-23 * largest


def unsigned_zeros(params: Tensor, layout: Layout) -> Tensor:
    """Return parameters whose zero points and centres of -0 are 0: the least of 0 and -0 is either."""
    if params.dtype != torch.uint8:
        return params  # numbers, which compare by value
    params = params.clone()
    if isinstance(layout.scheme, Mixed):
        high = params[..., layout.scheme.param_bytes - 1, :, 0]
        low = params[..., 0, :, 0] if layout.scheme.param_bytes == 2 else torch.zeros_like(high)
    elif isinstance(layout.scheme, Channelwise):
        low, high = params[..., 1, :, 0], params[..., 2, :, 0]
    else:
        high = params[..., 1]
        low = torch.zeros_like(high)
    high[(low == 0) & (high == 0x80)] = 0
    return params
