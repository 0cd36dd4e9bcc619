"""Where the axes of caches ``[B, H, S, D]`` lie in a tensor that a model keeps in another layout.

``BSHD`` and ``SBHD`` are permutations; ``BHDS`` holds the keys transposed; ``BSD`` has one head. ``FSD`` has its heads
folded into the batch, ``[B * H, S, D]``. An axis that numbers several caches, as in ``[2, B, H, S, D]`` of keys and
values or ``[L, 2, B, S, H, D]`` of all layers, is a *piece* axis: ``PBHSD``, ``PPBSHD``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

AXES = "BHSD"
PIECE = "P"  # an axis that numbers several caches
FOLDED = "F"  # batch and heads in one axis
T = TypeVar("T")


@dataclass(frozen=True)
class Arrangement:
    """The axes of a tensor, in its own order.

    Attributes:
        axes: One letter an axis: ``B``, ``H``, ``S``, ``D``, or ``F`` for batch and heads in one, each at most once, or
            ``P`` for a piece axis.
        sizes: Sizes of the piece axes.
        heads: Heads in an axis ``F``, else 0.
    """

    axes: str
    sizes: tuple[int, ...] = ()
    heads: int = 0

    def __post_init__(self) -> None:
        own = sorted(self.axes.replace(PIECE, ""))
        if own not in (sorted(kind) for kind in ("BHSD", "BSD", "FSD")):
            raise ValueError(
                f"axes must be B, S, D and perhaps H, or F, S and D, each once, got {self.axes}"
            )
        if len(self.sizes) != self.axes.count(PIECE):
            raise ValueError(
                f"sizes must be those of the piece axes of {self.axes}, got {self.sizes}"
            )
        if (FOLDED in self.axes) != (self.heads > 0):
            raise ValueError(f"heads must be told of an axis F and no other, got {self.heads}")

    @property
    def pieces(self) -> int:
        """How many caches the tensor holds."""
        return prod(self.sizes)

    @property
    def is_plain(self) -> bool:
        """Whether a tensor is ``[B, H, S, D]`` itself."""
        return self.axes == AXES

    def of_one(self) -> Arrangement:
        """Return the arrangement of one piece."""
        return Arrangement(self.axes.replace(PIECE, ""), (), self.heads)

    def axis(self, name: str) -> int:
        """Return the axis of the tensor that is axis ``name`` of its caches; of ``B`` it may hold the heads, too."""
        return self.axes.index(FOLDED if name == "B" and self.heads else name)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the tensor in the order piece axes, ``B`` or ``F``, ``H`` if it is there, ``S``, ``D``."""
        numbered = [at for at, name in enumerate(self.axes) if name == PIECE]
        return (*numbered, *(self.axes.index(name) for name in FOLDED + AXES if name in self.axes))

    def split(self, x: Tensor) -> list[Tensor]:
        """Return the caches ``[B, H, S, D]`` of a tensor, as views of it."""
        return walk(x, self.to_caches(), _apply)

    def join(self, caches: Sequence[Tensor]) -> Tensor:
        """Return the tensor of some caches: of one a view, of several a copy."""
        x = caches[0] if not self.sizes else torch.stack(list(caches))
        return walk(x, self.from_caches(), _apply)[0]

    def shape(self, cache: Sequence[Any]) -> tuple[Any, ...]:
        """Return the shape of a tensor whose caches have the shape ``cache``."""
        sizes, of = iter(self.sizes), dict(zip(AXES, cache, strict=True))
        of[FOLDED] = of["B"] * of["H"]
        return tuple(next(sizes) if name == PIECE else of[name] for name in self.axes)

    def to_caches(self) -> list[tuple[Any, ...]]:
        """Return the steps, a method's name and its arguments each, from the tensor to its caches."""
        steps: list[tuple[Any, ...]] = []
        if self.order != tuple(range(len(self.axes))):
            steps.append(("permute", self.order))
        if len(self.sizes) > 1:
            steps.append(("flatten", 0, len(self.sizes) - 1))
        if self.heads:
            steps.append(("unflatten", -3, (-1, self.heads)))
        elif "H" not in self.axes:
            steps.append(("unsqueeze", -3))
        if self.sizes:
            steps.append(("unbind", 0))
        return steps

    def from_caches(self) -> list[tuple[Any, ...]]:
        """Return the steps from one cache, or from several stacked along a first axis, to the tensor."""
        steps: list[tuple[Any, ...]] = []
        if self.heads:
            steps.append(("flatten", -4, -3))
        elif "H" not in self.axes:
            steps.append(("squeeze", -3))
        if len(self.sizes) > 1:
            steps.append(("unflatten", 0, self.sizes))
        order = self.order
        if order != tuple(range(len(self.axes))):
            steps.append(("permute", tuple(order.index(at) for at in range(len(order)))))
        return steps

    def __str__(self) -> str:
        sizes = iter(self.sizes)
        told = {FOLDED: f"B*{self.heads}"}
        names = (str(next(sizes)) if name == PIECE else told.get(name, name) for name in self.axes)
        return f"[{', '.join(names)}]"


def walk(
    x: T, steps: Sequence[tuple[Any, ...]], apply: Callable[[T, str, tuple[Any, ...]], Any]
) -> list[T]:
    """Take ``x`` along steps; return what the last of them gives, several where that is ``unbind``."""
    found: Any = x
    for name, *arguments in steps:
        found = apply(found, name, tuple(arguments))
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _apply(x: Tensor, name: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(x, name)(*arguments)
