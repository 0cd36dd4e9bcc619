"""Let each layer be compiled as often as PyTorch allows, where layers that are compiled one by one share their code.

Dynamo compiles a piece of code ``recompile_limit`` times, 8 unless told otherwise, and runs it uncompiled from then
on. The limit ends recompilations that lead nowhere. Layers that are compiled one by one are one piece of code to
Dynamo, and each needs graphs of its own, since a graph is of ``past_key_values.layers[7]``: eight layers would spend
what is meant for one. So the limit is raised by the graphs of all layers but the one that was compiled most often; to
that one it applies as the user has set it. What Dynamo offers instead is the user's to ask for: a ``recompile_limit``
of one ``torch.compile``, which is left as it is, or ``isolate_recompiles=True``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch._dynamo import config
from torch._guards import CompileContext, CompileId

from kvq_compile.lowering import logs
from kvq_compile.lowering.find.layers import COUNTED
from kvq_compile.lowering.sites import SiteReport, StateReport

LIMITS = ("recompile_limit", "accumulated_recompile_limit")


@dataclass
class _Code:
    """What has been compiled of one piece of code.

    Attributes:
        graphs: How many graphs each layer has, by what tells it from others.
        last: Dynamo's number of the last graph.
        raised: What the limit was raised to for it.
    """

    graphs: Counter[Any] = field(default_factory=Counter)
    last: int = -1
    raised: int = 0


_codes: dict[int, _Code] = {}
_given: dict[
    tuple[str, int], int
] = {}  # limits set here, and the user's that they were raised from


def make_room(
    gm: fx.GraphModule, sites: Sequence[SiteReport], states: Sequence[StateReport]
) -> int | None:
    """Raise Dynamo's limits by the graphs that other layers have of the code that is being compiled.

    Args:
        gm: The captured graph.
        sites: What became of its attentions.
        states: What became of its caches.

    Returns:
        How often the code was compiled, if Dynamo compiles it no more, else ``None``.
    """
    compiled = CompileContext.current_compile_id()
    if compiled is None or compiled.frame_id is None:
        return None
    code = _code_of(compiled)
    code.graphs[_layer_of(gm, sites, states)] += 1
    others = code.graphs.total() - max(code.graphs.values())
    if (
        config.recompile_limit >= code.raised
    ):  # else it is taken back: a limit of this torch.compile alone
        for name in LIMITS:
            _raise(name, others)
        code.raised = config.recompile_limit
    times = code.last + 1
    return times if times >= min(getattr(config, name) for name in LIMITS) else None


def _code_of(compiled: CompileId) -> _Code:
    """Return what is known of a piece of code; after ``torch._dynamo.reset()``, which counts anew, nothing is."""
    number, times = compiled.frame_id or 0, compiled.frame_compile_id or 0
    if number in _codes and times <= _codes[number].last:
        _codes.clear()
    code = _codes.setdefault(number, _Code())
    code.last = times
    return code


def _layer_of(
    gm: fx.GraphModule, sites: Sequence[SiteReport], states: Sequence[StateReport]
) -> tuple[Any, ...]:
    """Return what tells the layer of a graph from others: its number and a module of it, or else its caches."""
    stacks = (node.meta.get("nn_module_stack") for node in gm.graph.nodes)
    module = next((next(iter(stack)) for stack in stacks if stack), None)
    numbers = tuple(site.layer for site in sites)
    if module is None and all(site.where == COUNTED for site in sites):
        return None, numbers, tuple(state.name for state in states)
    return module, numbers


def _raise(name: str, others: int) -> None:
    current = getattr(config, name)
    own = _given.get((name, current), current)
    limit = max(current, own + others)
    if limit > current:
        _given[name, limit] = own
        setattr(config, name, limit)
        logs.sites.info(
            "torch._dynamo.config.%s is raised from %d to %d: %d graphs of this code are of other layers",
            *(name, current, limit, others),
        )
