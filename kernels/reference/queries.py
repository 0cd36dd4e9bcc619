"""The ring of recent queries in a key cache, for layouts whose bits depend on queries: the specification.

Importance scores are computed from the last ``n`` queries, but a decoding call has only one. The exact part of a key
cache therefore ends in a ring of ``n * G`` rows, with ``G`` queries per KV head. After the rows of tokens, row
``slot % n * G + g`` holds the query of head ``g`` for the token in ``slot``, in the dtype of the keys and before
scaling. The call that writes a key writes its query, too.

**A row of zeros marks an unknown query**: its token was written outside attention, or another token, truncated since,
took its row. Unknown queries do not count (a true query of zeros would attend to all keys alike). A row thus holds
the query of the last token that maps to it, or zeros, and truncation needs no further state.

Source: QAQ (arXiv 2403.04643), section 4.2, the attention window.
"""

from __future__ import annotations

from torch import Tensor

from kvq_compile.kernels.layout import Layout


def remember_(
    exact: Tensor, query: Tensor | None, held: int, start: int, tokens: int, layout: Layout
) -> None:
    """Write the queries of the last new tokens to their rows, and zeros for queries no longer known, in place.

    Args:
        exact: Part of a cache of keys; nothing is done unless its layout holds queries.
        query: Queries of the last of the new tokens, ``[B, Hq, T, D]``; ``None``: unknown.
        held: Tokens held before the call.
        start: Slot of its first token, at most ``held``; tokens from there on are dropped.
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
    """Return the queries of slots ``first .. last - 1``, as far back as the ring reaches.

    Args:
        exact: Part of a cache of keys.
        held: Tokens that it holds.
        first, last: Slots; ``last`` is at most ``held``.
        layout: Layout of the keys.

    Returns:
        Queries ``[B, H, count, G, D]``, zeros where unknown, and the slot of the first.
    """
    first = max(first, 0, held - layout.queries)
    slots = [slot % layout.queries for slot in range(first, last)]
    return _ring(exact, layout)[:, :, slots], first


def _ring(exact: Tensor, layout: Layout) -> Tensor:
    """View the rows of queries as ``[B, H, n, G, D]``."""
    return layout.queries_of(exact).unflatten(2, (layout.queries, layout.shared_by))
