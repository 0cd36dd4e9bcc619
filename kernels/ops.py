"""Declare the operators, their shapes and their dispatch.

Schemas, fakes and registrations live here so that they exist before a graph is captured. An
implementation is imported when the dispatcher first needs it: importing this file imports no Triton.

Every op names the packed tensor by its four parts (`PageLayout` gives their shapes) and its layout as
text. New tokens go to slots ``start, start + 1, ...``: the graph knows ``start`` either as an integer
or as the first element of ``position`` ``[T]`` on the device, never both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_compile.kernels.spec import PageLayout

PARTS = ("codes", "params", "exact", "cursor")
MIN_PAGES = 2  # a page count of 0 or 1 would be specialised on when the cache enters a graph

_SCHEMAS = (
    # Quantize x as the first tokens of a new cache for `slots` tokens, with spare room if it grows.
    "quantize(Tensor x, SymInt slots, bool grows, str layout) -> (Tensor, Tensor, Tensor, Tensor)",
    # Write x behind the tokens held, quantizing the pages that fill up. `after`, the result of the attention
    # that still reads the cache as it was, only orders the two: without it Inductor may run that attention
    # later, and then has to copy the whole cache first.
    "append_(Tensor(a!) codes, Tensor(b!) params, Tensor(c!) exact, Tensor(d!) cursor, Tensor x, "
    "Tensor? position, SymInt? start, str layout, Tensor? after=None) -> ()",
    # Attend to the tokens before `start` of a cache and to the exact new ones; writes nothing.
    "attend(Tensor query, Tensor key, Tensor value, "
    "Tensor key_codes, Tensor key_params, Tensor key_exact, Tensor key_cursor, "
    "Tensor value_codes, Tensor value_params, Tensor value_exact, Tensor value_cursor, "
    "Tensor? mask, Tensor? position, SymInt? start, float scale, str key_layout, str value_layout) -> Tensor",
    # Read slots 0 .. length - 1; those without a token are zero.
    "dequantize(Tensor codes, Tensor params, Tensor exact, Tensor cursor, SymInt length, str layout) -> Tensor",
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
    params = like.new_zeros(B, H, capacity, *layout.params_shape, 2, dtype=torch.float16)
    exact = like.new_zeros(B, H, layout.exact_rows, layout.head_dim)
    return codes, params, exact, like.new_zeros(2, dtype=torch.int32)


def page_capacity(slots: int | torch.SymInt, grows: bool, layout: PageLayout) -> int | torch.SymInt:
    """Return the pages to allocate for ``slots`` tokens: what they fill, an eighth more if the cache grows."""
    pages = torch.sym_max(0, (slots - layout.sinks - layout.window) // layout.page_size)
    return torch.sym_max(MIN_PAGES, pages + pages // 8 + 2 if grows else pages)


def _quantize(
    x: Tensor, slots: int, grows: bool, layout: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    page_layout = PageLayout.parse(layout)
    parts = new_parts(x, page_capacity(slots, grows, page_layout), page_layout)
    append_(*parts, x, None, 0, layout)
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
) -> None:
    from kvq_compile.kernels import blocked

    first = blocked.first_slot(position, start)
    blocked.append_(codes, params, exact, cursor, x, first, PageLayout.parse(layout))


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
) -> None:
    from kvq_compile.kernels import quantize_kv

    quantize_kv.append_(codes, params, exact, cursor, x, position, start, PageLayout.parse(layout))


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
) -> Tensor:
    from kvq_compile.kernels import blocked

    return blocked.attend(
        query,
        key,
        value,
        (key_codes, key_params, key_exact, key_cursor),
        (value_codes, value_params, value_exact, value_cursor),
        mask,
        blocked.first_slot(position, start),
        scale,
        PageLayout.parse(key_layout),
        PageLayout.parse(value_layout),
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
) -> Tensor:
    from kvq_compile.kernels import attention

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
        PageLayout.parse(key_layout),
        PageLayout.parse(value_layout),
    )


def _dequantize(
    codes: Tensor, params: Tensor, exact: Tensor, cursor: Tensor, length: int, layout: str
) -> Tensor:
    from kvq_compile.kernels import reference

    return reference.read(codes, params, exact, cursor, length, PageLayout.parse(layout))


for _device in ("CPU", "CUDA"):
    _library.impl("quantize", _quantize, _device)
    _library.impl("dequantize", _dequantize, _device)
_library.impl("append_", _append_cpu, "CPU")
_library.impl("append_", _append_cuda, "CUDA")
_library.impl("attend", _attend_cpu, "CPU")
_library.impl("attend", _attend_cuda, "CUDA")


@torch.library.register_fake("kvq::quantize", lib=_library)
def _(x: Tensor, slots: int, grows: bool, layout: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    page_layout = PageLayout.parse(layout)
    return new_parts(x, page_capacity(slots, grows, page_layout), page_layout)


@torch.library.register_fake("kvq::append_", lib=_library)
def _(*args: object) -> None:
    del args


@torch.library.register_fake("kvq::attend", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    del key, rest
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.register_fake("kvq::dequantize", lib=_library)
def _(
    codes: Tensor, params: Tensor, exact: Tensor, cursor: Tensor, length: int, layout: str
) -> Tensor:
    del codes, params, cursor, layout
    return exact.new_empty(*exact.shape[:2], length, exact.shape[3])


quantize = torch.ops.kvq.quantize.default
append_ = torch.ops.kvq.append_.default
attend = torch.ops.kvq.attend.default
dequantize = torch.ops.kvq.dequantize.default
