"""The last queries, which a cache of keys holds where bits depend on attention: the specification.

A page is quantized by the attention of the last ``n`` queries, and in decoding a call has one. So the exact part of
the keys ends in a ring of ``n * G`` rows, ``G`` being the query heads that share a KV head: row
``slot % n * G + g`` behind those of tokens is the query of head ``g`` for the token in ``slot``, in the dtype of the
keys and before any scale. The call that writes a key writes its query, too.

**A row of zeros says that nobody knows the query**: of tokens that were written outside an attention, and of those
whose row a token took that has been forgotten since. It pays no attention, where a query of zeros would pay the same
to all. So a row is always that of the last token held for it, or zeros, and truncation needs no memory of its own.

Source: QAQ (arXiv 2403.04643), section 4.2, the attention window.
"""

from __future__ import annotations

from torch import Tensor

from kvq_compile.kernels.layout import Layout


def remember_(
    exact: Tensor, query: Tensor | None, held: int, start: int, tokens: int, layout: Layout
) -> None:
    """Write the queries of the last new tokens to their rows, and zeros for what is known no more, in place.

    Args:
        exact: Part of a cache of keys; nothing is done unless its layout holds queries.
        query: Queries of the last of the new tokens, ``[B, Hq, T, D]``; ``None``: nobody knows them.
        held: Tokens held before the call.
        start: Slot of its first token, at most ``held``; what is held from there on is forgotten.
        tokens: New tokens.
        layout: Layout of the keys.
    """
    if not layout.queries:
        return
    end = start + tokens
    known = end if query is None else end - min(query.shape[2], tokens)
    rows = _ring(exact, layout)
    for slot in range(end - layout.queries, end):
        if slot >= known:
            assert query is not None
            asked = query[:, :, slot - end].to(exact.dtype)
            rows[:, :, slot % layout.queries] = asked.unflatten(1, (exact.shape[1], -1))
        elif slot >= start or slot + layout.queries < held:
            rows[:, :, slot % layout.queries] = 0.0


def recall(exact: Tensor, held: int, first: int, last: int, layout: Layout) -> tuple[Tensor, int]:
    """Return the queries of the slots before ``last`` and from ``first`` on, as far back as they are held.

    Args:
        exact: Part of a cache of keys.
        held: Tokens that it holds.
        first, last: Slots; ``last`` is at most ``held``.
        layout: Layout of the keys.

    Returns:
        Query rows ``[B, H, count, G, D]``, zeros where nobody knows the query, and the slot of the first.
    """
    first = max(first, 0, held - layout.queries)
    slots = [slot % layout.queries for slot in range(first, last)]
    return _ring(exact, layout)[:, :, slots], first


def _ring(exact: Tensor, layout: Layout) -> Tensor:
    """View the rows of queries as ``[B, H, n, G, D]``."""
    return exact[:, :, layout.token_rows :].unflatten(2, (layout.queries, layout.shared_by))
