"""Take bits from tokens that attention has moved away from, in plain torch: the specification.

A page of mixed bits was given the bits that met its target (`Adaptive`) under the attention of the
moment. When a later call completes pages, the importance of all slots is known anew; every older page then
keeps of each token the planes that the target needs now. (The budget has no say in it: where it was too small
for the target, taking bits from one token would give none to another.) Codes are embedded, so that dropping
planes is all there is to do, and what is left is what quantizing with fewer bits gives. The span of a token is
taken from its record, ``2 * reach``, since the numbers themselves are gone.

Source: QAQ (arXiv 2403.04643), section 4.2, step 4 of its decoding loop.
"""

from __future__ import annotations

from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.reference import mixed

PAGES = 256  # changed at once


def requantize_older_(
    codes: Tensor,
    params: Tensor,
    cursor: Tensor,
    start: int,
    tokens: int,
    layout: Layout,
    importance: Tensor | None,
) -> None:
    """Drop planes of the pages that a call keeps, if it completes others, in place and before it appends.

    Args:
        codes, params, cursor: Parts of the cache before the call.
        start: Slot of the call's first token.
        tokens: Tokens of the call.
        layout: The cache's layout; nothing is done unless it says ``requantize``.
        importance: Weight of each token's error by slot, ``[B, H, >= start + tokens]``. Nothing is done where
            the layout distributes bits by attention and there is none.
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
    """Return how many pages a call keeps, truncation done, and how many there are after it."""
    held, old = cursor.tolist()
    if start < held:
        old = min(old, max(0, start - layout.sinks) // layout.page_size)
    return old, max(old, layout.pages_at(start + tokens))


def weighed_span(
    params: Tensor, layout: Layout, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return span and importance ``[B, H, P, N]`` of the tokens of the first ``P`` pages of a cache.

    Args:
        params: Their records.
        layout: The cache's layout.
        importance: See `requantize_older_`; ``None`` also where the layout takes no notice of it.
    """
    span = mixed.stored_span(params, layout)
    if importance is None or not layout.attentive:
        return span, None
    first, last = layout.sinks, layout.sinks + params.shape[2] * layout.page_size
    return span, importance[:, :, first:last].unflatten(2, (-1, layout.page_size))
