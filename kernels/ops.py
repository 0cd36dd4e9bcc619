"""Declare the operators, their shapes and their dispatch.

Schemas, fakes and registrations live here so that they exist before a graph is captured. An
implementation is imported when the dispatcher first needs it: importing this file imports no Triton.

Every op names the packed tensor by its four parts (`PageLayout` gives their shapes) and its layout as
text; where the layout has tables they come with it, and where it holds queries those of new keys. New tokens go
to slots ``start, start + 1, ...``: the graph knows ``start`` either as an integer or as the first element of
``position`` ``[T]`` on the device, never both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_compile.kernels.layout import PageLayout
from kvq_compile.kernels.reference.frame import Frame

PARTS = ("codes", "params", "exact", "cursor")
FRAME = ("tables", "shift")  # what packed tokens are coded relative to, where the layout has it
ORIGINALS = "originals"  # exact packed tokens in host memory, where the layout has them
MIN_PAGES = 2  # a page count of 0 or 1 would be specialised on when the cache enters a graph

_SCHEMAS = (
    # Quantize x as the first tokens of a new cache for `slots` tokens, with spare room if it grows.
    "quantize(Tensor x, SymInt slots, bool grows, str layout, Tensor? tables=None, Tensor? shift=None, "
    "Tensor? importance=None, Tensor? query=None) -> (Tensor, Tensor, Tensor, Tensor)",
    # Write x behind the tokens held, quantizing the pages that fill up, and, where the layout says so, taking
    # bits from older pages that attention has moved away from. `after`, the result of the attention
    # that still reads the cache as it was, only orders the two: without it Inductor may run that attention
    # later, and then has to copy the whole cache first.
    "append_(Tensor(a!) codes, Tensor(b!) params, Tensor(c!) exact, Tensor(d!) cursor, Tensor x, "
    "Tensor? position, SymInt? start, str layout, Tensor? after=None, Tensor? tables=None, Tensor? shift=None, "
    "Tensor? importance=None, Tensor(e!)? originals=None, Tensor? query=None) -> ()",
    # Copy the tokens of the pages that x fills to host memory, with spare room if the cache grows.
    "originals(Tensor x, SymInt slots, bool grows, str layout) -> Tensor",
    # Attend to the tokens before `start` of a cache and to the exact new ones; writes nothing.
    "attend(Tensor query, Tensor key, Tensor value, "
    "Tensor key_codes, Tensor key_params, Tensor key_exact, Tensor key_cursor, "
    "Tensor value_codes, Tensor value_params, Tensor value_exact, Tensor value_cursor, "
    "Tensor? mask, Tensor? position, SymInt? start, float scale, str key_layout, str value_layout, "
    "Tensor? key_tables=None, Tensor? key_shift=None, Tensor? value_tables=None) -> Tensor",
    # Say how much attention the last queries, the call's and those held, pay to each slot up to the call's last;
    # nothing of use unless a page is to be quantized.
    "importance(Tensor query, Tensor key, Tensor[] key_parts, Tensor? mask, Tensor? position, SymInt? start, "
    "SymInt slots, float scale, bool causal, int queries, str key_layout, Tensor? tables=None, "
    "Tensor? shift=None) -> Tensor",
    # Read slots 0 .. length - 1; those without a token are zero.
    "dequantize(Tensor codes, Tensor params, Tensor exact, Tensor cursor, SymInt length, str layout, "
    "Tensor? tables=None, Tensor? shift=None) -> Tensor",
)

_library = torch.library.Library("kvq", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


def new_parts(
    like: Tensor, capacity: int | torch.SymInt, layout: PageLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate an empty cache for tokens like ``like`` ``[B, H, *, D]``, with room for ``capacity`` pages."""
    B, H = like.shape[:2]
    codes = like.new_zeros(B, H, capacity, layout.rows, layout.units, dtype=torch.int16)
    params_dtype = torch.uint8 if layout.has_byte_params else torch.float16
    params_shape = (*layout.params_shape, layout.param_numbers)
    params = like.new_zeros(B, H, capacity, *params_shape, dtype=params_dtype)
    exact = like.new_zeros(B, H, layout.exact_rows, layout.head_dim)
    return codes, params, exact, like.new_zeros(2, dtype=torch.int32)


def page_capacity(slots: int | torch.SymInt, grows: bool, layout: PageLayout) -> int | torch.SymInt:
    """Return the pages to allocate for ``slots`` tokens: what they fill, an eighth more if the cache grows."""
    pages = torch.sym_max(0, (slots - layout.sinks - layout.window) // layout.page_size)
    return torch.sym_max(MIN_PAGES, pages + pages // 8 + 2 if grows else pages)


def make_frame(tables: Tensor | None, shift: Tensor | None, layout: PageLayout) -> Frame | None:
    """Return what a layout's tokens are coded relative to.

    Raises:
        ValueError: Tables or shift are missing, or there are some that the layout does not know.
    """
    if (tables is not None) != layout.has_tables or (shift is not None) != layout.rotary:
        given = [name for name, x in (("tables", tables), ("shift", shift)) if x is not None]
        raise ValueError(
            f"tables and shift must be given as the layout says, {layout}, got {given}"
        )
    return None if tables is None else Frame(tables, shift)


def _quantize(
    x: Tensor,
    slots: int,
    grows: bool,
    layout: str,
    tables: Tensor | None = None,
    shift: Tensor | None = None,
    importance: Tensor | None = None,
    query: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    page_layout = PageLayout.parse(layout)
    parts = new_parts(x, page_capacity(slots, grows, page_layout), page_layout)
    append_(*parts, x, None, 0, layout, None, tables, shift, importance, None, query)
    return parts


def _append_cpu(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    x: Tensor,
    position: Tensor | None,
    start: int | None,
    layout: str,
    after: Tensor | None = None,
    tables: Tensor | None = None,
    shift: Tensor | None = None,
    importance: Tensor | None = None,
    originals: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    from kvq_compile.kernels.cpu import attend as blocked

    page_layout = PageLayout.parse(layout)
    first = blocked.first_slot(position, start)
    frame = make_frame(tables, shift, page_layout)
    blocked.append_(
        codes, params, exact, cursor, x, first, page_layout, frame, importance, originals, query
    )


def _append_cuda(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    x: Tensor,
    position: Tensor | None,
    start: int | None,
    layout: str,
    after: Tensor | None = None,
    tables: Tensor | None = None,
    shift: Tensor | None = None,
    importance: Tensor | None = None,
    originals: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    from kvq_compile.kernels.adaptive.originals import keep_, renew_
    from kvq_compile.kernels.triton import append as quantize_kv
    from kvq_compile.kernels.triton import requantize as requantize_mixed

    page_layout = PageLayout.parse(layout)
    frame = make_frame(tables, shift, page_layout)
    if originals is not None:
        assert start is not None  # only grown caches have originals
        renew_(codes, params, cursor, originals, start, x.shape[2], page_layout, importance)
        keep_(originals, exact, cursor, x, start, page_layout)
    requantize_mixed.requantize_older_(
        codes, params, cursor, position, start, x.shape[2], page_layout, importance
    )
    quantize_kv.append_(
        codes, params, exact, cursor, x, position, start, page_layout, frame, importance, query
    )


def _originals(x: Tensor, slots: int, grows: bool, layout: str) -> Tensor:
    from kvq_compile.kernels.adaptive.originals import new_originals

    page_layout = PageLayout.parse(layout)
    capacity, first = page_capacity(slots, grows, page_layout), page_layout.sinks
    originals = new_originals(x, capacity, page_layout)
    pages = page_layout.pages_at(x.shape[2])
    tokens = x[:, :, first : first + pages * page_layout.page_size]
    originals[:, :, :pages] = tokens.unflatten(2, (pages, page_layout.page_size)).cpu()
    return originals


def _attend_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_codes: Tensor,
    key_params: Tensor,
    key_exact: Tensor,
    key_cursor: Tensor,
    value_codes: Tensor,
    value_params: Tensor,
    value_exact: Tensor,
    value_cursor: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    scale: float,
    key_layout: str,
    value_layout: str,
    key_tables: Tensor | None = None,
    key_shift: Tensor | None = None,
    value_tables: Tensor | None = None,
) -> Tensor:
    from kvq_compile.kernels.cpu import attend as blocked

    layouts = PageLayout.parse(key_layout), PageLayout.parse(value_layout)
    return blocked.attend(
        query,
        key,
        value,
        (key_codes, key_params, key_exact, key_cursor),
        (value_codes, value_params, value_exact, value_cursor),
        mask,
        blocked.first_slot(position, start),
        scale,
        *layouts,
        make_frame(key_tables, key_shift, layouts[0]),
        make_frame(value_tables, None, layouts[1]),
    )


def _attend_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_codes: Tensor,
    key_params: Tensor,
    key_exact: Tensor,
    key_cursor: Tensor,
    value_codes: Tensor,
    value_params: Tensor,
    value_exact: Tensor,
    value_cursor: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    scale: float,
    key_layout: str,
    value_layout: str,
    key_tables: Tensor | None = None,
    key_shift: Tensor | None = None,
    value_tables: Tensor | None = None,
) -> Tensor:
    from kvq_compile.kernels.triton import attend as attention

    layouts = PageLayout.parse(key_layout), PageLayout.parse(value_layout)
    return attention.attend(
        query,
        key,
        value,
        (key_codes, key_params, key_exact, key_cursor),
        (value_codes, value_params, value_exact, value_cursor),
        mask,
        position,
        start,
        scale,
        *layouts,
        make_frame(key_tables, key_shift, layouts[0]),
        make_frame(value_tables, None, layouts[1]),
    )


def _importance_cpu(
    query: Tensor,
    key: Tensor,
    key_parts: list[Tensor],
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    slots: int,
    scale: float,
    causal: bool,
    queries: int,
    key_layout: str,
    tables: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    from kvq_compile.kernels.cpu import attend as blocked
    from kvq_compile.kernels.cpu import native as cpu_pages
    from kvq_compile.kernels.reference.importance import recent_importance

    layout = PageLayout.parse(key_layout)
    parts = (key_parts[0], key_parts[1], key_parts[2], key_parts[3]) if key_parts else None
    frame = make_frame(tables, shift, layout) if parts else None
    first = blocked.first_slot(position, start)
    about = first, slots, scale, causal, queries, layout, frame
    return recent_importance(query, key, parts, mask, *about, cpu_pages.unpack)


def _importance_cuda(
    query: Tensor,
    key: Tensor,
    key_parts: list[Tensor],
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    slots: int,
    scale: float,
    causal: bool,
    queries: int,
    key_layout: str,
    tables: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    layout = PageLayout.parse(key_layout)
    if not key_parts:  # a few rows times the call's own keys, and nothing to wait for
        from kvq_compile.kernels.reference.importance import recent_importance

        about = 0, slots, scale, causal, queries, layout, None
        return recent_importance(query, key, None, mask, *about)
    from kvq_compile.kernels.triton import importance as importance_mixed

    codes, params, exact, cursor = key_parts
    return importance_mixed.recent_importance(
        *(query, key, (codes, params, exact, cursor), mask, position, start, slots),
        *(scale, causal, queries, layout),
    )


def _dequantize(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    length: int,
    layout: str,
    tables: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    from kvq_compile.kernels.reference import cache as reference

    page_layout = PageLayout.parse(layout)
    frame = make_frame(tables, shift, page_layout)
    return reference.read(codes, params, exact, cursor, length, page_layout, frame)


for _device in ("CPU", "CUDA"):
    _library.impl("quantize", _quantize, _device)
    _library.impl("dequantize", _dequantize, _device)
    _library.impl("originals", _originals, _device)
_library.impl("append_", _append_cpu, "CPU")
_library.impl("append_", _append_cuda, "CUDA")
_library.impl("importance", _importance_cpu, "CPU")
_library.impl("importance", _importance_cuda, "CUDA")
_library.impl("attend", _attend_cpu, "CPU")
_library.impl("attend", _attend_cuda, "CUDA")


@torch.library.register_fake("kvq::quantize", lib=_library)
def _(
    x: Tensor,
    slots: int,
    grows: bool,
    layout: str,
    tables: Tensor | None = None,
    shift: Tensor | None = None,
    importance: Tensor | None = None,
    query: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del tables, shift, importance, query
    page_layout = PageLayout.parse(layout)
    return new_parts(x, page_capacity(slots, grows, page_layout), page_layout)


@torch.library.register_fake("kvq::append_", lib=_library)
def _(*args: object) -> None:
    del args


@torch.library.register_fake("kvq::attend", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    del key, rest
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.register_fake("kvq::importance", lib=_library)
def _(
    query: Tensor,
    key: Tensor,
    key_parts: list[Tensor],
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    slots: int,
    *rest: object,
) -> Tensor:
    del key_parts, mask, position, start, rest
    return query.new_empty(*key.shape[:2], slots, dtype=torch.float32)


@torch.library.register_fake("kvq::originals", lib=_library)
def _(x: Tensor, slots: int, grows: bool, layout: str) -> Tensor:
    from kvq_compile.kernels.adaptive.originals import new_originals

    page_layout = PageLayout.parse(layout)
    return new_originals(x, page_capacity(slots, grows, page_layout), page_layout)


@torch.library.register_fake("kvq::dequantize", lib=_library)
def _(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    length: int,
    layout: str,
    tables: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    del codes, params, cursor, layout, tables, shift
    return exact.new_empty(*exact.shape[:2], length, exact.shape[3])


quantize = torch.ops.kvq.quantize.default
append_ = torch.ops.kvq.append_.default
attend = torch.ops.kvq.attend.default
dequantize = torch.ops.kvq.dequantize.default
importance = torch.ops.kvq.importance.default
originals = torch.ops.kvq.originals.default
