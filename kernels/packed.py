"""`Packed` and `Calibrated`: the tensors of a cache, as the operators take them.

Operators take a cache as two lists of tensors. The first has its parts in the order of `Packed`, followed by those
that only some layouts have (`ORIGINALS`). The second has those tensors of `Calibrated` that the layout has. `Layout`
gives shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.tables import read_section

MIN_PAGES = 2  # torch.compile specialises on sizes 0 and 1


class Packed(NamedTuple):
    """The parts of a packed tensor; `Layout` gives their shapes."""

    codes: Tensor
    params: Tensor
    exact: Tensor
    cursor: Tensor

    @staticmethod
    def empty(like: Tensor, capacity: int | torch.SymInt, layout: Layout) -> Packed:
        """Allocate the parts for tokens like ``like`` ``[B, H, *, D]``, with ``capacity`` pages."""
        B, H = like.shape[:2]
        codes = like.new_zeros(B, H, capacity, layout.rows, layout.row_words, dtype=torch.int16)
        params_dtype = torch.uint8 if layout.has_byte_params else torch.float16
        params_shape = (*layout.params_shape, layout.param_elements)
        params = like.new_zeros(B, H, capacity, *params_shape, dtype=params_dtype)
        exact = like.new_zeros(B, H, layout.exact_rows, layout.head_dim)
        return Packed(codes, params, exact, like.new_zeros(2, dtype=torch.int32))


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


def writable() -> AbstractContextManager[object]:
    """Return a context for allocating tensors that are written later, in any mode.

    A tensor allocated in inference mode cannot be written in place outside of it.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def page_capacity(slots: int | torch.SymInt, grows: bool, layout: Layout) -> int | torch.SymInt:
    """Return the pages to allocate for ``slots`` tokens: those they fill, and an eighth more if the cache grows."""
    pages = torch.sym_max(0, (slots - layout.sinks - layout.window) // layout.page_size)
    return torch.sym_max(MIN_PAGES, pages + pages // 8 + 2 if grows else pages)
