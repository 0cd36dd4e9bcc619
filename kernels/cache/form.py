"""What a graph is compiled for in a cache, as one object that caches which are alike share.

Dynamo looks at every part of every cache before a call (`lowering.guards`). Layers nearly always agree, so that it is
enough to look at one and to see that the others are like it, which takes a few comparisons a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvq_compile.kernels.cache.tensor import FORM, HELD, QuantizedKV


class Form:
    """Layout, kind and tables of a cache, and what its tensors are; compared by identity."""

    __slots__ = ("__weakref__",)


_forms: WeakValueDictionary[tuple[Any, ...], Form] = WeakValueDictionary()


def form_of(cache: QuantizedKV) -> Form:
    """Return the form of a cache. The cache forgets it where one of its tensors is replaced by another object."""
    known: Form | None = cache.__dict__.get(FORM)
    if known is not None:
        return known
    tensors = [getattr(cache, name) for name in HELD]
    layout, shape = cache.page_layout, (*cache.shape[:2], *cache.shape[3:])
    # Layers that share their tables hold one tensor, which is to Dynamo one input of the graph.
    about = (
        layout,
        cache.kind,
        shape,
        cache.dtype,
        cache.device,
        id(cache.tables),
        *map(_about, tensors),
    )
    form = cache.__dict__[FORM] = _forms.setdefault(about, Form())
    return form


def _about(x: Tensor | None) -> tuple[Any, ...] | None:
    if x is None:
        return None
    sizes = tuple(x.shape), x.stride()
    return type(x), x.dtype, x.device, *sizes, x.requires_grad, x.is_inference()


def facts_of(cache: QuantizedKV) -> tuple[Any, ...]:
    """Return all that a graph is compiled for: equal for caches that are alike."""
    return form_of(cache), cache.shape[2], None if cache.trim is None else cache.trim.shape[0]


_form_and_length = attrgetter(FORM, "_length", "trim")
_cursor = attrgetter("cursor")


def are_alike(*groups: Sequence[Any]) -> bool:
    """Return whether the caches of each group are alike, and no two caches the same tensors but for tables.

    The first of each group must be known to be a `QuantizedKV`.
    """
    traced = torch.is_grad_enabled()
    cursors: set[int] = set()
    for caches in groups:
        if set(map(type, caches)) != {QuantizedKV} or not _have_one_form(caches):
            return False
        if traced and any(cache.requires_grad for cache in caches):
            return False
        cursors.update(map(id, map(_cursor, caches)))
    return len(cursors) == sum(map(len, groups))


def _have_one_form(caches: Sequence[QuantizedKV]) -> bool:
    try:
        if len(set(map(_form_and_length, caches))) == 1:
            return True  # as at nearly every step
    except AttributeError:  # the form of one is not known yet
        pass
    return len(set(map(facts_of, caches))) == 1
