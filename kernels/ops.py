"""Declare the operators, their shapes and their dispatch.

Schemas, fakes and registrations live here so that they exist before a graph is captured. A backend is imported when
the dispatcher first needs it: importing this file imports no Triton.

A packed tensor comes as two lists of tensors, its parts and what it is coded relative to (`packed`), and a `Layout`.
New tokens go to slots ``start, start + 1, ...``: the graph knows ``start`` either as an integer or as the first
element of ``position`` ``[T]`` on the device, never both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._library.opaque_object import get_opaque_type_name

from kvq_compile.kernels.layout import Layout, Score
from kvq_compile.kernels.packed import (
    PARTS,
    Calibrated,
    Packed,
    page_capacity,
    writable,
)

# Each backend is a module of four functions, append_, attend, importance and dequantize, of is_available, which says
# whether it can run here, and of SCHEMES, the names of those that it has code for. Where it cannot run, and for other
# schemes, the specification, which runs everywhere and is slow, stands in.
BACKENDS = {
    "CPU": "kvq_compile.kernels.cpu.backend",
    "CUDA": "kvq_compile.kernels.triton.backend",
}
AUTOCAST = tuple(f"Autocast{device}" for device in BACKENDS)
SPECIFICATION = "kvq_compile.kernels.reference.backend"

LAYOUT, SCORE = get_opaque_type_name(Layout), get_opaque_type_name(Score)
_SCHEMAS = (
    # Quantize x as the first tokens of a new cache for `slots` tokens, with spare room if it grows.
    f"quantize(Tensor x, SymInt slots, bool grows, {LAYOUT} layout, Tensor[] calibrated, "
    "Tensor? importance=None, Tensor? query=None) -> Tensor[]",
    # Write x behind the tokens held, quantizing the pages that fill up. `after`, the result of the attention
    # that still reads the cache as it was, only orders the two: without it Inductor may run that attention
    # later, and then has to copy the whole cache first.
    "append_(Tensor(a!)[] cache, Tensor[] calibrated, Tensor x, Tensor? position, SymInt? start, "
    f"{LAYOUT} layout, Tensor? importance=None, Tensor? query=None, Tensor? after=None) -> ()",
    # Attend to the tokens before `start` of a cache and to the exact new ones; writes nothing. `calibrated` is that
    # of the keys and, behind it, that of the values.
    "attend(Tensor query, Tensor key, Tensor value, Tensor[] keys, Tensor[] values, Tensor[] calibrated, "
    f"Tensor? mask, Tensor? position, SymInt? start, {SCORE} score, {LAYOUT} key_layout, "
    f"{LAYOUT} value_layout) -> Tensor",
    # Say how much attention the last queries, the call's and those held, pay to each slot up to the call's last;
    # nothing of use unless a page is to be quantized. Without keys held, `keys` and `calibrated` are empty.
    "importance(Tensor query, Tensor key, Tensor[] keys, Tensor[] calibrated, Tensor? mask, Tensor? position, "
    f"SymInt? start, SymInt slots, {SCORE} score, bool causal, int queries, {LAYOUT} key_layout) -> Tensor",
    # Read slots 0 .. length - 1; those without a token are zero.
    f"dequantize(Tensor[] cache, Tensor[] calibrated, SymInt length, {LAYOUT} layout) -> Tensor",
)

_library = torch.library.Library("kvq", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


class Backend:
    """The functions of a backend's module, or of the specification where the backend cannot run or knows no scheme.

    The module is imported when a function is first looked up.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._found: dict[tuple[str, str, str], Callable[..., Any]] = {}

    def find(self, name: str, layout: Layout, other: Layout | None = None) -> Callable[..., Any]:
        """Return the function for caches of a layout, or of two."""
        key = name, layout.scheme.name, (other or layout).scheme.name
        function = self._found.get(key)
        if function is None:
            module = import_module(self._module)
            unknown = set(key[1:]) - module.SCHEMES
            if unknown:
                warnings.warn(
                    f"caches of scheme {', '.join(sorted(unknown))} run as slow torch operations: "
                    f"{self._module} has no code for them",
                    stacklevel=2,
                )
            if unknown or not module.is_available():
                module = import_module(SPECIFICATION)
            function = self._found[key] = getattr(module, name)
        return function


def append_on(
    backend: Backend,
    cache: list[Tensor],
    calibrated: list[Tensor],
    x: Tensor,
    position: Tensor | None,
    start: int | None,
    layout: Layout,
    importance: Tensor | None = None,
    query: Tensor | None = None,
    after: Tensor | None = None,
) -> None:
    """Append by a backend; first do to older pages what the layout asks for, which is `adaptive`'s to know."""
    del after
    packed = Packed(*cache[:4])
    if layout.adaptive is not None:
        from kvq_compile.kernels.adaptive.hook import before_append

        before_append(packed, cache[4:], x, position, start, layout, importance)
    relative = Calibrated.of(calibrated, layout)
    append = backend.find("append_", layout)
    append(packed, relative, x, position, start, layout, importance, query)


def _attend_on(
    backend: Backend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    calibrated: list[Tensor],
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    score: Score,
    key_layout: Layout,
    value_layout: Layout,
) -> Tensor:
    of_keys = key_layout.calibrated_tensors
    output: Tensor = backend.find("attend", key_layout, value_layout)(
        *(query, key, value, Packed(*keys[:4]), Packed(*values[:4])),
        Calibrated.of(calibrated[:of_keys], key_layout),
        Calibrated.of(calibrated[of_keys:], value_layout),
        *(mask, position, start, score, key_layout, value_layout),
    )
    return output


def _importance_on(
    backend: Backend,
    query: Tensor,
    key: Tensor,
    keys: list[Tensor],
    calibrated: list[Tensor],
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    slots: int,
    score: Score,
    causal: bool,
    queries: int,
    key_layout: Layout,
) -> Tensor:
    packed = Packed(*keys[:4]) if keys else None
    relative = Calibrated.of(calibrated, key_layout) if keys else Calibrated()
    weights: Tensor = backend.find("importance", key_layout)(
        *(query, key, packed, relative, mask, position, start, slots),
        *(score, causal, queries, key_layout),
    )
    return weights


def _dequantize_on(
    backend: Backend, cache: list[Tensor], calibrated: list[Tensor], length: int, layout: Layout
) -> Tensor:
    tokens: Tensor = backend.find("dequantize", layout)(
        Packed(*cache[:4]), Calibrated.of(calibrated, layout), length, layout
    )
    return tokens


def _quantize(
    x: Tensor,
    slots: int,
    grows: bool,
    layout: Layout,
    calibrated: list[Tensor],
    importance: Tensor | None = None,
    query: Tensor | None = None,
) -> list[Tensor]:
    cache = _new_cache(x, slots, grows, layout)
    append_(cache, calibrated, x, None, 0, layout, importance, query)
    return cache


def _new_cache(x: Tensor, slots: int, grows: bool, layout: Layout) -> list[Tensor]:
    capacity = page_capacity(slots, grows, layout)
    with writable():
        cache = list(Packed.empty(x, capacity, layout))
        if layout.keep_exact:
            from kvq_compile.kernels.adaptive.originals import new_originals

            cache.append(new_originals(x, capacity, layout))
    return cache


def _below_autocast(name: str) -> Callable[..., object]:
    """Return an implementation that runs the op in the dtypes it is given, whatever autocast says."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, AUTOCAST[0]))
    for key in AUTOCAST[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(*args: object, **kwargs: object) -> object:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return getattr(torch.ops.kvq, name)(*args, **kwargs)

    return run


for _name in ("quantize", "append_", "attend", "importance", "dequantize"):
    for _key in AUTOCAST:
        _library.impl(_name, _below_autocast(_name), _key)

for _device, _module in BACKENDS.items():
    _library.impl("quantize", _quantize, _device)
    _backend = Backend(_module)
    _library.impl("append_", partial(append_on, _backend), _device)
    _library.impl("attend", partial(_attend_on, _backend), _device)
    _library.impl("importance", partial(_importance_on, _backend), _device)
    _library.impl("dequantize", partial(_dequantize_on, _backend), _device)


@torch.library.register_fake("kvq::quantize", lib=_library)
def _(
    x: Tensor, slots: int, grows: bool, layout: Layout, *rest: object, **more: object
) -> list[Tensor]:
    del rest, more
    return _new_cache(x, slots, grows, layout)


@torch.library.register_fake("kvq::append_", lib=_library)
def _(*args: object, **kwargs: object) -> None:
    del args, kwargs


@torch.library.register_fake("kvq::attend", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    del key, rest
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.register_fake("kvq::importance", lib=_library)
def _(
    query: Tensor,
    key: Tensor,
    keys: list[Tensor],
    calibrated: list[Tensor],
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    slots: int,
    *rest: object,
) -> Tensor:
    del keys, calibrated, mask, position, start, rest
    return query.new_empty(*key.shape[:2], slots, dtype=torch.float32)


@torch.library.register_fake("kvq::dequantize", lib=_library)
def _(cache: list[Tensor], calibrated: list[Tensor], length: int, layout: Layout) -> Tensor:
    del calibrated, layout
    exact = cache[PARTS.index("exact")]
    return exact.new_empty(*exact.shape[:2], length, exact.shape[3])


quantize = torch.ops.kvq.quantize.default
append_ = torch.ops.kvq.append_.default
attend = torch.ops.kvq.attend.default
dequantize = torch.ops.kvq.dequantize.default
importance = torch.ops.kvq.importance.default
