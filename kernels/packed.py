"""`Packed` and `Calibrated`: the tensors of a cache, as the operators take them.

Operators take a cache as two lists of tensors. The first has its parts in the order of `Packed`, followed by those
that only some layouts have (`ORIGINALS`). The second has those tensors of `Calibrated` that the layout has. `Layout`
gives shapes and dtypes.

A cache that grows has room for what it holds and an eighth more. Its pages lie flat, ``[B, H, elements]``, and
``exact`` has the first rows of tokens only, as many as it needs so far, and then its tail. Both axes are sizes that
compiled graphs leave open, which torch.compile can do with sizes of 2 and more: no page and one page would be a graph
each if pages had an axis of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.tables import read_section

MIN_SIZE = MIN_PAGES = 2  # torch.compile specialises on sizes 0 and 1
PARTS_FORM = (
    2  # of the parts that operators return: compiled graphs that torch caches on disk rely on it
)
FLAT = 3  # dimensions of a part whose pages are flat
ROWS_STEP = 8  # rows of exact tokens are added in multiples of it
Size = int | torch.SymInt


class Packed(NamedTuple):
    """The parts of a packed tensor; `Layout` gives the shapes that `paged` brings them into."""

    codes: Tensor
    params: Tensor
    exact: Tensor
    cursor: Tensor

    @staticmethod
    def empty(like: Tensor, capacity: Size, layout: Layout) -> Packed:
        """Allocate the parts for tokens like ``like`` ``[B, H, *, D]``, with ``capacity`` pages and all exact rows."""
        B, H = like.shape[:2]
        of_codes, of_params, _ = page_shapes(layout)
        codes = like.new_zeros(B, H, capacity, *of_codes, dtype=torch.int16)
        params = like.new_zeros(B, H, capacity, *of_params, dtype=_params_dtype(layout))
        exact = like.new_zeros(B, H, layout.exact_rows, layout.head_dim)
        return Packed(codes, params, exact, like.new_zeros(2, dtype=torch.int32))

    @staticmethod
    def growing(like: Tensor, slots: Size, layout: Layout) -> Packed:
        """Allocate the parts of a cache that grows, for ``slots`` tokens like ``like`` ``[B, H, *, D]``."""
        B, H = like.shape[:2]
        pages, rows = room_for(slots, layout)
        of_codes, of_params = (flat_size(pages, shape) for shape in page_shapes(layout)[:2])
        codes = like.new_zeros(B, H, of_codes, dtype=torch.int16)
        params = like.new_zeros(B, H, of_params, dtype=_params_dtype(layout))
        exact = like.new_zeros(B, H, rows, layout.head_dim)
        return Packed(codes, params, exact, like.new_zeros(2, dtype=torch.int32))

    @property
    def by_row(self) -> bool:
        """Whether rows have lengths of their own: see `rows`."""
        return self.cursor.dim() == 2

    def paged(self, layout: Layout) -> Packed:
        """Return the parts with pages that are not flat: views."""
        return Packed(*paged(self, layout))


PARTS = Packed._fields
ORIGINALS = (
    "originals"  # exact copies of packed tokens in host memory: a fifth part of some layouts
)


class Calibrated(NamedTuple):
    """Calibration constants of a packed tensor.

    Attributes:
        tables: ``[H, table_words]``, int32, see `Tables`; ``None`` where the layout has none.
        shift: Position minus slot of each sequence, ``[B]``, int32; ``None`` unless keys are rotary.
        state: What the cache found of itself, ``[B, H, rows, D]``, fp32: no constant, but the specification reads
            both together; ``None`` where the layout has no such rows.
    """

    tables: Tensor | None = None
    shift: Tensor | None = None
    state: Tensor | None = None

    @staticmethod
    def of(tensors: Sequence[Tensor], layout: Layout) -> Calibrated:
        """Name the tensors of a list, which has those of the layout.

        Raises:
            ValueError: The list has more or fewer.
        """
        if len(tensors) != layout.calibrated_tensors:
            names = ", ".join(calibrated_names(layout))
            raise ValueError(
                f"calibrated must be [{names}] for {layout}, got {len(tensors)} tensors"
            )
        return Calibrated(*tensors) if tensors else UNCALIBRATED

    def state_of(self, layout: Layout) -> Tensor:
        """Return what the cache found of itself."""
        assert self.state is not None, f"{layout} must have been given its state"
        return self.state

    def section(self, name: str, layout: Layout) -> Tensor:
        """Return a section of the tables, ``[H, ...]``."""
        assert self.tables is not None
        return read_section(self.tables, name, layout.head_dim, layout.rotary)

    def codebook(self, layout: Layout) -> Tensor:
        """Return the codebook ``[H, D / couple, entries, couple]`` (fp32)."""
        shape = (-1, layout.code_channels, layout.levels + 1, layout.couple)
        return self.section("codebook", layout).view(shape).float()

    def margin(self, layout: Layout) -> Tensor:
        """Return the margin of each group, broadcasting to ``[B, H, P, groups, members]``."""
        margin = self.section("margin", layout)
        if layout.grouping == "token":
            return margin[:, :: layout.group_size][None, :, None, :, None]
        return margin[None, :, None, None, :]


UNCALIBRATED = Calibrated()
CALIBRATED = Calibrated._fields[:2]  # those that operators take


def calibrated_names(layout: Layout) -> tuple[str, ...]:
    """Return the names of the calibration constants of a layout, in order."""
    return CALIBRATED[: layout.calibrated_tensors]


def part_names(layout: Layout) -> tuple[str, ...]:
    """Return the names of the parts of a layout, in order."""
    return (*PARTS, ORIGINALS) if layout.keep_exact else PARTS


_AS_IT_IS = nullcontext()


def writable() -> AbstractContextManager[object]:
    """Return a context for allocating tensors that are written later, in any mode.

    A tensor allocated in inference mode cannot be written in place outside of it.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _AS_IT_IS


@cache
def page_shapes(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a page: of its codes, its parameters and its originals."""
    codes = layout.rows, layout.row_words
    params = *layout.params_shape, layout.param_elements
    return codes, params, (layout.page_size, layout.head_dim)


def _params_dtype(layout: Layout) -> torch.dtype:
    return torch.uint8 if layout.has_byte_params else torch.float16


def flat_size(pages: Size, shape: tuple[int, ...]) -> Size:
    """Return the elements of ``pages`` flat pages, of which a page has ``shape``; at least 2 of any."""
    size = math.prod(shape)
    return torch.sym_max(MIN_SIZE, pages * size) if size else 0


def paged(parts: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """Return parts with pages ``[B, H, P, ...]``: views where they are flat, those given where they are not."""
    if parts[0].dim() != FLAT:
        return list(parts)
    pages = page_room(parts, layout)

    def view(part: Tensor, shape: tuple[int, ...]) -> Tensor:
        return part[:, :, : pages * math.prod(shape)].view(*part.shape[:2], pages, *shape)

    return _map_pages(view, parts, layout)


def flat(parts: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """Return parts with flat pages, in the same memory as pages ``[B, H, P, ...]`` if there are any."""

    def flatten(part: Tensor, shape: tuple[int, ...]) -> Tensor:
        size = flat_size(part.shape[2], shape)
        return part.new_zeros(*part.shape[:2], size) if part.numel() == 0 else part.flatten(2)

    return _map_pages(flatten, parts, layout)


def _map_pages(
    change: Callable[[Tensor, tuple[int, ...]], Tensor], parts: Sequence[Tensor], layout: Layout
) -> list[Tensor]:
    codes, params, originals = page_shapes(layout)
    changed = [change(parts[0], codes), change(parts[1], params), *parts[2:4]]
    return changed + [change(part, originals) for part in parts[4:]]


def page_capacity(slots: Size, layout: Layout) -> Size:
    """Return the pages that ``slots`` tokens fill."""
    return torch.sym_max(0, (slots - layout.sinks - layout.window) // layout.page_size)


def room_for(slots: Size, layout: Layout) -> tuple[Size, Size]:
    """Return the pages and the exact rows that a growing cache allocates for ``slots`` tokens."""
    pages = page_capacity(slots, layout)
    pages += pages // 8
    rows = -(-(slots + slots // 8) // ROWS_STEP) * ROWS_STEP
    rows = torch.sym_min(layout.token_rows, torch.sym_max(ROWS_STEP, rows))
    return pages, rows + layout.tail_rows


def page_room(parts: Sequence[Tensor], layout: Layout) -> int:
    """Return how many pages parts have room for."""
    return math.prod(parts[0].shape[2:]) // layout.page_words


def room_of(parts: Sequence[Tensor], layout: Layout) -> int:
    """Return for how many tokens parts have room."""
    pages, rows = page_room(parts, layout), parts[2].shape[2] - layout.tail_rows
    slots = layout.sinks + layout.window + (pages + 1) * layout.page_size - 1
    return slots if rows >= layout.token_rows else min(slots, rows)


def check_room(parts: Sequence[Tensor], slots: int, layout: Layout) -> None:
    """Check that parts have room for ``slots`` tokens.

    Raises:
        ValueError: They have not.
    """
    needed, pages = layout.pages_at(slots), page_room(parts, layout)
    if needed > pages:
        raise ValueError(f"the cache must have room for {needed} pages, got {pages}")
    needed, rows = min(slots, layout.token_rows), parts[2].shape[2] - layout.tail_rows
    if needed > rows:
        raise ValueError(f"the cache must have room for {needed} exact tokens, got {rows}")


def with_room(parts: Sequence[Tensor], slots: int, layout: Layout) -> list[Tensor]:
    """Return the parts of a growing cache with room for ``slots`` tokens: those given where they have it, or copies."""
    pages, rows = room_for(slots, layout)
    sizes = [int(flat_size(pages, shape)) for shape in page_shapes(layout)]
    sizes[2:2] = int(rows), 0
    tails = 0, 0, layout.tail_rows, 0, 0
    return [widened(*of) for of in zip(parts, sizes, tails, strict=False)]


def widened(part: Tensor, size: int, tail: int = 0) -> Tensor:
    """Return a copy of a part with ``size`` elements along its third axis, the last ``tail`` of which stay the last;
    or the part where it has as many.
    """
    had = part.shape[2] if part.dim() > 1 else size
    if had >= size:
        return part
    wider = part.new_zeros(*part.shape[:2], size, *part.shape[3:])
    wider[:, :, : had - tail] = part[:, :, : had - tail]
    wider[:, :, size - tail :] = part[:, :, had - tail :]
    return wider
