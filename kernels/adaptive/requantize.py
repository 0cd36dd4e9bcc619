"""Drop bits of packed tokens that their target no longer needs, in plain torch: the specification.

When a mixed page with a target (`Adaptive`) is quantized, its tokens get the bits that the target needs under
current attention. When a later call completes pages, the importance scores of all slots are computed again, and every
older page keeps only the bit planes that the target needs now. The budget plays no part: bits dropped from one token
are not given to another. Codes are embedded, so dropping planes gives the codes of a quantizer with fewer bits. The
range of a token is ``2 * half_range`` from its metadata, since the exact elements are gone.

Source: QAQ (arXiv 2403.04643), section 4.2, step 4 of its decoding loop.
"""

from __future__ import annotations

from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.reference import mixed

PAGES = 256  # requantized at once


def requantize_older_(
    codes: Tensor,
    params: Tensor,
    cursor: Tensor,
    start: int,
    tokens: int,
    layout: Layout,
    importance: Tensor | None,
) -> None:
    """Drop bit planes of the pages that a call keeps, if it completes others; in place, before it appends.

    Args:
        codes, params, cursor: Parts of the cache before the call.
        start: Slot of the call's first token.
        tokens: Tokens of the call.
        layout: The cache's layout; nothing is done unless it says ``requantize``.
        importance: Importance score of each slot, ``[B, H, >= start + tokens]``. If it is ``None`` and the layout
            distributes bits by attention, nothing is done.
    """
    if not layout.requantize or (layout.attentive and importance is None):
        return
    old, new = pages_before_and_after(cursor, start, tokens, layout)
    if new == old:
        return
    bound = layout.bound_at(layout.sinks + new * layout.page_size)
    needed = mixed.needed_bits(*weighed_span(params[:, :, :old], layout, importance), layout, bound)
    held = mixed.held_bits(codes[:, :, :old], params[:, :, :old], layout)
    for where in (needed < held).any(-1).nonzero().split(PAGES):
        at = tuple(where.unbind(-1))
        page_codes, page_params = codes[at], params[at]
        mixed.requantize_down_(page_codes, page_params, needed[at], layout)
        codes[at], params[at] = page_codes, page_params


def pages_before_and_after(
    cursor: Tensor, start: int, tokens: int, layout: Layout
) -> tuple[int, int]:
    """Return the pages that a call keeps after truncation, and the pages after the call."""
    held, old = cursor.tolist()
    if start < held:
        old = min(old, max(0, start - layout.sinks) // layout.page_size)
    return old, max(old, layout.pages_at(start + tokens))


def weighed_span(
    params: Tensor, layout: Layout, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return range and importance score, ``[B, H, P, N]``, of the tokens of the first ``P`` pages of a cache.

    Args:
        params: Their metadata.
        layout: The cache's layout.
        importance: See `requantize_older_`; the result is ``None`` if the layout does not use it.
    """
    span = mixed.stored_span(params, layout)
    if importance is None or not layout.attentive:
        return span, None
    first, last = layout.sinks, layout.sinks + params.shape[2] * layout.page_size
    return span, importance[:, :, first:last].unflatten(2, (-1, layout.page_size))
