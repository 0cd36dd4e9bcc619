"""Transform tokens before quantization: reorder channels, inverse-rotate keys, normalise by mean and scale."""

from __future__ import annotations

from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.reference.channelwise import rotated_mean
from kvq_compile.kernels.reference.rope import cos_sin_table, inverse_rotate_pairs, rotate_pairs
from kvq_compile.kernels.transform import rotate


def to_coded(x: Tensor, layout: Layout, calibrated: Calibrated, first: int) -> Tensor:
    """Return pages ``[B, H, P, N, D]`` (fp32) of tokens from slot ``first`` on, transformed for quantization."""
    if calibrated.tables is None:
        return rotate(x, layout)
    x = _gather(x, calibrated.section("order", layout))
    if layout.rotary:
        x = inverse_rotate_pairs(x, *cos_sin_table(calibrated, layout, first, x.shape[-3]))
    y = (x - _spread(calibrated.section("mean", layout))) * _spread(
        calibrated.section("inverse", layout)
    )
    if layout.takes_mean:
        page = (first - layout.sinks) // layout.page_size
        y = y - rotated_mean(page, y.shape[-3], layout, calibrated)
    return rotate(y, layout)


def from_coded(y: Tensor, layout: Layout, calibrated: Calibrated, first: int) -> Tensor:
    """Invert `to_coded`."""
    y = rotate(y, layout)
    if calibrated.tables is None:
        return y
    if layout.takes_mean:
        page = (first - layout.sinks) // layout.page_size
        y = y + rotated_mean(page, y.shape[-3], layout, calibrated)
    x = y * _spread(calibrated.section("scale", layout)) + _spread(
        calibrated.section("mean", layout)
    )
    if layout.rotary:
        x = rotate_pairs(x, *cos_sin_table(calibrated, layout, first, x.shape[-3]))
    return _gather(x, calibrated.section("order", layout).argsort(-1))


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """Pick channels ``order`` ``[H, D]`` of ``x`` ``[B, H, P, N, D]``."""
    return x.gather(-1, _spread(order.long()).expand(x.shape))


def _spread(table: Tensor) -> Tensor:
    """View ``[H, D]`` so that it broadcasts to ``[B, H, P, N, D]``."""
    return table[None, :, None, None, :]
