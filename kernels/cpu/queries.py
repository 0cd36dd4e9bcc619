"""The ring of recent queries in a key cache, after the rows of tokens, for layouts whose bits depend on attention.

With ``G`` queries per KV head, row ``slot % n * G + g`` holds the query of head ``g`` for the token in ``slot``. Zeros
mark an unknown query. `reference.queries` gives the reasons.
"""

from __future__ import annotations

from torch import Tensor

from kvq_compile.kernels.layout import Layout


def ring_of(exact: Tensor, layout: Layout) -> Tensor:
    """View the rows of queries of ``exact`` as ``[B, H, n, G, D]``."""
    return layout.queries_of(exact).unflatten(2, (layout.queries, layout.shared_by))


def remember_(
    exact: Tensor, query: Tensor | None, held: int, start: int, tokens: int, layout: Layout
) -> None:
    """Write the queries of the last new tokens, and zeros for those of dropped tokens, in place.

    Args:
        exact: Part of a cache of keys; nothing is done unless its layout holds queries.
        query: Queries of the last of the new tokens, ``[B, Hq, T, D]``; ``None``: unknown.
        held: Tokens held before the call.
        start: Slot of the call's first token, at most ``held``.
        tokens: New tokens.
        layout: Layout of the keys.
    """
    if not layout.queries:
        return
    ring, end = ring_of(exact, layout), start + tokens
    told = 0 if query is None else min(query.shape[2], tokens, layout.queries)
    for slot in range(end - layout.queries, end - told):
        # Older queries stay, unless a dropped token has overwritten their row.
        if slot >= start or slot + layout.queries < held:
            ring[:, :, slot % layout.queries] = 0.0
    for slot in range(end - told, end):
        assert query is not None
        asked = query[:, :, slot - end].to(exact.dtype)
        ring[:, :, slot % layout.queries] = asked.unflatten(1, (exact.shape[1], -1))


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
    rows = [slot % layout.queries for slot in range(first, last)]
    return ring_of(exact, layout)[:, :, rows], first
