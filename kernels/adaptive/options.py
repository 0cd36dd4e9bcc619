"""`Adaptive`: options for pages after they are packed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvq_compile.kernels.values import Interned, changed_fields, check, check_flags


@dataclass(frozen=True, repr=False)
class Adaptive(metaclass=Interned):
    """Options of QAQ for mixed pages beyond the distribution of a budget, implemented in `kernels.adaptive`.

    Args:
        target: Tolerated error: standard deviation of an attention weight (keys) or of the output (values). A page
            uses only the bits that the target needs, up to its budget. 0: the whole budget.
        query_norm: High quantile of the squared norms of queries; a target for keys needs it.
        requantize: Whether packed tokens drop bits that the target no longer needs when attention moves away.
        keep_exact: Whether host memory holds exact copies of packed tokens, from which they regain bits when
            attention returns.

    Raises:
        ValueError: A value is out of its range, or ``requantize`` is set without a target.
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
