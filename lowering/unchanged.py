"""What passes ask of the same nodes again and again is answered once, as long as their graph does not change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from torch import fx

Function = TypeVar("Function", bound=Callable[..., Any])


class _Known(threading.local):
    """The graph that does not change, and what is known of it, by function."""

    def __init__(self) -> None:
        self.graph: fx.Graph | None = None
        self.answers: dict[Callable[..., Any], dict[Any, Any]] = {}


_known = _Known()


@contextmanager
def unchanged(graph: fx.Graph) -> Iterator[None]:
    """Have functions that are marked `once` remember what they return for this graph and its nodes.

    Raises:
        AssertionError: The graph has other nodes, or the same ones in another order, at the end.
    """
    outer, before = (_known.graph, _known.answers), list(graph.nodes)
    _known.graph, _known.answers = graph, {}
    try:
        yield
    finally:
        _known.graph, _known.answers = outer
    assert before == list(graph.nodes), "a pass that only looks at the graph has changed it"


def once(function: Function) -> Function:
    """Mark a function of a graph or of a node, and of other objects, whose answer follows from them while the graph
    does not change; the answer is not to be changed either.
    """

    @wraps(function)
    def asked(subject: Any, *others: Any) -> Any:
        graph = subject.graph if isinstance(subject, fx.Node) else subject
        if graph is None or graph is not _known.graph:
            return function(subject, *others)
        answers = _known.answers.setdefault(function, {})
        asked_of = (subject, *map(id, others))
        if asked_of not in answers:
            answers[asked_of] = (
                function(subject, *others),
                others,
            )  # kept, so that no id is used twice
        return answers[asked_of][0]

    return asked  # type: ignore[return-value]
