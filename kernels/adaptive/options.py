"""What a user may ask of pages after they are packed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvq_compile.kernels.values import Interned, changed_fields, check, check_flags


@dataclass(frozen=True, repr=False)
class Adaptive(metaclass=Interned):
    """What QAQ does to mixed pages beyond distributing a budget; `kernels.adaptive` does it.

    Args:
        target: Error that is good enough: the standard deviation of an attention weight (keys) or of the output
            (values). Pages use no more of their budget than it takes. 0: all bits are used.
        query_norm: Squared norm of a query that few exceed, which a target of keys needs.
        requantize: Whether tokens of packed pages lose bits that their target needs no more as attention moves on.
        keep_exact: Whether host memory holds packed tokens exactly, for them to gain bits when attention returns.

    Raises:
        ValueError: A number is out of its range, or ``requantize`` has no target.
    """

    target: float = 0.0
    query_norm: float = 0.0
    requantize: bool = False
    keep_exact: bool = False

    def __post_init__(self) -> None:
        check_flags(requantize=self.requantize, keep_exact=self.keep_exact)
        check(
            0 <= self.target < math.inf and 0 <= self.query_norm < math.inf,
            "target and query_norm must be finite numbers of 0 or more, "
            f"got {self.target} and {self.query_norm}",
        )
        check(
            not self.requantize or self.target > 0, "requantize must go with a target: give target"
        )

    __repr__ = changed_fields
