"""Logs of the lowering: ``KVQ_LOGS=sites,passes,graphs,timing``, or loggers of these names.

====================  ==========================================================
``kvq_compile.sites``   what became of each attention, and why
``kvq_compile.passes``  what each pass changed, node by node
``kvq_compile.graphs``  the graph around each change, before and after
``kvq_compile.timing``  the time that each pass took
====================  ==========================================================

``TORCH_LOGS="+kvq_compile"`` turns all of them on in PyTorch's own format; names of a single one are refused there,
since PyTorch reads that variable before it knows of any backend. Where PyTorch writes a trace for ``tlparse``
(``TORCH_TRACE``), the passes and the graphs are artifacts of it.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Sequence

from torch import fx
from torch._logging._internal import trace_structured

from kvq_compile.lowering.nodes import shape_of, target_name, value_of

NAMES = ("sites", "passes", "graphs", "timing")
VARIABLE = "KVQ_LOGS"

sites, passes, graphs, timing = (logging.getLogger(f"kvq_compile.{name}") for name in NAMES)


def turn_on(names: str) -> None:
    """Print the loggers of these names, a list like ``"sites,passes"``, to standard error.

    Raises:
        ValueError: A name is unknown.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in NAMES:
            raise ValueError(f"{VARIABLE} must list some of {', '.join(NAMES)}, got {name!r}")
    if not chosen:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
    for name in chosen:
        logger = logging.getLogger(f"kvq_compile.{name}")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)


def lines(graph: fx.Graph) -> list[str]:
    """Return a graph as one line a node, with dtypes and shapes."""
    return [_line(node) for node in graph.nodes]


def diff(before: Sequence[str], after: Sequence[str]) -> str:
    """Return what differs between two graphs, each change with three nodes around it."""
    return "\n".join(difflib.unified_diff(before, after, "captured", "rewritten", lineterm=""))


def artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to PyTorch's trace, if it writes one."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"kvq_{name}", "encoding": "string"},
        payload_fn=text,
    )


def tell(logger: logging.Logger, texts: Iterable[str]) -> None:
    """Log messages; they are built only if the logger is on."""
    if logger.isEnabledFor(logging.DEBUG):
        for text in texts:
            logger.debug("%s", text)


def _line(node: fx.Node) -> str:
    value, shape = value_of(node), shape_of(node)
    about = "" if shape is None else f": {str(value.dtype).removeprefix('torch.')}{list(shape)}"
    if node.op in ("placeholder", "get_attr"):
        return f"{node.name}{about} = {node.op}"
    if node.op == "output":
        return f"return {node.args[0]}"
    arguments = [str(arg) for arg in node.args]
    arguments += [f"{name}={arg}" for name, arg in node.kwargs.items()]
    return f"{node.name}{about} = {target_name(node) or node.target}({', '.join(arguments)})"


turn_on(os.environ.get(VARIABLE, ""))
