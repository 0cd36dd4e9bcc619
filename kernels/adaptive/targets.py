"""Bounds of mixed pages with a target: the segment width at which the error meets the target."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

from kvq_compile.kernels.schemes import PAGE_SIZES

LONGEST = 31  # log2 of the slots of the longest cache


def key_bound(query_norm: float, target: float, tokens: int, head_dim: int) -> float:
    """Return the bound on keys at which attention weights have a standard deviation of ``target``.

    Args:
        query_norm: High quantile of the squared norms of queries.
        target: Standard deviation of an attention weight.
        tokens: Tokens that are attended to.
        head_dim: ``D``; attention divides scores by its square root, which the paper omits.

    Source: QAQ, section 4.1, ``sigma ** 2 = ln(T ** 3 / (T - 1) * target ** 2 + 1) / sum Q ** 2``.
    """
    variance = math.log(tokens**3 / (tokens - 1) * target**2 + 1) / (query_norm / head_dim)
    return 2 * math.sqrt(3 * variance)


def value_bound(target: float, tokens: int) -> float:
    """Return the bound on values at which outputs have a standard deviation of ``target``.

    Source: QAQ, section 4.1, ``sigma = target / (sqrt(T) A)``; `mixed.allocate` multiplies with ``A``.
    """
    return 2 * math.sqrt(3 / tokens) * target


@lru_cache(maxsize=256)
def target_bounds(role: str, target: float, query_norm: float, head_dim: int) -> tuple[float, ...]:
    """Return the bounds on keys or values of caches of ``2 ** 5`` slots, ``2 ** 6`` and so on, rounded to fp32.

    The bound of a page depends on its last slot, rounded up to a power of two. So it does not depend on how many
    tokens were written in the same call, and kernels find it in a table. Empty without a target.
    """
    if not target:
        return ()
    lengths = (1 << k for k in range(min(PAGE_SIZES).bit_length() - 1, LONGEST + 1))
    if role == "key":
        bounds = [key_bound(query_norm, target, tokens, head_dim) for tokens in lengths]
    else:
        bounds = [value_bound(target, tokens) for tokens in lengths]
    return tuple(ctypes.c_float(bound).value for bound in bounds)


def length_class(end: int) -> int:
    """Return the index in `target_bounds` of a page that ends before slot ``end``."""
    return (end - 1).bit_length() - (min(PAGE_SIZES).bit_length() - 1)
