"""`explain`: call a function once under the backend and say what became of each of its attentions."""

from __future__ import annotations

import functools
import html
import json
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch

from kvq_compile.backend import kvq
from kvq_compile.bounds import error_bound
from kvq_compile.history import GraphReport, watching
from kvq_compile.lowering.sites import SiteReport
from kvq_compile.options import make_config

COLUMNS = 80  # what a line of text may take
NOTHING = "nothing was compiled: the call went around the compiled code"


@dataclass(frozen=True, repr=False)
class Explanation:
    """What became of every attention of the graphs that a call compiled.

    Attributes:
        graphs: The graphs, in the order in which they were compiled.
        result: What the call returned.
    """

    graphs: tuple[GraphReport, ...]
    result: Any

    @property
    def rewritten(self) -> int:
        """Attentions that were rewritten."""
        return sum(site.outcome == "rewritten" for graph in self.graphs for site in graph.sites)

    @property
    def bound(self) -> str | None:
        """Formula of the largest error of a packed layer's attention output; ``None`` where nothing is packed."""
        for graph in self.graphs:
            if any(site.outcome == "rewritten" for site in graph.sites):
                return str(error_bound(graph.spec).evalf(3))
        return None

    def json(self) -> str:
        """Return the explanation as JSON, without the call's result."""
        graphs = [
            {
                "method": graph.spec.method,
                "attentions": [asdict(site) for site in graph.sites],
                "caches": [asdict(state) for state in graph.states],
                "steps": graph.steps,
            }
            for graph in self.graphs
        ]
        return json.dumps({"graphs": graphs, "error_bound": self.bound}, indent=2, default=str)

    def __str__(self) -> str:
        return "\n".join(self._lines()) or NOTHING

    def __repr__(self) -> str:
        sites = sum(len(graph.sites) for graph in self.graphs)
        return f"<Explanation of {len(self.graphs)} graphs: {sites} attentions, {self.rewritten} rewritten>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _lines(self) -> Iterator[str]:
        for number, graph in enumerate(self.graphs):
            rewritten = sum(site.outcome == "rewritten" for site in graph.sites)
            yield (
                f"graph {number}: {len(graph.sites)} attentions, {rewritten} rewritten "
                f"({graph.spec.method})"
            )
            for same in _alike(graph.sites):
                yield from _told(same)
            for state in graph.states:
                if state.outcome == "left alone":
                    text = f"{state.name} [{', '.join(state.shape)}]: {state.detail}"
                    yield from _wrapped("cache ", text)
            if graph.steps:
                yield from _wrapped("steps ", graph.steps)
        if self.bound is not None:
            yield "error of a packed layer's attention output, at most:"
            yield from _wrapped("", self.bound)


def _alike(sites: Sequence[SiteReport]) -> list[list[SiteReport]]:
    """Split sites into runs of neighbours of which the same is told."""
    runs = groupby(sites, lambda site: (site.outcome, site.detail, site.source))
    return [list(run) for _, run in runs]


def _told(same: Sequence[SiteReport]) -> Iterator[str]:
    """Yield the lines of sites of which the same is told, one or several."""
    first, last = same[0], same[-1]
    number = f"attention {first.layer:3d}  "
    if len(same) > 1:
        numbers = [site.layer for site in same]
        in_a_row = numbers == list(range(numbers[0], numbers[-1] + 1))
        number = f"attentions {first.layer}{' to ' if in_a_row else ' ... '}{last.layer}  "
    yield from _wrapped(number, f"{first.outcome}: {first.detail}")
    if first.where and len(same) == 1:
        yield from _wrapped("     in ", first.where)
    if first.source:
        yield from _wrapped("     at ", first.source)


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
