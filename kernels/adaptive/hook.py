"""`before_append`: update the packed pages of an adaptive layout. The only entry point of this folder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvq_compile.kernels.adaptive.originals import keep_, renew_
from kvq_compile.kernels.adaptive.requantize import requantize_older_
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Packed, paged


def before_append(
    cache: Packed,
    originals: Sequence[Tensor],
    x: Tensor,
    position: Tensor | None,
    start: int | None,
    layout: Layout,
    importance: Tensor | None,
) -> None:
    """Redistribute the bits of older pages by current attention, and copy tokens about to be packed to the host.

    Runs once per call, before its tokens are appended; the pages that the call completes use the same importance
    scores.

    Args:
        cache: The parts before the call, changed in place.
        originals: Exact copies of its packed tokens, if the layout keeps them; else empty.
        x: New tokens, ``[B, H, T, D]``.
        position: Their slots, consecutive; or ``None``.
        start: The first slot; or ``None``.
        layout: The cache's layout.
        importance: Importance score of each slot, ``[B, H, >= start + T]``, or ``None``.
    """
    codes, params, exact, cursor, *copies = paged([*cache, *originals], layout)
    tokens = x.shape[2]
    if copies and tokens:
        if start is None:
            assert position is not None
            start = int(position[0])
        renew_(codes, params, cursor, copies[0], start, tokens, layout, importance)
        keep_(copies[0], exact, cursor, x, start, layout)
    if not layout.requantize:
        return
    if codes.is_cuda:
        from kvq_compile.kernels.triton import adaptive

        adaptive.requantize_older_(cache, position, start, tokens, layout, importance)
        return
    if start is None:
        assert position is not None
        start = int(position[0])
    requantize_older_(codes, params, cursor, start, tokens, layout, importance)
