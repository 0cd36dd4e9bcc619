"""Which profile runs: the quick one of `make test`, or that of `make test-thorough`, which takes hours."""

from collections.abc import Iterable
from typing import Any

from hypothesis import settings

THOROUGH = settings.default.max_examples >= 500


def few(count: int) -> int:
    """Return how many examples to draw where each compiles something: so many, or 200 in the thorough profile."""
    return 200 if THOROUGH else count


def spread(first: Iterable[Any], second: Iterable[Any], every: int) -> list[tuple[Any, Any]]:
    """Return all pairs; in the quick profile one of ``every``, each of either as often as the others."""
    return [
        (one, other)
        for place, one in enumerate(first)
        for number, other in enumerate(second)
        if THOROUGH or (place + number) % every == 0
    ]
