"""Find buffers that a call fills first and rolls once they are full, by a condition on the device.

``where(position >= S, keys.roll(-1, 2), keys)`` with a token put at ``min(position, S - 1)``; an index that is shifted
by ``(position >= S).int()``: the graph is the same for every step. What is written in place is evaluated as writes are
(`in_place`), at positions within the buffer and behind its end. The buffer slides if it then holds the last S tokens of
those before the position and the new ones every time, bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvq_compile.lowering.find.in_place import InPlaceTrial, candidates
from kvq_compile.lowering.find.trial import CANNOT_BE_RUN, random_like, size_of_trial
from kvq_compile.lowering.find.updates import positions_among
from kvq_compile.lowering.nodes import root_of, shape_of, value_of

_TRIALS = 8  # assignments of sizes, of which some leave no room for the tokens


@dataclass(frozen=True)
class SlidingBuffer:
    """A buffer of S slots that keeps the last tokens, of which it holds ``min(position, S)`` before a call.

    Attributes:
        new: The call's tokens, ``[B, H, T, D]``.
        position: Their positions, not bounded by S: a node of T integers of any shape.
        steps: The nodes that write them, in order.
    """

    new: fx.Node
    position: fx.Node
    steps: tuple[fx.Node, ...]


def find_sliding(buffer: fx.Node, writers: list[fx.Node]) -> SlidingBuffer | None:
    """Return what all ``writers`` of a buffer amount to, if they fill it and then roll it."""
    for new in candidates(buffer, writers):
        for position in positions_among(writers, buffer, new):
            found = slides_at(buffer, writers, new, position)
            if found is not None:
                return found
    return None


def slides_at(
    buffer: fx.Node, writers: list[fx.Node], new: fx.Node, position: fx.Node
) -> SlidingBuffer | None:
    """Return the same for the tokens ``new`` at ``position``."""
    views = [node for node in buffer.graph.nodes if node is buffer or root_of(node) is buffer]
    trial = _SlidingTrial(buffer, new, position, writers, views)
    return SlidingBuffer(new, position, tuple(trial.steps)) if trial.slides() else None


class _SlidingTrial(InPlaceTrial):
    """The writes into a buffer, and what they are computed by from its tokens, the new ones and their positions."""

    def slides(self) -> bool:
        """Return whether evaluation bears it out."""
        if not self.collect():
            return False
        borne_out = False
        for assigned in self.assignments(_TRIALS, far=False):
            sizes = self._with_a_position_a_token(assigned)
            slots, tokens = (
                size_of_trial(shape_of(node)[2], sizes)  # type: ignore[index]
                for node in (self._past, self._new)
            )
            if tokens >= slots:
                continue
            last = slots - tokens
            for first in (slots, 0, last // 2, last, last + 1, slots - 1, slots + 1, 3 * slots):
                try:
                    if not self._keeps_the_last(sizes, first):
                        return False
                except CANNOT_BE_RUN:
                    if not sizes:
                        return False
                    break  # these sizes leave no room
                borne_out = True
        return borne_out

    def _keeps_the_last(self, sizes: Mapping[Any, int], first: int) -> bool:
        past, new = (random_like(value_of(node), sizes) for node in (self._past, self._new))
        assert self._position is not None
        like = value_of(self._position)
        places = torch.arange(first, first + new.shape[2], dtype=like.dtype, device="cpu")
        shape = [size_of_trial(size, sizes) for size in like.shape]
        given = {self._past: past.clone(), self._new: new, self._position: places.reshape(shape)}
        result = self.run(sizes, given)
        slots = past.shape[2]
        whole = torch.cat([past[:, :, :first], new], 2)
        expected = torch.cat([whole, past[:, :, whole.shape[2] :]], 2)[:, :, -slots:]
        return result.dtype == past.dtype and torch.equal(result, expected)
