"""What is told of each attention: the one form from which text, JSON and the page of an explanation are made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from kvq_compile.advice import advice
from kvq_compile.bounds import error_bound
from kvq_compile.history import GraphReport
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.lowering.sites import Flow, SiteFacts, SiteReport, StateReport

NO_FACTS = SiteFacts()


@dataclass(frozen=True)
class AttentionLine:
    """What became of one attention.

    Attributes:
        layer: Number of its layer.
        node: Name of its output node.
        where: The module it runs in, or the cache it reads.
        source: ``file:line`` of the model that called it; empty where it is not known.
        stack: The lines of source behind it, the innermost last.
        outcome: ``"rewritten"``, ``"stored quantized, read dense"`` or ``"left alone"``.
        detail: What it became, or the reason why it was not rewritten.
        expected: Whether a reason is one that needs no warning.
        advice: What would make it work; empty where it was rewritten.
        facts: Heads, how the cache enters and leaves, bytes a token before and after.
        bound: Formula of the largest error of its output; ``None`` where nothing is packed.
        before, after: The graph around it, as captured and as rewritten.
    """

    layer: int
    node: str
    where: str
    source: str
    stack: tuple[str, ...]
    outcome: str
    detail: str
    expected: bool
    advice: str
    facts: SiteFacts
    bound: str | None
    before: Flow
    after: Flow

    @property
    def is_quantized(self) -> bool:
        """Whether its cache is stored quantized."""
        return self.outcome != "left alone"

    @property
    def heads(self) -> str:
        """Heads and their sizes in words: ``"32 query, 8 KV heads of 128"``; empty where nothing is known."""
        facts = self.facts
        if facts.query_heads is None and facts.kv_heads is None:
            return ""
        if facts.kv_heads is None:
            return f"{facts.query_heads} query heads"
        sizes = f"{facts.key_size}"
        if facts.value_size != facts.key_size:
            sizes += f" and {facts.value_size}"
        query = "" if facts.query_heads is None else f"{facts.query_heads} query, "
        return f"{query}{facts.kv_heads} KV heads of {sizes}"

    @property
    def saving(self) -> float | None:
        """How many times fewer bytes a packed token takes."""
        before, after = self.facts.bytes_before, self.facts.bytes_after
        return before / after if self.is_quantized and before and after else None

    @property
    def bytes(self) -> str:
        """Bytes a token in words: ``"4,096 to 1,080 bytes a token, 3.8 times less"``; empty where not known."""
        facts, saving = self.facts, self.saving
        if saving is None or facts.bytes_before is None or facts.bytes_after is None:
            return ""
        return (
            f"{facts.bytes_before:,.0f} to {facts.bytes_after:,.0f} bytes a token, "
            f"{saving:.1f} times less"
        )


@dataclass(frozen=True)
class GraphLines:
    """What became of one graph.

    Attributes:
        title: Which call it was compiled for.
        method: To what caches are quantized.
        attentions: Its attentions.
        caches: Its caches that the graph grows or writes.
        steps: Whether calls are replayed from CUDA graphs, or why not; empty where it is no step on a GPU.
    """

    title: str
    method: str
    attentions: tuple[AttentionLine, ...]
    caches: tuple[StateReport, ...]
    steps: str

    @property
    def rewritten(self) -> int:
        """Attentions that were rewritten."""
        return sum(line.outcome == "rewritten" for line in self.attentions)

    def runs(self) -> list[list[AttentionLine]]:
        """Return runs of neighbours of which the same is told."""
        same = groupby(
            self.attentions, lambda line: (line.outcome, line.detail, line.source, line.facts)
        )
        return [list(run) for _, run in same]


def graph_lines(report: GraphReport, title: str) -> GraphLines:
    """Return what is told of a graph."""
    lines = tuple(attention_line(site, report.spec) for site in report.sites)
    return GraphLines(title, report.spec.method, lines, report.states, report.steps)


def attention_line(site: SiteReport, spec: CacheSpec) -> AttentionLine:
    """Return what is told of an attention."""
    packed = site.outcome != "left alone"
    own = spec.for_layer(site.layer) if packed else None
    return AttentionLine(
        layer=site.layer,
        node=site.node,
        where=site.where,
        source=site.source,
        stack=site.stack,
        outcome=site.outcome,
        detail=site.detail,
        expected=site.expected,
        advice="" if site.outcome == "rewritten" else advice(site.detail),
        facts=site.facts or NO_FACTS,
        bound=None if own is None else bound_of(own),
        before=site.before,
        after=site.after,
    )


@lru_cache(maxsize=256)
def bound_of(spec: CacheSpec) -> str:
    """Return the formula of the largest error of an attention's output."""
    return str(error_bound(spec).evalf(3))


def bounds_of(graphs: Iterable[GraphLines]) -> list[str]:
    """Return the formulas that hold in some graph, each once."""
    every = (line.bound for graph in graphs for line in graph.attentions)
    return list(dict.fromkeys(bound for bound in every if bound is not None))


def named(run: Sequence[AttentionLine]) -> str:
    """Return the layers of a run: ``"0 to 31"``, ``"3"``, ``"0 ... 6"`` where some between are not of it."""
    layers = [line.layer for line in run]
    if len(layers) == 1:
        return f"{layers[0]}"
    in_a_row = layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} {'to' if in_a_row else '...'} {layers[-1]}"


def total_bytes(lines: Sequence[AttentionLine]) -> tuple[float, float]:
    """Return the bytes that a token takes over all attentions whose bytes are known, before and after."""
    known = [line.facts for line in lines if line.saving is not None]
    return sum(f.bytes_before or 0 for f in known), sum(f.bytes_after or 0 for f in known)
