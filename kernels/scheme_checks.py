"""Fields that several quantization schemes have, and their checks."""

from __future__ import annotations

from typing import Literal

from kvq_compile.kernels.tables import NO_TABLES
from kvq_compile.kernels.values import check, check_flags

Grouping = Literal["token", "channel"]
Role = Literal["key", "value"]
Transform = Literal["none", "hadamard"]
Packing = Literal["fields", "trits"]
Params = Literal["fp16", "fp8", "e5m3"]


def check_format(params: str, transform: str, rotary: bool, tables: str) -> None:
    """Make sure that the format of parameters, the transform and the calibration tables go together.

    Raises:
        TypeError: ``rotary`` is no flag, or ``tables`` no digest.
        ValueError: A value is unknown, or two of them do not go together.
    """
    check_tables(rotary, tables)
    formats = ("fp16", "fp8", "e5m3")
    check(params in formats, f'params must be "fp16", "fp8" or "e5m3", got {params!r}')
    check(
        transform in ("none", "hadamard"),
        f'transform must be "none" or "hadamard", got {transform!r}',
    )
    check(
        transform == "none" or not rotary,
        f'transform must be "none" for rotary keys and for codebooks, got {transform!r}',
    )


def check_tables(rotary: bool, tables: str) -> None:
    """Make sure that ``tables`` is a digest, and that rotary keys have one.

    Raises:
        TypeError: ``rotary`` is no flag, or ``tables`` no digest.
        ValueError: Keys are rotary and there are no tables.
    """
    check_flags(rotary=rotary)
    if not isinstance(tables, str):
        raise TypeError(f"tables must be a digest, got {tables!r}")
    check(
        not rotary or tables != NO_TABLES,
        "rotary keys must be calibrated: tables must be given",
    )
