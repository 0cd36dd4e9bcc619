"""`explain`: call a function once under the backend and say what became of each of its attentions."""

from __future__ import annotations

import functools
import html
import json
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvq_compile.backend import kvq
from kvq_compile.explained import AttentionLine, GraphLines, bounds_of, graph_lines, named
from kvq_compile.history import GraphReport, watching
from kvq_compile.options import make_config

COLUMNS = 80  # what a line of text may take
NOTHING = "nothing was compiled: the call went around the compiled code"


@dataclass(frozen=True, repr=False)
class Explanation:
    """What became of every attention of the graphs that a call compiled.

    Text, JSON and the HTML page are made of `lines`.

    Attributes:
        graphs: The graphs, in the order in which they were compiled.
        result: What the call returned.
        titles: Which call each graph was compiled for, where there were several.
    """

    graphs: tuple[GraphReport, ...]
    result: Any
    titles: tuple[str, ...] = ()

    def __add__(self, other: Explanation) -> Explanation:
        """Return the explanation of this call and of one that followed."""
        titles = [*_titles(self), *_titles(other)]
        return Explanation(self.graphs + other.graphs, other.result, tuple(titles))

    @property
    def lines(self) -> tuple[GraphLines, ...]:
        """What is told of each graph."""
        return tuple(map(graph_lines, self.graphs, _titles(self)))

    @property
    def rewritten(self) -> int:
        """Attentions that were rewritten."""
        return sum(graph.rewritten for graph in self.lines)

    @property
    def bound(self) -> str | None:
        """Formula of the largest error of a packed layer's attention output; ``None`` where nothing is packed."""
        bounds = bounds_of(self.lines)
        return bounds[0] if bounds else None

    def json(self) -> str:
        """Return the explanation as JSON, without the call's result."""
        graphs = [asdict(graph) for graph in self.lines]
        return json.dumps({"graphs": graphs, "error_bound": self.bound}, indent=2, default=str)

    def html(self, title: str = "") -> str:
        """Return the explanation as one page that needs nothing else; ``title`` is what was explained."""
        from kvq_compile.explanation_page import page

        return page(self.lines, title)

    def __str__(self) -> str:
        return "\n".join(self._text()) or NOTHING

    def __repr__(self) -> str:
        sites = sum(len(graph.sites) for graph in self.graphs)
        return f"<Explanation of {len(self.graphs)} graphs: {sites} attentions, {self.rewritten} rewritten>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _text(self) -> Iterator[str]:
        graphs = self.lines
        bounds = bounds_of(graphs)
        for number, graph in enumerate(graphs):
            title = f"graph {number}" + (f", {graph.title}" if graph.title else "")
            yield f"{title}: {len(graph.attentions)} attentions, {graph.rewritten} rewritten ({graph.method})"
            for run in graph.runs():
                yield from _told(run, len(bounds) > 1)
            for state in graph.caches:
                if state.outcome == "left alone":
                    text = f"{state.name} [{', '.join(state.shape)}]: {state.detail}"
                    yield from _wrapped("cache ", text)
            if graph.steps:
                yield from _wrapped("steps ", graph.steps)
        if len(bounds) == 1:
            yield "error of a packed layer's attention output, at most:"
            yield from _wrapped("", bounds[0])


def _titles(explanation: Explanation) -> tuple[str, ...]:
    return explanation.titles or ("",) * len(explanation.graphs)


def _told(run: Sequence[AttentionLine], bounds: bool) -> Iterator[str]:
    """Yield the lines of attentions of which the same is told, one or several; with their bounds where these differ."""
    first = run[0]
    number = f"attention {first.layer:3d}  " if len(run) == 1 else f"attentions {named(run)}  "
    yield from _wrapped(number, f"{first.outcome}: {first.detail}")
    if first.where and len(run) == 1:
        yield from _wrapped("     in ", first.where)
    if first.source:
        yield from _wrapped("     at ", first.source)
    facts = [first.facts.cache, first.heads, first.bytes]
    if any(facts):
        yield from _wrapped("     with ", "; ".join(filter(None, facts)))
    if first.advice:
        yield from _wrapped("     do ", first.advice)
    if bounds and first.bound is not None:
        yield from _wrapped("     error at most ", first.bound)


def _wrapped(head: str, text: str) -> list[str]:
    """Return ``head`` and ``text`` as indented lines of `COLUMNS` characters; long names stay whole."""
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=f"  {head}",
        subsequent_indent=" " * (2 + len(head)),
        break_long_words=False,
        break_on_hyphens=False,
    )


def explain(
    function: Callable[..., Any],
    /,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Explanation:
    """Call a function or module once under the backend and say what became of each attention.

    The call is made for real, caches it is given included; the graphs run without Inductor.

    Args:
        function: What to explain; a module, its ``forward``, or a function.
        *args: Its arguments.
        options: Options of the backend.
        **kwargs: Its keyword arguments.

    Raises:
        ValueError: An option is unknown or out of range.
        TypeError: ``function`` cannot be called, or an option has the wrong type.
    """
    if not callable(function):
        raise TypeError(f"function must be a module or a function, got {type(function).__name__}")
    options = {**(options or {}), "inner": "eager"}
    make_config(options)  # here: errors of the backend are wrapped in torch's
    backend = functools.partial(kvq, options=options)
    forward = function.forward if isinstance(function, torch.nn.Module) else function
    with watching() as graphs, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a warning would say is in the explanation
        result = torch.compile(forward, backend=backend)(*args, **kwargs)
    return Explanation(tuple(graphs), result)
