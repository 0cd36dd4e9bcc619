"""The operators ``torch.ops.kvq.*``: schemas, fakes and dispatch to backends.

All of them are registered when this file is imported, before a graph is captured. A backend is imported when an
operator first runs on its device, so importing this file does not import Triton.

A packed tensor is passed as two lists of tensors, its parts and its calibration constants (`packed`), and a `Layout`.
New tokens are written to slots ``start, start + 1, ...``. The start is given either as the integer ``start`` or as the
first element of ``position`` on the device. Writes take both: ``start`` is then a bound for which there is room.
Where rows have lengths of their own (`rows`), ``position`` may be ``[B, T]``, and a row starts at the first of its own.
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

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import (
    MIN_PAGES,
    PARTS,
    Calibrated,
    Packed,
    page_capacity,
    writable,
)
from kvq_compile.kernels.score import Score

# A backend is a module with five functions, append_, append_both_, attend, importance and dequantize; is_available,
# which says if it can run on this machine; and SCHEMES, the names of the schemes that it implements. In all other cases
# the specification runs, which is slow and runs everywhere.
BACKENDS = {
    "CPU": "kvq_compile.kernels.cpu.backend",
    "CUDA": "kvq_compile.kernels.triton.backend",
}
AUTOCAST = tuple(f"Autocast{device}" for device in BACKENDS)
SPECIFICATION = "kvq_compile.kernels.reference.backend"

LAYOUT, SCORE = get_opaque_type_name(Layout), get_opaque_type_name(Score)
_SCHEMAS = (
    # Quantize x as the first tokens of a new cache for `slots` tokens; one that grows gets room for some more.
    f"quantize(Tensor x, SymInt slots, bool grows, {LAYOUT} layout, Tensor[] calibrated, "
    "Tensor? importance=None, Tensor? query=None) -> Tensor[]",
    # Write x at `start` and quantize the pages that fill up. `after`, the result of the attention that reads the
    # cache before this write, only orders the two: without it Inductor may run that attention later and would have
    # to copy the whole cache first.
    "append_(Tensor(a!)[] cache, Tensor[] calibrated, Tensor x, Tensor? position, SymInt? start, "
    f"{LAYOUT} layout, Tensor? importance=None, Tensor? query=None, Tensor? after=None) -> ()",
    # Write keys and values of the same tokens, each as `append_` does. `calibrated` has the constants of the keys, then
    # those of the values; `query` is for the keys.
    "append_both_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor[] calibrated, Tensor key, Tensor value, "
    f"Tensor? position, SymInt? start, {LAYOUT} key_layout, {LAYOUT} value_layout, Tensor? importance=None, "
    "Tensor? query=None, Tensor? after=None) -> ()",
    # Attend to the tokens before `start` of a cache and to the exact new tokens; writes nothing. `calibrated` has the
    # constants of the keys, then those of the values, then, where the score has sinks, their logits, which broadcast
    # to [B, Hq, T, 1]. Where values take part in the score, as latents do, queries have channels for both.
    "attend(Tensor query, Tensor key, Tensor value, Tensor[] keys, Tensor[] values, Tensor[] calibrated, "
    f"Tensor? mask, Tensor? position, SymInt? start, {SCORE} score, {LAYOUT} key_layout, "
    f"{LAYOUT} value_layout) -> Tensor",
    # Return the importance score of each slot up to the call's last one: the attention that the last queries, of the
    # call and of the cache, pay to it. Undefined unless the call completes a page. `keys` and `calibrated` are empty
    # if there is no cache yet.
    "importance(Tensor query, Tensor key, Tensor[] keys, Tensor[] calibrated, Tensor? mask, Tensor? position, "
    f"SymInt? start, SymInt slots, {SCORE} score, bool causal, int queries, {LAYOUT} key_layout) -> Tensor",
    # Read slots 0 .. length - 1; slots without a token are zero.
    f"dequantize(Tensor[] cache, Tensor[] calibrated, SymInt length, {LAYOUT} layout) -> Tensor",
)

_library = torch.library.Library("kvq", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


class Backend:
    """The functions of a backend, or of the specification where the backend cannot run or lacks a scheme.

    The backend's module is imported when a function is first looked up.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._found: dict[tuple[str, str, str], Callable[..., Any]] = {}

    def find(self, name: str, layout: Layout, other: Layout | None = None) -> Callable[..., Any]:
        """Return the function for caches of one layout, or of two (keys and values)."""
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
    """Append with a backend, after `adaptive` has updated older pages if the layout asks for it."""
    del after
    _adapt(cache, x, position, start, layout, importance)
    relative = Calibrated.of(calibrated, layout)
    append = backend.find("append_", layout)
    append(Packed(*cache[:4]), relative, x, position, start, layout, importance, query)


def append_both_on(
    backend: Backend,
    keys: list[Tensor],
    values: list[Tensor],
    calibrated: list[Tensor],
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    start: int | None,
    key_layout: Layout,
    value_layout: Layout,
    importance: Tensor | None = None,
    query: Tensor | None = None,
    after: Tensor | None = None,
) -> None:
    """Append keys and values of the same tokens with a backend: see `append_on`."""
    del after
    _adapt(keys, key, position, start, key_layout, importance)
    _adapt(values, value, position, start, value_layout, importance)
    of_keys = key_layout.calibrated_tensors
    backend.find("append_both_", key_layout, value_layout)(
        *(Packed(*keys[:4]), Packed(*values[:4])),
        Calibrated.of(calibrated[:of_keys], key_layout),
        Calibrated.of(calibrated[of_keys:], value_layout),
        *(key, value, position, start, key_layout, value_layout, importance, query),
    )


def _adapt(
    cache: list[Tensor],
    x: Tensor,
    position: Tensor | None,
    start: int | None,
    layout: Layout,
    importance: Tensor | None,
) -> None:
    """Let `adaptive` update older pages of a cache before it is written, if its layout asks for it."""
    if layout.adaptive is not None:
        from kvq_compile.kernels.adaptive.hook import before_append

        first = start if position is None else None  # beside a position it is a bound
        before_append(Packed(*cache[:4]), cache[4:], x, position, first, layout, importance)


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
    end = of_keys + value_layout.calibrated_tensors
    output: Tensor = backend.find("attend", key_layout, value_layout)(
        *(query, key, value, Packed(*keys[:4]), Packed(*values[:4])),
        Calibrated.of(calibrated[:of_keys], key_layout),
        Calibrated.of(calibrated[of_keys:end], value_layout),
        *(mask, position, start, score, key_layout, value_layout),
        calibrated[end] if score.has_sinks else None,
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
    with writable():
        if not grows:
            capacity = torch.sym_max(MIN_PAGES, page_capacity(slots, layout))
            return list(Packed.empty(x, capacity, layout))
        cache = list(Packed.growing(x, slots, layout))
        if layout.keep_exact:
            from kvq_compile.kernels.adaptive.originals import new_originals

            cache.append(new_originals(x, slots, layout))
    return cache


def _below_autocast(name: str) -> Callable[..., object]:
    """Return an implementation that runs the op in the dtypes of its arguments: autocast has no effect."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, AUTOCAST[0]))
    for key in AUTOCAST[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(*args: object, **kwargs: object) -> object:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return getattr(torch.ops.kvq, name)(*args, **kwargs)

    return run


for _name in ("quantize", "append_", "append_both_", "attend", "importance", "dequantize"):
    for _key in AUTOCAST:
        _library.impl(_name, _below_autocast(_name), _key)

for _device, _module in BACKENDS.items():
    _library.impl("quantize", _quantize, _device)
    _backend = Backend(_module)
    _library.impl("append_", partial(append_on, _backend), _device)
    _library.impl("append_both_", partial(append_both_on, _backend), _device)
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
@torch.library.register_fake("kvq::append_both_", lib=_library)
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
append_both_ = torch.ops.kvq.append_both_.default
attend = torch.ops.kvq.attend.default
dequantize = torch.ops.kvq.dequantize.default
importance = torch.ops.kvq.importance.default
