"""Caches whose rows, the sequences of a batch, have lengths of their own.

Their ``cursor`` is ``[B, 2]``; all other parts are those of any cache, and no page and no ring crosses sequences. So a
row is a cache of one sequence, whose parts are views, and that is what an operator on such a cache means. Positions are
``[B, T]``, or ``[T]`` or a number where all rows are written at the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated, Packed
from kvq_compile.kernels.score import Score

Append = Callable[..., None]
Attend = Callable[..., Tensor]


def rows_of(cache: Packed) -> list[Packed]:
    """Return the rows of a cache, each a cache of one sequence: views, to be read alone where they have one cursor."""
    codes, params, exact, cursor = cache
    of_rows = cursor if cursor.dim() == 2 else cursor.expand(exact.shape[0], 2)
    return [
        Packed(codes[b : b + 1], params[b : b + 1], exact[b : b + 1], of_rows[b])
        for b in range(exact.shape[0])
    ]


def calibrated_row(calibrated: Calibrated, row: int) -> Calibrated:
    """Return the constants of one row; rows share their tables."""
    if calibrated.shift is None:
        return calibrated
    return calibrated._replace(shift=calibrated.shift[row : row + 1])


def append_rows_(
    append: Append,
    cache: Packed,
    calibrated: Calibrated,
    x: Tensor,
    position: Tensor | None,
    start: int | None,
    layout: Layout,
    importance: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    """Call ``append`` on each row of a cache."""
    for b, row in enumerate(rows_of(cache)):
        append(
            *(row, calibrated_row(calibrated, b), x[b : b + 1], _positions(position, b), start),
            *(layout, _row(importance, b), _row(query, b)),
        )


def attend_rows(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Packed,
    values: Packed,
    key_calibrated: Calibrated,
    value_calibrated: Calibrated,
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    score: Score,
    key_layout: Layout,
    value_layout: Layout,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Call ``attend`` on each row of a pair of caches; return all of them, ``[B, Hq, T, Dv]``."""
    outputs = []
    for b, (row_keys, row_values) in enumerate(zip(rows_of(keys), rows_of(values), strict=True)):
        now = slice(b, b + 1)
        outputs.append(
            attend(
                *(query[now], key[now], value[now], row_keys, row_values),
                *(calibrated_row(key_calibrated, b), calibrated_row(value_calibrated, b)),
                *(_row(mask, b), _positions(position, b), start, score, key_layout, value_layout),
                _row(sink_logits, b),
            )
        )
    return torch.cat(outputs)


def dequantize_rows(
    read: Attend, cache: Packed, calibrated: Calibrated, length: int, layout: Layout
) -> Tensor:
    """Call ``read`` on each row of a cache; return all of them, ``[B, H, length, D]``."""
    rows = enumerate(rows_of(cache))
    return torch.cat([read(row, calibrated_row(calibrated, b), length, layout) for b, row in rows])


def check_positions(position: Tensor | None, cursor: Tensor) -> None:
    """Check that rows are written at positions of their own only where they have lengths of their own.

    Raises:
        ValueError: They are not.
    """
    if position is not None and position.dim() > cursor.dim():
        raise ValueError(
            f"position must be [T] for a cache whose rows are equally long, got {list(position.shape)}; "
            "give each row a length of its own (QuantizedKV.count_by_row_)"
        )


def _positions(position: Tensor | None, row: int) -> Tensor | None:
    return position[row] if position is not None and position.dim() == 2 else position


def _row(x: Tensor | None, row: int) -> Tensor | None:
    """Return the part for one row of what broadcasts to all, ``[B, ...]``."""
    return x[row : row + 1] if x is not None and x.dim() == 4 and x.shape[0] > 1 else x
