"""Remember what became of every graph that was compiled, for `explain` and `report`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvq_compile.kernels.layout import CacheSpec
from kvq_compile.lowering.sites import SiteReport


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph: its attentions and what it was asked to quantize to."""

    sites: tuple[SiteReport, ...]
    spec: CacheSpec


_recent: deque[GraphReport] = deque(maxlen=256)


def record(report: GraphReport) -> None:
    """Remember a graph."""
    _recent.append(report)


def graphs() -> tuple[GraphReport, ...]:
    """Return the graphs compiled in this process, oldest first, at most the last 256."""
    return tuple(_recent)


@contextmanager
def watching() -> Iterator[list[GraphReport]]:
    """Collect the graphs that are compiled inside the block."""
    global _recent
    outer, _recent = _recent, deque(maxlen=256)
    collected: list[GraphReport] = []
    try:
        yield collected
    finally:
        collected.extend(_recent)
        outer.extend(_recent)
        _recent = outer
