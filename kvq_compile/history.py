"""Remember what became of every graph that was compiled, for `explain` and `report`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.lowering.find.layers import COUNTED
from kvq_compile.lowering.sites import DENSE, SiteReport, StateReport


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph: its attentions and what it was asked to quantize to.

    Attributes:
        sites: What became of each attention.
        spec: What caches are quantized to.
        layers: Layers of the model that the option ``layers`` names.
        states: What became of each cache that the graph grows or writes.
        steps: Whether calls are replayed from CUDA graphs, or why not; empty where the graph is no step on a GPU.
    """

    sites: tuple[SiteReport, ...]
    spec: CacheSpec
    layers: tuple[int, ...] = ()
    states: tuple[StateReport, ...] = ()
    steps: str = ""


_recent: deque[GraphReport] = deque(maxlen=256)


def record(report: GraphReport) -> None:
    """Remember a graph."""
    _recent.append(report)


def amend(report: GraphReport, steps: str) -> None:
    """Say otherwise of a graph that is remembered whether its calls are replayed."""
    for place, known in enumerate(_recent):
        if known is report:
            _recent[place] = replace(report, steps=steps)


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


_told: list[CacheSpec] = []


def unmet_layers(among: Sequence[GraphReport]) -> str:
    """Return a sentence on layers that the option ``layers`` names and no graph has met; empty if there are none.

    A spec that was told of once is not told of again: the graphs of a call that was mended stay in memory.
    """
    for graph in among:
        sites = [site for other in among if other.spec == graph.spec for site in other.sites]
        met = {site.layer for site in sites}
        missing = sorted(set(graph.layers) - met)
        if missing and met and graph.spec not in _told:
            _told.append(graph.spec)
            counted = f" ({COUNTED})" if any(site.where == COUNTED for site in sites) else ""
            return (
                f"layers must name layers of the model, got {', '.join(map(str, missing))}; "
                f"attentions were met in layers {min(met)} to {max(met)}{counted}"
            )
    return ""


def why_plain(layer: int) -> str:
    """Return the reason why the cache of a layer is in 16 bit, as far as the compiled graphs tell."""
    last = _last_site(layer)
    if last is not None and last.outcome == "left alone":
        return last.detail
    what = "has seen it" if last is None else "wrote it last"
    return f"no compiled graph {what} (recompile limit, torch.compiler.disable or a graph break?)"


def why_dense(layer: int) -> str | None:
    """Return the reason why the quantized cache of a layer is read as an ordinary tensor; ``None`` where it is not."""
    last = _last_site(layer)
    return last.detail if last is not None and last.outcome == DENSE else None


def _last_site(layer: int) -> SiteReport | None:
    sites = [site for graph in _recent for site in graph.sites if site.layer == layer]
    return sites[-1] if sites else None
