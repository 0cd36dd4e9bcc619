"""Find the layer of the model that an attention belongs to: from its cache, its module, or else by counting.

Dynamo names every argument of a graph by where the call found it, ``L['past'].layers[3].keys``, and every node by the
modules it ran in, ``L['self'].model.layers.3.self_attn``. The number of a layer is then the same in every graph
of a model, however Dynamo cuts it and whichever layers keep a cache. Where neither name holds a number, attentions
are counted in the order in which the graph runs them, and the report says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx
from torch._guards import TracingContext

from kvq_compile.lowering.find.movement import cache_inputs
from kvq_compile.lowering.nodes import source_name
from kvq_compile.lowering.sites import Attention

COUNTED = "counted: neither its cache nor its module tells the layer"
_OF_A_CACHE = re.compile(r"\.layers\[(\d+)\]")  # caches of transformers
_OF_A_MODULE = re.compile(
    r"\.(\d+)(?=\.|$)|_modules\['(\d+)'\]"
)  # a ModuleList's children have numbers for names


@dataclass(frozen=True)
class Place:
    """Where in the model an attention stands.

    Attributes:
        layer: Number of its layer.
        where: The module it runs in, or the cache it reads; `COUNTED` where neither is known.
    """

    layer: int
    where: str = COUNTED


def places_of(attentions: Sequence[Attention | tuple[fx.Node, Exception]]) -> list[Place]:
    """Return the place of each attention of a graph; layers that share their weights share it and are counted."""
    found = [_place(each) for each in attentions]
    if len(found) == 1 and found[0] is None:
        found = [_place_of_the_call()]
    shared = Counter(place for place in found if place is not None)
    return [
        Place(order) if place is None or shared[place] > 1 else place
        for order, place in enumerate(found)
    ]


def place_of(reader: fx.Node, cache: fx.Node, order: int) -> Place:
    """Return the place of what reads a cache and is no attention that was found; counted as ``order`` if need be."""
    return _place_among(reader, cache_inputs(cache) or [cache]) or Place(order)


def counts_layers(where: str) -> bool:
    """Return whether a place is one of a graph that holds the model's list of layers, or knows no other count."""
    return where == COUNTED or _number(_OF_A_MODULE, where) is not None


def _place(found: Attention | tuple[fx.Node, Exception]) -> Place | None:
    if isinstance(found, Attention):
        return _place_among(found.output, cache_inputs(found.key))
    return _place_among(found[0], [])


def _place_among(reader: fx.Node, caches: Sequence[fx.Node]) -> Place | None:
    module = _module_of(reader)
    within = _number(_OF_A_MODULE, module)
    for name in map(source_name, caches):
        layer = _number(_OF_A_CACHE, name)
        if layer is None:
            layer = within if within is not None else _number(_OF_A_MODULE, name)
        if layer is not None:
            return Place(layer, module or name)
    return None if within is None else Place(within, module)


def _module_of(node: fx.Node) -> str:
    """Return the path of the innermost module that a node ran in: ``model.layers.3.self_attn``."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") if stack else ""


def _number(pattern: re.Pattern[str], name: str) -> int | None:
    match = pattern.search(f".{name}")
    return None if match is None else int(next(filter(None, match.groups())))


def _place_of_the_call() -> Place | None:
    """Return the one layer of a cache that the captured call has looked at, though it holds nothing yet.

    Where each layer is compiled alone its modules know no number, and the first call has no cache to read.
    """
    context = TracingContext.try_get()
    guards = context.guards_context.dynamo_guards if context is not None else ()
    names = [str(guard.name() if callable(guard.name) else guard.name) for guard in guards]
    seen = {
        match.group(0): match.group(1) for name in names for match in _OF_A_CACHE.finditer(name)
    }
    if len(set(seen.values())) != 1:
        return None
    ((where, layer),) = seen.items()
    return Place(int(layer), f"the cache's {where.removeprefix('.')}")
