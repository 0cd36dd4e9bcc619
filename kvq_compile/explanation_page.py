"""An explanation as one HTML page: everything is in it, and it needs no script."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

import kvq_compile
from kvq_compile.explained import AttentionLine, GraphLines, bounds_of, named, total_bytes
from kvq_compile.flow_picture import picture
from kvq_compile.lowering.flows import readable_source
from kvq_compile.lowering.sites import DENSE, Flow, StateReport

STYLE = Path(__file__).parent / "explanation.css"
WORDS = {
    "rewritten": "Quantized",
    DENSE: "Stored quantized, read dense",
    "left alone": "Left as it is",
}
CLASSES = {"rewritten": "packed", DENSE: "dense", "left alone": "left"}


def page(graphs: Sequence[GraphLines], title: str = "") -> str:
    """Return the page of what was told of graphs; ``title`` is what was explained."""
    title = title or "What became of every attention"
    body = "".join(_body(graphs, title))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)} · kvq explain</title><style>{STYLE.read_text(encoding='utf-8')}</style>"
        f"</head><body><main>{body}</main></body></html>\n"
    )


def _body(graphs: Sequence[GraphLines], title: str) -> Iterator[str]:
    yield f'<header><p class="over">kvq explain</p><h1>{_text(title)}</h1>'
    yield f'<p class="lead">{_text(summary(graphs))}</p>'
    yield f"{_weights(graphs)}</header>"
    for number, graph in enumerate(graphs):
        yield from _graph(graph, number, is_open=number == len(graphs) - 1)
    bounds = bounds_of(graphs)
    if bounds:
        yield "<h2>How far an output can be off</h2>"
        yield '<p class="soft">Largest error of an element of a packed attention’s output, in exact arithmetic.</p>'
        yield from (f'<p class="formula mono">{_text(bound)}</p>' for bound in bounds)
    yield f"<footer>kvq-compile {_text(kvq_compile.__version__)}</footer>"


def summary(graphs: Sequence[GraphLines]) -> str:
    """Return what became of the attentions of the last graph that has some, in a sentence or two."""
    last = next((graph for graph in reversed(graphs) if graph.attentions), None)
    if last is None:
        return "No attention was met: nothing was compiled, or the model has none that this backend knows."
    every, kept = len(last.attentions), sum(line.is_quantized for line in last.attentions)
    caches = f"All {every}" if kept == every else f"{kept} of {every}"
    said = f"{caches} attentions keep their cache quantized, by {last.method}."
    dense = sum(line.outcome == DENSE for line in last.attentions)
    if dense:
        said += f" {dense} of them {'reads' if dense == 1 else 'read'} it as an ordinary tensor."
    before, after = total_bytes(last.attentions)
    dtypes = {line.facts.dtype for line in last.attentions if line.saving is not None}
    than = f" than in {dtypes.pop()}" if len(dtypes) == 1 else ""
    return said + (f" A packed token takes {before / after:.1f} times less{than}." if after else "")


def _weights(graphs: Sequence[GraphLines]) -> str:
    """Return the bytes of a token before and after, as bars."""
    last = next((graph for graph in reversed(graphs) if graph.attentions), None)
    before, after = total_bytes(last.attentions) if last is not None else (0.0, 0.0)
    if not after:
        return ""
    rows = ("as it was", "", before), ("packed", " packed", after)
    bars = [
        f'<span class="soft">{name}</span>'
        f'<div class="track{kind}"><i style="width:{100 * size / before:.1f}%"></i></div>'
        f'<span class="figure">{size:,.0f} bytes a token</span>'
        for name, kind, size in rows
    ]
    return f'<div class="weigh">{"".join(bars)}</div>'


def _graph(graph: GraphLines, number: int, is_open: bool) -> Iterator[str]:
    title = graph.title or f"graph {number}"
    yield f"<section><h2>{_text(title[:1].upper() + title[1:])}</h2>"
    told = f"{len(graph.attentions)} attentions, {graph.rewritten} rewritten"
    yield f'<p class="soft">{_text(told)}{_text(f"; steps {graph.steps}") if graph.steps else ""}</p>'
    for place, run in enumerate(graph.runs()):
        yield f'<div class="card {_kind(run[0])}">{_said(run[0])}'
        yield from map(_line, run)
        yield from _around(run, is_open and place == 0)
        yield "</div>"
    yield from _caches([state for state in graph.caches if state.outcome == "left alone"])
    yield "</section>"


def _caches(left: Sequence[StateReport]) -> Iterator[str]:
    """Yield what is told of caches that were left as they are, those with one reason together."""
    for detail, expected in dict.fromkeys((state.detail, state.expected) for state in left):
        names = [
            f"<code>{_text(readable_source(state.name))} [{_text(', '.join(state.shape))}]</code>"
            for state in left
            if state.detail == detail
        ]
        kind = "left expected" if expected else "left"
        yield f'<div class="card {kind}"><div class="said"><p class="outcome">Caches left as they are</p>'
        yield f"<p><b>Because</b> {_text(detail)}.</p><p>{', '.join(names)}</p></div></div>"


def _kind(line: AttentionLine) -> str:
    return CLASSES[line.outcome] + (" expected" if line.expected else "")


def _said(line: AttentionLine) -> str:
    """Return what became of a run of attentions, and what would change it."""
    detail = _text(line.detail)
    if line.outcome == "rewritten":
        cache = f" Cache: {_text(line.facts.cache)}." if line.facts.cache else ""
        told = f"<p>{detail[:1].upper()}{detail[1:]}.{cache}</p>"
    else:
        told = f"<p><b>Because</b> {detail}.</p>"
        told += f"<p><b>To change it:</b> {_text(line.advice)}</p>"
    return f'<div class="said"><p class="outcome">{WORDS[line.outcome]}</p>{told}</div>'


def _line(line: AttentionLine) -> str:
    facts, size = line.facts, ""
    if line.saving is not None:
        size = f"{facts.bytes_before:,.0f} → {facts.bytes_after:,.0f} bytes"
    return (
        f'<div class="line"><span class="number">{line.layer}</span>'
        f'<span class="mono">{_text(line.where or line.node)}</span>'
        f'<span class="mono soft" title="{_text(line.source)}">{_text(_short(line.source))}</span>'
        f'<span class="soft">{_text(line.heads)}</span><span class="bytes">{size}</span></div>'
    )


def _short(source: str) -> str:
    """Return the last two parts of a path and the line."""
    return "/".join(source.replace("\\", "/").split("/")[-2:])


def _around(run: Sequence[AttentionLine], is_open: bool) -> Iterator[str]:
    """Yield the graph around the first attention of a run, where it was called, and its bound."""
    first = run[0]
    if not (first.before or first.stack):
        return
    layers = f"Layer {named(run)}" if len(run) == 1 else f"Layers {named(run)}"
    yield f"<details{' open' if is_open else ''}><summary>{layers}: the graph around the attention</summary>"
    yield '<div class="inner">'
    pictures = [("before", "captured", first.before), ("after", "rewritten", first.after)]
    shown = [each for each in pictures if each[2]][: 1 if first.before == first.after else 2]
    yield '<div class="pair">'
    for kind, name, flow in shown:
        label = f"The graph around the attention as {name}"
        yield f'<figure class="{kind}"><figcaption>as {name}</figcaption>{picture(flow, label)}</figure>'
    yield "</div>"
    for _, name, flow in shown:
        yield f"<details><summary>as {name}, in words</summary><pre>{_text(words(flow))}</pre></details>"
    if first.bound is not None:
        yield "<details><summary>how far its output can be off</summary>"
        yield f"<pre>{_text(first.bound)}</pre></details>"
    if first.stack:
        calls = "".join(f"<li>{_text(frame)}</li>" for frame in first.stack)
        yield f"<details><summary>where it is called</summary><ol>{calls}</ol></details>"
    yield "</div></details>"


def words(flow: Flow) -> str:
    """Return a flow as lines, one a step, by the names that the model has for them."""
    names = {step.name: step.label or step.name for step in flow}
    lines = []
    for step in flow:
        about = f"  # {step.about}" if step.about else ""
        inputs = ", ".join(names.get(name, name) for name in step.inputs)
        call = f"{step.does}({inputs})" if inputs else step.does
        lines.append(f"{names[step.name]} = {call}{about}")
    return "\n".join(lines)


def _text(text: str) -> str:
    return html.escape(text, quote=True)
