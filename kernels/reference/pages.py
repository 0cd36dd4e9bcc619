"""Quantize and pack, unpack and dequantize whole pages, by the scheme of their layout.

Each scheme has a file of its name in this folder, with the functions of `Coder`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated
from kvq_compile.kernels.reference.tables import from_coded, to_coded


class Coder(Protocol):
    """Functions of the file of a quantization scheme; pages ``[..., N, D]`` are transformed by `tables.to_coded`."""

    def quantize_coded(
        self,
        coded: Tensor,
        layout: Layout,
        calibrated: Calibrated,
        first: int,
        importance: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the parts ``codes`` and ``params`` of pages from slot ``first`` on."""

    def packed_values(
        self, codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated
    ) -> Tensor:
        """Return the elements (fp32) of packed pages."""

    def check_pages(self, codes: Tensor, params: Tensor, layout: Layout) -> None:
        """Check packed pages from a file.

        Raises:
            ValueError: Quantizing could not have written them.
        """

    def check_state(self, state: Tensor, pages: int, layout: Layout) -> None:
        """Check the state rows of a cache from a file, where the scheme has some.

        Raises:
            ValueError: No cache could have found them.
        """


class CodeCoder(Coder, Protocol):
    """Further functions of a scheme with one code per element or per few channels, and parameters of groups."""

    def quantize_codes(
        self, coded: Tensor, layout: Layout, calibrated: Calibrated
    ) -> tuple[Tensor, Tensor]:
        """Return codes ``[..., N, D / couple]`` (int32) and parameters ``[..., groups, members, 2]``."""

    def coded_values(
        self, codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated
    ) -> Tensor:
        """Dequantize codes to elements (fp32)."""


@cache
def _file(name: str) -> object:
    return import_module(f"kvq_compile.kernels.reference.{name}")


def coder_of(layout: Layout) -> Coder:
    """Return the functions of a layout's scheme."""
    return cast(Coder, _file(layout.scheme.name))


def quantize_pages(
    x: Tensor, layout: Layout, calibrated: Calibrated = UNCALIBRATED, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantize whole pages of a `CodeCoder` scheme, without packing.

    Args:
        x: Pages of tokens, ``[..., N, D]``, any float dtype; ``[B, H, P, N, D]`` where there are tables.
        layout: Where the groups lie and how wide a code is.
        calibrated: What the tokens are coded relative to, where the layout has tables.
        first: Slot of the first token.

    Returns:
        Codes ``[..., N, D / couple]`` (int32) and parameters ``[..., groups, members, 2]`` (fp16, or uint8).
    """
    coder = cast(CodeCoder, coder_of(layout))
    return coder.quantize_codes(to_coded(x.float(), layout, calibrated, first), layout, calibrated)


def dequantize_pages(
    codes: Tensor,
    params: Tensor,
    layout: Layout,
    calibrated: Calibrated = UNCALIBRATED,
    first: int = 0,
) -> Tensor:
    """Return the pages ``[..., N, D]`` (fp32) that codes and parameters of `quantize_pages` stand for."""
    return from_coded(coded_values(codes, params, layout, calibrated), layout, calibrated, first)


def coded_values(
    codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated = UNCALIBRATED
) -> Tensor:
    """Dequantize codes to elements ``[..., N, D]`` (fp32), before `tables.from_coded`."""
    coder = cast(CodeCoder, coder_of(layout))
    return coder.coded_values(codes, params, layout, calibrated)


def quantize_packed(
    x: Tensor,
    layout: Layout,
    calibrated: Calibrated = UNCALIBRATED,
    first: int = 0,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize whole pages ``[B, H, P, N, D]`` and pack them: the parts ``codes`` and ``params``.

    ``importance``, ``[B, H, P, N]``, has the importance scores by which attentive layouts distribute bits.
    """
    coded = to_coded(x.float(), layout, calibrated, first)
    return coder_of(layout).quantize_coded(coded, layout, calibrated, first, importance)


def unpacked_values(
    codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated = UNCALIBRATED
) -> Tensor:
    """Return the elements ``[..., N, D]`` (fp32) of packed pages, before `tables.from_coded`."""
    return coder_of(layout).packed_values(codes, params, layout, calibrated)


def dequantize_packed(
    codes: Tensor,
    params: Tensor,
    layout: Layout,
    calibrated: Calibrated = UNCALIBRATED,
    page: int = 0,
) -> Tensor:
    """Dequantize packed pages ``[B, H, P, ...]`` from index ``page`` on to tokens ``[B, H, P * N, D]`` (fp32)."""
    first = layout.sinks + page * layout.page_size
    coded = unpacked_values(codes, params, layout, calibrated)
    return from_coded(coded, layout, calibrated, first).flatten(-3, -2)
