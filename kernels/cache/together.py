"""What a call does to all its dynamic caches at once: a few passes in C, and little Python for each of them.

A step of a model of 32 layers takes 64 caches, nearly always of equal length and with room. What holds for each is then
looked up once, and done for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any
from weakref import ref

from torch import Tensor

from kvq_compile.kernels.cache.form import form_of
from kvq_compile.kernels.cache.tensor import FORM, OF_EACH, QuantizedKV
from kvq_compile.kernels.cache.views import MANY
from kvq_compile.kernels.packed import writable

_memory = attrgetter("_length", "trim", "_lineage.held", "_lineage.room", "kind")


def have_room(views: Sequence[Any], tokens: int) -> bool:
    """Return whether ``claim(tokens)`` would do nothing to any of some views, and all are equally long.

    ``False`` where that is not seen at a glance.
    """
    memories = set(map(_memory, views))
    if len({length for length, *_ in memories}) > 1:
        return False
    for length, trim, held, room, kind in memories:
        if trim is not None or held != length or room is None or length + tokens > room:
            return False
        if kind != "grown":
            return False
    on_cpu = views[0].codes.device.type == "cpu"
    return not on_cpu or not any(x.codes.untyped_storage().is_shared() for x in views)


def extended(views: Sequence[QuantizedKV], tokens: int) -> list[QuantizedKV]:
    """Return for each view the one that also shows ``tokens`` that a compiled call has appended behind it."""
    made: list[QuantizedKV] = []
    alike: dict[Any, Any] = {}
    with writable():
        for view in views:
            known = view.__dict__
            form = known.get(FORM) or form_of(view)
            lineage = known["_lineage"]
            if not known.keys() <= OF_EACH or known["trim"] is not None:
                longer = view.extended(tokens)
                lineage.compiled = int(longer.end)
                made.append(longer)
                continue
            about = form, known["_length"], lineage.pages
            found = alike.get(about)
            if found is None:
                found = alike[about] = _about(view, tokens, lineage.pages)
            shape, dtype, device, fills = found
            longer = Tensor._make_wrapper_subclass(QuantizedKV, shape, dtype=dtype, device=device)
            length = shape[2]
            if fills:
                lineage.extend(view, length)
            lineage.held = lineage.compiled = length
            longer.__dict__.update(known, _length=length)
            if len(lineage._views) < MANY:
                lineage._views.append(ref(longer))
            else:
                lineage.add(longer)
            made.append(longer)
    return made


def _about(view: QuantizedKV, tokens: int, pages: int) -> tuple[Any, ...]:
    """Return what the longer views of caches of one form, length and number of packed pages have in common."""
    B, H, held, D = view.shape
    length = held + tokens
    fills = view.page_layout.pages_at(length) > pages
    return (B, H, length, D), view.dtype, view.device, fills
