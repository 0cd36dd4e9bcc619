"""`Score`: what an attention makes of products of queries and keys, and of its softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase

from kvq_compile.kernels.values import check

CAPS = (1e-30, 1e30)


class Bend(NamedTuple):
    """What happens to scores between their scale and the mask: see `Score`."""

    cap: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Score(OpaqueBase):
    """What is done to the product of a query and a key before the mask is added::

        score = min(max(cap * tanh(scale * product / cap), lowest), highest)

    With logits of sinks a row of the softmax has one logit more, which takes weight from the tokens and has no value:
    ``output = sum(exp(score) * value) / (sum(exp(score)) + exp(sink))``. They are learned for each head
    (gpt-oss), computed, or zero, which leaves one more in the denominator ("off by one").

    Args:
        scale: Factor on the product.
        cap: Soft cap; 0 for none.
        lowest, highest: What scores are clamped to; infinite for no bound.
        has_sinks: Whether the softmax has logits of sinks, which a call is given beside its constants.
        of_values: Whether values take part in the product, as latents do that are keys as well: a query then has the
            channels of a key, followed by those of a value.

    Raises:
        ValueError: The cap is not what fp32 has room for, or the bounds leave nothing between them.
    """

    scale: float
    cap: float = 0.0
    lowest: float = -math.inf
    highest: float = math.inf
    has_sinks: bool = False
    of_values: bool = False

    def __post_init__(self) -> None:
        check(
            self.cap == 0 or CAPS[0] <= self.cap <= CAPS[1],
            f"cap must be 0 or from {CAPS[0]} to {CAPS[1]}, got {self.cap}",
        )
        check(
            self.lowest <= self.highest,
            f"lowest must be at most highest, {self.highest}, got {self.lowest}",
        )

    @property
    def bend(self) -> Bend:
        """What happens to scores after they are scaled."""
        return Bend(self.cap, self.lowest, self.highest)

    @property
    def is_plain(self) -> bool:
        """Whether there is a scale and nothing else, as torch's attention has it."""
        return self.bend == UNBENT and not self.has_sinks and not self.of_values

    def times(self, factor: float) -> Score:
        """Return what makes ``factor`` times this score.

        Raises:
            ValueError: The factor is 0 or not finite.
        """
        check(factor != 0 and math.isfinite(factor), f"factor must be finite, not 0, got {factor}")
        lowest, highest = sorted((self.lowest * factor, self.highest * factor))
        scale, cap = self.scale * factor, self.cap * abs(factor)
        return replace(self, scale=scale, cap=cap, lowest=lowest, highest=highest)

    def tanh(self) -> Score:
        """Return what makes the hyperbolic tangent of this score.

        Raises:
            ValueError: The score is capped already.
        """
        check(self.cap == 0, f"cap must be 0 below another one, got {self.cap}")
        lowest, highest = (x if math.isinf(x) else math.tanh(x) for x in self.bend[1:])
        return replace(self, cap=1.0, lowest=lowest, highest=highest)

    def clamped(self, lowest: float, highest: float) -> Score:
        """Return what clamps this score; of two bounds that cross the second wins, as in `torch.clamp`."""
        low, high = (min(max(x, lowest), highest) for x in self.bend[1:])
        return replace(self, lowest=low, highest=high)

    def __repr__(self) -> str:
        given = {"cap": 0.0, "lowest": -math.inf, "highest": math.inf}
        given |= {"has_sinks": False, "of_values": False}
        told = [f", {n}={getattr(self, n)!r}" for n, x in given.items() if getattr(self, n) != x]
        return f"Score({self.scale!r}{''.join(told)})"

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        """Return the source text of the score in a graph, and the class that it names."""
        return repr(self), {"Score": Score}


UNBENT = Bend(0.0, -math.inf, math.inf)


def bend_(scores: Tensor, bend: Bend) -> Tensor:
    """Cap and clamp scaled products, in place; return them."""
    if bend.cap:
        scores.div_(bend.cap).tanh_().mul_(bend.cap)
    if bend[1:] != UNBENT[1:]:
        scores.clamp_(bend.lowest, bend.highest)
    return scores


register_opaque_type(Score, typ="value")
