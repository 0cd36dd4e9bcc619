"""Where the axes of caches ``[B, H, S, D]`` lie in a tensor that a model keeps in another layout.

``BSHD`` and ``SBHD`` are permutations; ``BHDS`` holds the keys transposed; ``BSD`` has one head. An axis that numbers
several caches, as in ``[2, B, H, S, D]`` of keys and values or ``[L, 2, B, S, H, D]`` of all layers, is a *piece* axis:
``PBHSD``, ``PPBSHD``. Axes that are one in the tensor are in parentheses: ``BS(HD)`` is ``[B, S, H * D]``, ``BHS(PD)``
is ``[B, H, S, 2 * D]`` of keys and values side by side. ``FSD`` has its heads folded into the batch, ``[B * H, S, D]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
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
            ``P`` for a piece axis; those in parentheses are one axis of the tensor.
        sizes: Sizes of the piece axes.
        heads: Heads in an axis that they share with others, else 0.
    """

    axes: str
    sizes: tuple[int, ...] = ()
    heads: int = 0

    def __post_init__(self) -> None:
        own = sorted(self._letters.replace(PIECE, ""))
        if own not in (sorted(kind) for kind in ("BHSD", "BSD")):
            raise ValueError(
                f"axes must be B, S, D and perhaps H, or F, S and D, each once, got {self.axes}"
            )
        if len(self.sizes) != self.axes.count(PIECE):
            raise ValueError(
                f"sizes must be those of the piece axes of {self.axes}, got {self.sizes}"
            )
        if any("H" in group and len(group) > 1 for group in self.groups) != (self.heads > 0):
            raise ValueError(f"heads must be told where they share an axis, got {self.heads}")

    @property
    def groups(self) -> tuple[str, ...]:
        """The letters of each axis of the tensor."""
        found = re.findall(r"\((\w+)\)|(\w)", self.axes.replace(FOLDED, "(BH)"))
        return tuple(group or letter for group, letter in found)

    @property
    def _letters(self) -> str:
        return "".join(self.groups)

    @property
    def is_joined(self) -> bool:
        """Whether heads or pieces share an axis with something else than the batch."""
        return "(" in self.axes

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
        axes = re.sub(r"\((\w)\)", r"\1", self.axes.replace(PIECE, ""))
        return Arrangement(axes, (), self.heads)

    def axis(self, name: str) -> int:
        """Return the axis of the tensor in which axis ``name`` of its caches is."""
        return next(at for at, group in enumerate(self.groups) if name in group)

    @property
    def order(self) -> tuple[int, ...]:
        """The letters, apart, in the order piece axes, ``B``, ``H`` if it is there, ``S``, ``D``."""
        letters = self._letters
        numbered = [at for at, name in enumerate(letters) if name == PIECE]
        return (*numbered, *(letters.index(name) for name in AXES if name in letters))

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
        return tuple(
            prod(next(sizes) if name == PIECE else of[name] for name in group)
            for group in self.groups
        )

    def _joined(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield the axes of the tensor that are several, the last first, and the sizes of these, -1 where unknown."""
        sizes = list(self.sizes)
        for at in reversed(range(len(self.groups))):
            group = self.groups[at]
            given = {"H": self.heads}
            found = [
                sizes.pop() if name == PIECE else given.get(name, -1) for name in reversed(group)
            ]
            if len(group) > 1:
                yield at, tuple(reversed(found))

    def to_caches(self) -> list[tuple[Any, ...]]:
        """Return the steps, a method's name and its arguments each, from the tensor to its caches."""
        steps: list[tuple[Any, ...]] = [("unflatten", *about) for about in self._joined()]
        if self.order != tuple(range(len(self.order))):
            steps.append(("permute", self.order))
        if len(self.sizes) > 1:
            steps.append(("flatten", 0, len(self.sizes) - 1))
        if "H" not in self._letters:
            steps.append(("unsqueeze", -3))
        if self.sizes:
            steps.append(("unbind", 0))
        return steps

    def from_caches(self) -> list[tuple[Any, ...]]:
        """Return the steps from one cache, or from several stacked along a first axis, to the tensor."""
        steps: list[tuple[Any, ...]] = []
        if "H" not in self._letters:
            steps.append(("squeeze", -3))
        if len(self.sizes) > 1:
            steps.append(("unflatten", 0, self.sizes))
        order = self.order
        if order != tuple(range(len(order))):
            steps.append(("permute", tuple(order.index(at) for at in range(len(order)))))
        steps += [("flatten", at, at + len(sizes) - 1) for at, sizes in reversed([*self._joined()])]
        return steps

    def __str__(self) -> str:
        sizes = iter(self.sizes)
        told = {"H": str(self.heads)} if self.heads else {}
        names = (
            "*".join(str(next(sizes)) if name == PIECE else told.get(name, name) for name in group)
            for group in self.groups
        )
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
