"""What a graph is compiled for in a cache, as one object that caches which are alike share.

Dynamo looks at every part of every cache before a call (`lowering.guards`). Layers nearly always agree, so that it is
enough to look at one and to see that the others are like it, which takes a few comparisons a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from kvq_compile.kernels.cache.tensor import FORM, HELD, QuantizedKV


class Form:
    """Layout and kind of a cache, and what its tensors are; compared by identity."""

    __slots__ = ("__weakref__",)


_forms: WeakValueDictionary[tuple[Any, ...], Form] = WeakValueDictionary()


def form_of(cache: QuantizedKV) -> Form:
    """Return the form of a cache. It is taken anew once one of the cache's tensors is another object."""
    known = cache.__dict__.get(FORM)
    if known is not None:
        form, layout, kind, codes, params, exact, cursor, tables, shift, originals = known
        if (
            cache.codes is codes
            and cache.params is params
            and cache.exact is exact
            and cache.cursor is cursor
            and cache.tables is tables
            and cache.shift is shift
            and cache.originals is originals
            and cache.page_layout is layout
            and cache.kind == kind
        ):
            found: Form = form
            return found
    tensors = [getattr(cache, name) for name in HELD]
    layout, shape = cache.page_layout, (*cache.shape[:2], *cache.shape[3:])
    about = layout, cache.kind, shape, cache.dtype, cache.device, *map(_about, tensors)
    form = _forms.setdefault(about, Form())
    cache.__dict__[FORM] = form, layout, cache.kind, *tensors
    return form


def _about(x: Tensor | None) -> tuple[Any, ...] | None:
    if x is None:
        return None
    sizes = tuple(x.shape), x.stride()
    return type(x), x.dtype, x.device, *sizes, x.requires_grad, x.is_inference()


def facts_of(cache: QuantizedKV) -> tuple[Any, ...]:
    """Return all that a graph is compiled for: equal for caches that are alike."""
    return form_of(cache), cache.shape[2], None if cache.trim is None else cache.trim.shape[0]


def are_alike(*groups: Sequence[Any]) -> bool:
    """Return whether the caches of each group are alike, and no two caches the same tensors.

    The first of each group must be known to be a `QuantizedKV`.
    """
    cursors = set()
    for caches in groups:
        first: QuantizedKV = caches[0]
        form, length, hidden = facts_of(first)
        for cache in caches:
            if (
                type(cache) is not QuantizedKV
                or form_of(cache) is not form
                or cache.shape[2] != length
                or cache.requires_grad
                or (None if (trim := cache.trim) is None else trim.shape[0]) != hidden
            ):
                return False
            cursors.add(id(cache.cursor))
    return len(cursors) == sum(map(len, groups))
