"""What stands for the lengths of growing caches in a graph that `fix_lengths` has rewritten.

A length differs at every step, so that a graph which takes it as a number is another graph at every step to whoever
records it. `fix_lengths` splits its uses. *Values* (positions, comparisons, the place of a write) come from ``held``, a
tensor on the device. *Sizes* (columns of masks, room for a write) follow from a number that may be any bound of the
length for which the caches have room: it stays the same until they grow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from kvq_compile.lowering.sizes import Size

ALIGNED = 2  # int64 a row of ``held``: kernels are compiled anew for an address that is not a multiple of 16 bytes


@dataclass(frozen=True)
class Slots:
    """A number, or a size of a tensor, that counts cache positions: those of a length, or those behind the call.

    Attributes:
        row: Whose length: its row of ``held``.
        behind: Whether it counts the call's own tokens too.
    """

    row: int
    behind: bool

    def of(self, lengths: Sequence[int], tokens: int) -> int:
        """Return the number for given lengths."""
        return lengths[self.row] + tokens if self.behind else lengths[self.row]


@dataclass(frozen=True)
class Lengths:
    """The lengths of the growing caches among the arguments of a call. Without any it is empty.

    Attributes:
        tokens: How many tokens a call brings.
        caches: Places of the caches of each length, a row each: those that have one symbol.
        numbers: Arguments that are such numbers, by place.
        padded: Tensors with an axis of cache positions, by place: the axis and its size.
        device: Where the caches are.
    """

    tokens: Size
    caches: tuple[tuple[int, ...], ...] = ()
    numbers: Mapping[int, Slots] = field(default_factory=dict)
    padded: Mapping[int, tuple[int, Slots]] = field(default_factory=dict)
    device: torch.device | None = None

    def read(self, args: Sequence[Any]) -> list[Any]:
        """Return the lengths of a call."""
        return [args[row[0]].shape[2] for row in self.caches]

    def row_of(self, place: int) -> int:
        """Return the row of a cache."""
        return next(row for row, places in enumerate(self.caches) if place in places)

    def bounds(self, args: Sequence[Any], lengths: Sequence[int]) -> list[int]:
        """Return bounds of the lengths, for which all caches have room.

        Caches of equal length get one bound, so that a mask is wide enough for all of them.
        """
        tokens = self.tokens(args)
        least: dict[int, int] = {}
        for length, row in zip(lengths, self.caches, strict=True):
            room = min([args[place].room() for place in row])
            least[length] = min(least.get(length, room), room)
        return [least[length] - tokens for length in lengths]

    def held(self, args: Sequence[Any]) -> list[Tensor]:
        """Return ``held`` as a list: empty where there are no lengths."""
        if not self.caches:
            return []
        lengths = self.read(args)
        mode = detect_fake_mode(args)
        if mode is not None:
            with mode:
                shape = len(lengths), ALIGNED
                return [torch.empty(shape, dtype=torch.int64, device=self.device)]
        made = torch.empty(len(lengths), ALIGNED, dtype=torch.int64, device=self.device)
        self.fill(made, lengths)
        return [made]

    @staticmethod
    def fill(held: Tensor, lengths: Sequence[int]) -> None:
        """Write lengths into ``held``; one launch where they are equal, as nearly always."""
        if len(set(lengths)) == 1:
            held.fill_(lengths[0])
        else:
            held.copy_(torch.tensor(lengths, dtype=held.dtype, device="cpu")[:, None])
