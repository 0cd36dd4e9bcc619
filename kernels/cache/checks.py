"""Check the tensors of a saved cache against their layout, once, before anything uses them as indices.

Kernels trust a cache: the cursor selects pages and rows, the header of a mixed page gives the first rows of its planes,
metadata give the row and the outlier channels of a token, and tables permute channels. A file may contain
anything. `check_loaded` therefore accepts only what quantization could have written, as far as indices, lengths and
finite values can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvq_compile.kernels.cache.rows import why_not_by_row
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import calibrated_names, part_names
from kvq_compile.kernels.reference.pages import coder_of
from kvq_compile.kernels.tables import checked_tables
from kvq_compile.kernels.values import check, check_integers

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_loaded(
    parts: Sequence[Tensor],
    calibrated: Sequence[Tensor],
    layout: Layout,
    kind: str,
    length: int,
    first: int | None = None,
) -> None:
    """Check the tensors and the lengths of a file against their layout.

    Args:
        parts: The parts that `part_names` lists.
        calibrated: What the layout's tokens are coded relative to.
        layout: Their layout.
        kind: ``"grown"``, ``"static"`` or ``"ring"``.
        length: Slots of the cache.
        first: Slots before them, of a dynamic cache that is trimmed; else ``None``.

    Raises:
        TypeError: Something is no tensor, or no integer.
        ValueError: Something is not what quantizing could have written.
    """
    kinds = ("grown", "static", "ring")
    check(kind in kinds, f"kind must be one of {', '.join(kinds)}, got {kind!r}")
    check_integers(length=length)
    check(length >= 0, f"length must be 0 or more, got {length}")
    if first is not None:
        check_integers(first=first)
        check(first >= 0, f"first must be 0 or more, got {first}")
        check(kind == "grown", f"first must go with kind grown, got {kind}")
        length += first
    check(
        not layout.keep_exact or kind == "grown", f"keep_exact must go with kind grown, got {kind}"
    )
    check(
        bool(layout.queries) == bool(layout.shared_by),
        f"queries and shared_by must both be 0, or neither, got {layout.queries} and {layout.shared_by}",
    )
    names = (*part_names(layout), *calibrated_names(layout))
    given = (*parts, *calibrated)
    check(
        len(parts) == len(part_names(layout)) and len(given) == len(names),
        f"the tensors of a saved cache must be [{', '.join(names)}], got {len(given)} tensors",
    )
    tensors = dict(zip(names, given, strict=True))
    _check_shapes(tensors, layout, kind)
    cursors = tensors["cursor"].view(-1, 2)
    capacity = tensors["codes"].shape[2]
    packed = [_check_cursor(cursor, capacity, layout, kind, length) for cursor in cursors]
    rows, held = tensors["exact"].shape[2], int(cursors[:, 0].max())
    check(
        rows == layout.exact_rows
        or (kind == "grown" and held <= rows - layout.tail_rows < layout.token_rows),
        f"exact must have rows for {min(held, layout.exact_rows)} tokens, got {rows}",
    )
    coder, by_row = coder_of(layout), tensors["cursor"].dim() == 2
    for number, pages in enumerate(packed):
        row = slice(number, number + 1) if by_row else slice(None)
        codes, params = (tensors[name][row, :, :pages] for name in ("codes", "params"))
        coder.check_pages(codes, params, layout)
        if layout.scheme.state_rows:
            coder.check_state(layout.state_of(tensors["exact"][row]), pages, layout)
    if layout.has_tables:
        words = tensors["tables"].cpu()
        tables = checked_tables(
            words, layout.head_dim, layout.has_frequencies, layout.scheme.entries
        )
        check(
            tables.digest == layout.tables,
            f"tables must be those that the layout names, {layout.tables}, got {tables.digest}",
        )


def _check_shapes(tensors: dict[str, Tensor], layout: Layout, kind: str) -> None:
    for name, x in tensors.items():
        if type(x) is not Tensor:
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    exact, codes = tensors["exact"], tensors["codes"]
    check(exact.dtype in FLOATS, f"exact must be of a floating dtype, got {exact.dtype}")
    check(
        exact.dim() == 4 and codes.dim() == 5 and min(exact.shape[:2]) > 0,
        f"exact and codes must have 4 and 5 dimensions, got {list(exact.shape)} and {list(codes.shape)}",
    )
    check(exact.device.type != "meta", "a saved cache must be loaded to a CPU or a GPU, got meta")
    (B, H), P = exact.shape[:2], codes.shape[2]
    page = layout.page_size, layout.head_dim
    by_row = tensors["cursor"].dim() == 2 and kind == "static" and why_not_by_row(layout) is None
    expected: dict[str, tuple[Any, ...]] = {
        "codes": (torch.int16, B, H, P, layout.rows, layout.row_words),
        "params": (
            torch.uint8 if layout.has_byte_params else torch.float16,
            *(B, H, P, *layout.params_shape, layout.param_elements),
        ),
        "exact": (exact.dtype, B, H, exact.shape[2], layout.head_dim),
        "cursor": (torch.int32, B, 2) if by_row else (torch.int32, 2),
        "originals": (exact.dtype, B, H, P, *page),
        "tables": (torch.int32, H, *tensors.get("tables", exact).shape[1:]),
        "shift": (torch.int32, B),
    }
    for name, x in tensors.items():
        dtype, *shape = expected[name]
        check(
            x.dtype == dtype and list(x.shape) == shape,
            f"{name} must be {dtype} {shape}, got {x.dtype} {list(x.shape)}",
        )
        check(
            x.layout == torch.strided and x.is_contiguous(), f"{name} must be contiguous, got not"
        )
        check(
            name == "originals" or x.device == exact.device,
            f"{name} must be on {exact.device}, got {x.device}",
        )


def _check_cursor(cursor: Tensor, capacity: int, layout: Layout, kind: str, length: int) -> int:
    """Return the pages that the cursor counts."""
    held, pages = cursor.tolist()
    # A grown cache that was cropped still counts the tokens behind its end, until it takes new ones.
    fits = held >= length if kind == "grown" else held >= 0 and (kind == "ring" or held <= length)
    check(fits, f"cursor must hold the {length} tokens of a {kind} cache, got {held}")
    least, most = layout.pages_at(held), max(0, held - layout.sinks) // layout.page_size
    check(
        least <= pages <= min(most, capacity),
        f"cursor must count {least} to {min(most, capacity)} pages for {held} tokens, got {pages}",
    )
    return int(pages)
