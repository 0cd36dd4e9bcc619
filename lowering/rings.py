"""What a call does to the rings among its arguments, beside the graph: it checks them, and makes room in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvq_compile.kernels.cache import ring
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.sizes import Size

NOT_FULL = "a buffer that keeps the last tokens is rolled before it is full"
OTHER_LENGTH = (
    "a buffer that keeps the last tokens is written behind another number of tokens than it holds"
)
BY_ROW = "the last of its tokens are kept, and its rows have lengths of their own"


@dataclass(frozen=True)
class RingWrite:
    """One write into a quantized ring, or into a static cache that becomes one.

    Attributes:
        argument: Its place among the arguments.
        tokens: How many tokens are written.
        held: How many of its slots come before them; ``None`` for all.
        overwrites: Whether the tokens are so many that nothing else is kept.
        slides: Whether ``None`` stands for as many as the cache holds, which `SlotCheck` looks at.
    """

    argument: int
    tokens: Size
    held: Size | None
    overwrites: bool
    slides: bool = False

    def reason(self, args: Sequence[Any]) -> str | None:
        """Return why a cache cannot take the write; ``None`` if it can."""
        cache = args[self.argument]
        if not isinstance(cache, QuantizedKV) or self.slides:
            return None
        if cache.by_row:
            return BY_ROW
        count, slots = ring.count(cache), cache.shape[2]
        if self.held is None:
            return None if count >= slots else NOT_FULL
        held = self.held(args)
        return None if held == 0 or held <= count <= slots else OTHER_LENGTH

    def claim(self, args: Sequence[Any]) -> None:
        """Make room for the tokens."""
        if not self.overwrites:
            ring.claim_ring(args[self.argument], self.tokens(args))

    def note(self, args: Sequence[Any]) -> None:
        """Note how many tokens the cache holds once they are written."""
        cache = args[self.argument]
        if self.overwrites:
            cache._lineage.counted = cache.shape[2]
        else:
            held = ring.count(cache) if self.held is None else self.held(args)
            cache._lineage.counted = held + self.tokens(args)
