"""What passes ask of the same nodes again and again is answered once, as long as their graph does not change."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from torch import fx

Function = TypeVar("Function", bound=Callable[..., Any])
Answers = dict[Callable[..., Any], dict[Any, Any]]


class _Known(threading.local):
    """The graph that does not change, and what is known of it, by function.

    Attributes:
        graph: What `unchanged` was told.
        answers: Of this graph.
        kept: Answers that may serve again, by graph, each with what the graph was when they were given; ``None``
            outside of `remembering`.
    """

    def __init__(self) -> None:
        self.graph: fx.Graph | None = None
        self.answers: Answers = {}
        self.kept: dict[fx.Graph, tuple[list[Any], Answers]] | None = None


_known = _Known()


@contextmanager
def remembering() -> Iterator[None]:
    """Let `unchanged` go on with the answers of an earlier one for the same graph, if it has not changed since."""
    outer, _known.kept = _known.kept, {}
    try:
        yield
    finally:
        _known.kept = outer


@contextmanager
def unchanged(graph: fx.Graph) -> Iterator[None]:
    """Have functions that are marked `once` remember what they return for this graph and its nodes.

    Raises:
        AssertionError: The graph has other nodes, other arguments of them, or another order, at the end.
    """
    if graph is _known.graph:
        yield  # the outermost one looks at the end
        return
    outer, before = (_known.graph, _known.answers), _contents(graph)
    earlier = None if _known.kept is None else _known.kept.get(graph)
    is_known = earlier is not None and _are_same(before, earlier[0])
    _known.graph, _known.answers = graph, earlier[1] if earlier and is_known else {}
    try:
        yield
    finally:
        answers = _known.answers
        _known.graph, _known.answers = outer
    assert _are_same(before, _contents(graph)), "a pass that only looks at the graph has changed it"
    if _known.kept is not None:
        _known.kept[graph] = before, answers


def _contents(graph: fx.Graph) -> list[Any]:
    """Return all that answers follow from: the objects themselves, so that none can pass for another."""
    contents: list[Any] = []
    for node in graph.nodes:
        value = node.meta.get("example_value")
        contents += (node, node.target, node.args, node.kwargs, value)
    return contents


def _are_same(one: list[Any], other: list[Any]) -> bool:
    """Return whether two lists are of the same objects."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def once(function: Function) -> Function:
    """Mark a function of a graph or of a node, and of other objects, whose answer follows from them while the graph
    does not change; the answer is not to be changed either.
    """

    @wraps(function)
    def asked(subject: Any, *others: Any) -> Any:
        graph = subject.graph if isinstance(subject, fx.Node) else subject
        if graph is None or graph is not _known.graph:
            return function(subject, *others)
        answers = _known.answers.get(function)
        if answers is None:
            answers = _known.answers[function] = {}
        if not others:
            if subject not in answers:
                answers[subject] = function(subject)
            return answers[subject]
        asked_of = (subject, *map(id, others))
        if asked_of not in answers:
            answers[asked_of] = (
                function(subject, *others),
                others,
            )  # kept, so that no id is used twice
        return answers[asked_of][0]

    return asked  # type: ignore[return-value]
