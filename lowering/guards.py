"""Let Dynamo look at one cache of those that are alike, and see that a buffer has become a cache.

Dynamo checks before every call what its graph was captured for: of a `QuantizedKV` the type, the layout, and of each
tensor inside its sizes, strides and marks of dynamic sizes. For the caches of 32 layers that takes longer than all
else that a step does on the host. Caches that are alike when a graph is captured get one check instead: that they
still are (`are_alike`). Dynamo goes on to look at the first of them. What it finds there then holds for all, so that
the graph runs in the same calls as before.

Of a plain tensor in a dictionary, as a module has of its buffers, Dynamo takes for granted that it stays one while the
dictionary is not written (PyTorch 2.11; later ones where ``use_recursive_dict_tags_for_guards`` is on). A buffer that
becomes a cache in place is what this overlooks, so there is a check of our own (`see_caches`).

Dynamo has no interface for either. Where it is not as it was found here, its own checks stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.guards import _get_closure_vars
from torch._dynamo.source import AttrSource, SubclassAttrListSource, TensorPropertySource
from torch._guards import Guard, Source, TracingContext
from torch._subclasses import FakeTensor
from torch.nn import Parameter

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.form import are_alike, facts_of
from kvq_compile.kernels.cache.tensor import INNER, QuantizedKV
from kvq_compile.lowering.nodes import value_of

_OF_CACHE = ("TYPE_MATCH", "TENSOR_MATCH", "TENSOR_SUBCLASS_METADATA_MATCH")
_OF_PART = (*_OF_CACHE, "EQUALS_MATCH")
_AXES = 3  # the fewest that a tensor of tokens has: rows, tokens, channels
_TWICE = ("DUPLICATE_INPUT", "OBJECT_ALIASING")  # of inputs that are one object


def unify(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Let sizes of caches that are alike be one symbol, so that the graph is one for caches that are.

    Args:
        gm: The captured graph, while it is being compiled.
        inputs: Arguments of the call that is being compiled.
    """
    firsts: dict[Any, QuantizedKV] = {}
    for node, given in _caches(gm, inputs):
        fake: QuantizedKV = value_of(node)
        first = firsts.setdefault(facts_of(given), fake)
        for x, y in zip(_tensors(first), _tensors(fake), strict=True):
            sizes: Iterable[tuple[Any, Any]] = zip(x.shape, y.shape, strict=True)
            for size, other in sizes:
                if isinstance(size, torch.SymInt) and isinstance(other, torch.SymInt):
                    bool(size == other)  # merges the symbols


def see_caches(gm: fx.GraphModule, inputs: Sequence[Any]) -> int:
    """Let Dynamo look whether tensors that are plain now are caches; return at how many.

    Any plain tensor is looked at that could become one, for another graph may be the one that quantizes it.

    Args:
        gm: The captured graph, while it is being compiled.
        inputs: Arguments of the call that is being compiled.
    """
    context = TracingContext.try_get()
    if context is None:
        return 0
    guards = context.guards_context.dynamo_guards
    names = {guard.originating_source: guard.name for guard in guards}
    nodes = zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    found = {
        node._dynamo_source: names[node._dynamo_source]
        for node, given in nodes
        if _may_become_cache(given) and getattr(node, "_dynamo_source", None) in names
    }
    if found:
        told = f"{len(found)} tensors are no caches"
        code = f"___kvq_are_plain(({', '.join(found.values())},))"
        ours = Guard(next(iter(found)), _check(code, told, ___kvq_are_plain=_are_plain))
        guards.add(ours, collect_debug_stack=False)
    return len(found)


def _may_become_cache(given: Any) -> bool:
    return (
        type(given) in (Tensor, Parameter)
        and not given.requires_grad
        and given.is_floating_point()
        and given.dim() >= _AXES
    )


def _are_plain(tensors: Iterable[Any]) -> bool:
    return not any(isinstance(x, (QuantizedKV, ArrangedKV)) for x in tensors)


def share_guards(gm: fx.GraphModule, inputs: Sequence[Any]) -> int:
    """Replace Dynamo's checks of caches that are like another one; return how many caches that are.

    Args:
        gm: The captured graph, when it was compiled and nothing is to be checked beyond what is known now.
        inputs: Arguments of the call that is being compiled.
    """
    context = TracingContext.try_get()
    shape_env = getattr(getattr(context, "fake_mode", None), "shape_env", None)
    tracked = getattr(shape_env, "tracked_fakes", None)
    groups = [group for group in _alike(gm, inputs) if len(group) > 1]
    if context is None or tracked is None or not groups:
        return 0
    guards = context.guards_context.dynamo_guards
    caches = {source for group in groups for source in group[1:]}
    parts = {part for source in caches for part in _parts(source)}
    names = {guard.originating_source: guard.name for guard in guards}
    if any(source not in names for group in groups for source in group):
        return 0
    tables = [{AttrSource(source, "tables") for source in group} for group in groups]
    if any(_names_twice(guard, caches | parts, tables) for guard in guards):
        return 0
    lists = [f"({', '.join(names[source] for source in group)},)" for group in groups]
    told = f"{len(caches)} caches are like the first of their kind"
    code = f"___kvq_are_alike({', '.join(lists)})"
    ours = Guard(groups[0][0], _check(code, told, ___kvq_are_alike=are_alike))
    for guard in list(guards):
        if _is_shared(guard, caches, parts) or _twice(guard) & parts:
            guards.inner.discard(guard)
    guards.add(ours, collect_debug_stack=False)
    inside = {part for group in groups for part in _parts(group[0])}  # said of the cache, too
    tracked[:] = [fake for fake in tracked if fake.source not in caches | parts | inside]
    _read_once(gm, {source: group[0] for group in groups for source in group[1:]})
    return len(caches)


def _read_once(gm: fx.GraphModule, first_of: dict[Any, Any]) -> None:
    """Let Dynamo read the sizes that it passes to a graph from the first of the caches that are alike."""
    for node in gm.graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        source = getattr(argument, "source", None)
        if isinstance(source, TensorPropertySource) and source.base in first_of:
            argument.source = TensorPropertySource(first_of[source.base], source.prop, source.idx)


def _caches(gm: fx.GraphModule, inputs: Sequence[Any]) -> Iterator[tuple[fx.Node, QuantizedKV]]:
    """Yield the placeholders of a graph that are caches, with the caches that they were captured for."""
    for node, given in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if (
            type(given) is QuantizedKV
            and type(value_of(node)) is QuantizedKV
            and not isinstance(given.cursor, FakeTensor)
            and not given.requires_grad
            and hasattr(node, "_dynamo_source")
        ):
            yield node, given


def _alike(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[list[Any]]:
    """Return the sources of the caches among a graph's inputs, those together that are alike, with the same symbols."""
    groups: dict[Any, list[Any]] = {}
    for node, given in _caches(gm, inputs):
        symbols = tuple(_expressions((*x.shape, *x.stride())) for x in _tensors(value_of(node)))
        groups.setdefault((facts_of(given), symbols), []).append(node._dynamo_source)  # type: ignore[attr-defined]
    return list(groups.values())


def _tensors(cache: QuantizedKV) -> list[Tensor]:
    held = (getattr(cache, name) for name in INNER)
    return [cache, *[x for x in held if x is not None]]


def _expressions(sizes: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def _parts(source: Any) -> list[Any]:
    """Return the sources of what Dynamo looks at inside a cache."""
    return [*[AttrSource(source, name) for name in INNER], SubclassAttrListSource(source)]


def _is_shared(guard: Guard, caches: Collection[Any], parts: Collection[Any]) -> bool:
    """Return whether a guard says of a cache, or of a tensor inside, what `are_alike` says of all."""
    source, name = guard.originating_source, guard.create_fn_name()
    return (source in caches and name in _OF_CACHE) or (source in parts and name in _OF_PART)


def _names_twice(guard: Guard, sources: Collection[Any], tables: Iterable[Set[Any]]) -> bool:
    """Return whether a guard says that one of some sources is the same object as another one.

    Tables of caches that are alike are one object, as `are_alike` finds.
    """
    named = _twice(guard)
    return not named.isdisjoint(sources) and not any(named <= group for group in tables)


def _twice(guard: Guard) -> set[Any]:
    """Return the sources of which a guard says that they are one object."""
    create = guard.create_fn
    if not isinstance(create, partial) or guard.create_fn_name() not in _TWICE:
        return set()
    named = (guard.originating_source, *create.args, *create.keywords.values())
    return {x for x in named if isinstance(x, Source)}


def _check(code: str, told: str, **names: Any) -> Callable[[Any, Guard], None]:
    """Return what makes a check of a guard; ``code`` is evaluated when all others have passed."""

    def kvq_check(builder: Any, guard: Guard) -> None:
        known = {**_get_closure_vars(), **names}  # with the functions by which sources are named
        builder.add_python_lambda_leaf_guard_to_root(
            [code], [f"{told}: {code}"], closure_vars=known
        )

    return kvq_check
