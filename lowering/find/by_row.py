"""Tell writes that put each sequence's tokens at positions of its own, as continuous batching does.

A quantized cache cannot take them (`docs/decisions.md` says what would). They are found by evaluation, so that every
spelling of them gets this reason.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.in_place import InPlaceTrial, candidates
from kvq_compile.lowering.find.trial import CANNOT_BE_RUN, data_of, random_like, writers_of
from kvq_compile.lowering.nodes import root_of, shape_of, value_of

_REACH = 64  # nodes looked at behind the writes


def is_written_by_row(buffer: fx.Node) -> bool:
    """Return whether a call writes a buffer ``[B, H, S, D]`` at ``[B, T]`` positions, and does nothing else to it."""
    writers = writers_of(buffer.graph).get(buffer, [])
    sizes = shape_of(buffer) or ()
    if not writers or len(sizes) != 4 or not all(isinstance(size, int) for size in sizes):
        return False
    views = [node for node in buffer.graph.nodes if node is buffer or root_of(node) is buffer]
    return any(
        _ByRow(buffer, new, position, writers, views).is_borne_out()
        for new in candidates(buffer, writers)
        for position in _positions(writers, new)
    )


def _positions(writers: list[fx.Node], new: fx.Node) -> list[fx.Node]:
    """Return what may be the positions of all rows: integers, as many as there are tokens in the batch."""
    rows, _, tokens, _ = shape_of(new) or ()
    if rows == 1 or not isinstance(tokens, int):
        return []
    seen: set[fx.Node] = set()
    front, found = [*writers], []
    while front and len(seen) < _REACH:
        node = front.pop(0)
        if node in seen:
            continue
        seen.add(node)
        value = value_of(node)
        integers = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
        if integers and value.numel() == rows * tokens:
            found.append(node)
        front.extend(data_of(node))
    return found


class _ByRow(InPlaceTrial):
    """The writes into a buffer, at positions that differ from row to row."""

    def is_borne_out(self) -> bool:
        """Return whether each row's tokens are at its own positions then, and all else is as it was."""
        assert self._position is not None
        if not self.collect():
            return False
        past, new = (random_like(value_of(node), {}) for node in (self._past, self._new))
        rows, tokens, slots = past.shape[0], new.shape[2], past.shape[2]
        like, expected = value_of(self._position), past.clone()
        first = torch.arange(rows, dtype=torch.int64, device="cpu") * 3 % (slots - tokens + 1)
        places = first[:, None] + torch.arange(tokens, dtype=torch.int64, device="cpu")
        for row in range(rows):
            expected[row].index_copy_(1, places[row], new[row])
        given = {self._past: past, self._new: new, self._position: places.to(like.dtype)}
        given[self._position] = given[self._position].reshape(like.shape)
        try:
            return torch.equal(self.run({}, given), expected)
        except CANNOT_BE_RUN:
            return False
