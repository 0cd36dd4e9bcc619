"""Rows of measurements in a CSV file that grows as they are measured."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Row = Mapping[str, str]
PLACE = (
    "hardware",
    "torch",
    "triton",
    "kvq_compile",
    "commit",
)  # where a row of a GPU was measured


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_rows(
    path: Path,
    rows: Sequence[Mapping[str, object]],
    same: Sequence[str],
    cell: Callable[[object], str] = str,
) -> None:
    """Add rows at the end of a file, without those that are of the same measurement.

    Args:
        path: The file, made when missing.
        rows: The rows; other columns than those of the file are added to it.
        same: Columns; rows that agree in all of them are the same measurement, of which the last counts.
        cell: How a value is written.
    """
    if not rows:
        return
    new = [{name: cell(value) for name, value in row.items()} for row in rows]
    keys = {key_of(row, same) for row in new}
    every = [*(row for row in read_rows(path) if key_of(row, same) not in keys), *new]
    columns = list(dict.fromkeys(name for row in every for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(every)


def key_of(row: Mapping[str, object], same: Sequence[str]) -> tuple[str, ...]:
    """Return what tells a measurement from others: the row's values in the columns ``same``."""
    return tuple(str(row.get(name) or "") for name in same)


def reason(error: Exception) -> str:
    """Return why something was not measured: the kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def short_cell(value: object) -> str:
    """Return a value as a cell: numbers in four digits, nothing for ``None``."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
