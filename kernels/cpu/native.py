"""Calls into the CPU backend's library; `wire.h` lists the arguments.

The arguments of a call are an array of 64-bit words. A layout is a run of words, computed once. A tensor is its
address, the bytes from there to the end of its memory, its dtype, sizes and strides. C++ checks all of them before it
touches memory, and returns an error message.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from functools import cache

import torch
from torch import Tensor

from kvq_compile.kernels.cpu import library
from kvq_compile.kernels.cpu.packed import PackedTensor
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import FLAT, page_room, page_shapes
from kvq_compile.kernels.schemes import Channelwise, Codebook, Mixed
from kvq_compile.kernels.score import Bend
from kvq_compile.kernels.tables import section

PARALLEL_FROM = 1 << 16  # packed elements from which several threads are faster
DTYPES = {  # the same constants as in numbers.h
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int16: 4,
    torch.uint8: 5, torch.int32: 6,
}  # fmt: skip

# The lists of wire.h, compared with the library when it is loaded: a tensor and its dimensions, or a word.
LAYOUT = (
    "is_key codebook mixed bits trits fp8 levels couple rows row_length row_places row_words groups members "
    "param_elements byte_params group_size by_token shrink_bits head_dim page_size sinks ring exact_rows rotary "
    "table_words order mean scale inverse margin frequency book min_bits max_bits code_rows rank_field outliers "
    "outlier_fields fit soften e5m3 channelwise pairs takes_mean mean_pairs search"
)
PACKED = "codes:5 params:6 exact:4 tables:2 shift:1 held pages"
ATTEND = (
    "query:4 coded:4 constant:4 bias:4 sink_logits:4 new_key:4 new_value:4 scratch:1 packed_out:4 weight_out:4 "
    "exact_out:4 start visible splits threads cap_bits lowest_bits highest_bits"
)
PAGES = "elements:5 new_tokens:4 importance:3 bounds:1 first_page start rotated threads"
INTERFACE = f"layout {LAYOUT} packed {PACKED} attend {ATTEND} pages {PAGES} "
PAIRS = {"none": 0, "halves": 1, "neighbours": 2}  # the same constants as in pack_channelwise.h
TABLES = ("order", "mean", "scale", "inverse", "margin", "frequency", "codebook")

Words = tuple[int, ...]


@cache
def _functions() -> dict[str, ctypes._NamedFuncPointer]:
    """Return the library's functions by name.

    Raises:
        RuntimeError: There is no library, or it has another interface.
    """
    loaded = library.load()
    if loaded is None:
        raise RuntimeError("the CPU backend's library must be built, but could not be")
    loaded.kvq_interface.restype = ctypes.c_char_p
    if loaded.kvq_interface().decode() != INTERFACE:
        raise RuntimeError("the library must have the interface of native.py, got another one")
    names = ("attend", "to_coded", "from_coded", "unpack", "quantize", "find_state")
    functions = {name: getattr(loaded, f"kvq_{name}") for name in names}
    for function in functions.values():
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_char_p
    return functions


def _call(name: str, words: Words) -> None:
    """Call a function.

    Raises:
        ValueError: It says that something is wrong with what it was handed.
    """
    held = array("q", words)
    wrong = _functions()[name](held.buffer_info()[0], len(held))
    if wrong is not None:
        raise ValueError(wrong.decode())


def _tensor(x: Tensor) -> Words:
    size = x.element_size()
    behind = x.untyped_storage().nbytes() - x.storage_offset() * size
    return x.data_ptr(), behind, DTYPES[x.dtype], *x.shape, *x.stride()


def _pages(x: Tensor, pages: int, shape: tuple[int, ...]) -> Words:
    """Return the words of pages ``[B, H, pages, *shape]``, which may be flat."""
    if x.dim() != FLAT:
        return _tensor(x)
    address, behind, dtype, B, H, _, *strides = _tensor(x)
    return address, behind, dtype, B, H, pages, *shape, *strides[:2], *page_strides(shape)


@cache
def page_strides(shape: tuple[int, ...]) -> Words:
    """Return the strides of flat pages of a shape: of the pages, then of its axes."""
    return tuple(math.prod(shape[axis:]) for axis in range(len(shape) + 1))


@cache
def _no_tensor(dims: int) -> Words:
    return (0,) * (3 + 2 * dims)


def _maybe(x: Tensor | None, dims: int) -> Words:
    return _no_tensor(dims) if x is None else _tensor(x)


@cache
def _float_bits(x: float) -> int:
    """Return the bits of a number in fp32, infinite where it is too large for that."""
    return int(torch.tensor(x, dtype=torch.float32, device="cpu").view(torch.int32))


@cache
def _layout(layout: Layout) -> Words:
    """Return the words of `LAYOUT`."""
    mixed = layout.scheme if isinstance(layout.scheme, Mixed) else None
    channelwise = layout.scheme if isinstance(layout.scheme, Channelwise) else None
    fp8, codebook = layout.params == "fp8", isinstance(layout.scheme, Codebook)
    shrink = _float_bits((1.0 - layout.clip) / 2.0)
    firsts = [section(name, layout.head_dim, layout.has_frequencies)[0] for name in TABLES]
    table_words = 0
    if layout.has_tables:
        book = layout.head_dim * (layout.levels + 1) // 2 if codebook else 0
        table_words = firsts[-1] + book
    values = (
        *(layout.role == "key", codebook, mixed is not None, sum(layout.planes)),
        *(layout.packing == "trits", fp8, layout.levels, layout.couple),
        *(layout.rows, layout.row_length, layout.row_places, layout.row_words),
        *layout.params_shape,
        *(layout.param_elements, layout.has_byte_params, layout.group_size),
        *(layout.grouping == "token", shrink, layout.head_dim, layout.page_size),
        *(layout.sinks, layout.ring, layout.exact_rows, layout.rotary, table_words, *firsts),
        *((mixed.min_bits, mixed.max_bits, layout.code_rows) if mixed else (0, 0, 0)),
        *((mixed.rank_field, mixed.outliers, layout.outlier_fields) if mixed else (0, 0, 0)),
        *((mixed.fit, mixed.soften) if mixed else (0, 0)),
        *(
            layout.params == "e5m3",
            channelwise is not None,
            PAIRS[channelwise.pairs] if channelwise else 0,
            layout.takes_mean,
            layout.mean_pairs,
            layout.search,
        ),
    )
    return tuple(int(value) for value in values)


def _packed(packed: PackedTensor) -> Words:
    layout, (codes, params, exact, _) = packed.layout, packed.parts
    tables, shift = packed.calibrated.tables, packed.calibrated.shift
    pages, (of_codes, of_params, _) = page_room(packed.parts, layout), page_shapes(layout)
    return (
        *_layout(layout), *_pages(codes, pages, of_codes), *_pages(params, pages, of_params), *_tensor(exact),
        *_maybe(tables, 2), *_maybe(shift, 1), packed.held, packed.pages,
    )  # fmt: skip


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements > PARALLEL_FROM else 1


def _call_on_pages(
    name: str,
    packed: PackedTensor,
    elements: Tensor,
    first_page: int,
    *,
    new_tokens: Tensor | None = None,
    start: int = 0,
    importance: Tensor | None = None,
    bounds: Tensor | None = None,
    rotated: bool = False,
) -> None:
    words = (
        *_packed(packed), *_tensor(elements), *_maybe(new_tokens, 4), *_maybe(importance, 3),
        *_maybe(bounds, 1), first_page, start, int(rotated), _threads(elements.numel()),
    )  # fmt: skip
    _call(name, words)


def _new_pages(packed: PackedTensor, count: int, channels_first: bool = False) -> Tensor:
    """Allocate fp32 pages ``[B, H, count, N, D]``, with the memory order ``[..., D, N]`` if ``channels_first``."""
    B, H = packed.parts.codes.shape[:2]
    tile = (packed.layout.page_size, packed.layout.head_dim)
    shape = (B, H, count, *(reversed(tile) if channels_first else tile))
    pages = torch.empty(shape, dtype=torch.float32, device="cpu")
    return pages.transpose(-1, -2) if channels_first else pages


def unpack(packed: PackedTensor, pages: slice, rotated: bool = True) -> Tensor:
    """Unpack pages to elements ``[B, H, pages, N, D]`` (fp32), before any inverse transform.

    With ``rotated``, mean and scale of rotary keys are applied and the keys rotated to their position; and the rotated
    mean is added that was taken off.
    """
    layout = packed.layout
    of_values = layout.role == "value" and not isinstance(layout.scheme, Mixed)
    channels_first = of_values or isinstance(layout.scheme, Channelwise)
    elements = _new_pages(packed, pages.stop - pages.start, channels_first)
    _call_on_pages("unpack", packed, elements, pages.start, rotated=rotated)
    return elements


def to_coded(packed: PackedTensor, pages: slice, x: Tensor, start: int) -> Tensor:
    """Return tokens of pages normalised by the tables, before a Hadamard transform, ``[B, H, pages, N, D]`` (fp32).

    Args:
        packed: The cache; tokens before ``start`` are in its ring.
        pages: The pages.
        x: New tokens, ``[B, H, T, D]``, in slots from ``start`` on.
        start: Slot of the first of them.
    """
    elements = _new_pages(packed, pages.stop - pages.start)
    x = _with_contiguous_rows(x)
    _call_on_pages("to_coded", packed, elements, pages.start, new_tokens=x, start=start)
    return elements


def from_coded_(packed: PackedTensor, first_page: int, elements: Tensor) -> None:
    """Invert `to_coded` for pages ``[B, H, pages, N, D]``, in place."""
    _call_on_pages("from_coded", packed, elements, first_page)


def find_state_(packed: PackedTensor, pages: slice, elements: Tensor) -> None:
    """Write the widths of the channels of heads that have none yet behind their exact rows, and the mean of keys.

    Args:
        packed: The cache, whose queries are those of the call already.
        pages: The pages that the call fills.
        elements: The first and the last page that the call fills, ``[B, H, 2, N, D]``, fp32, contiguous.
    """
    _call_on_pages("find_state", packed, elements, pages.start, start=pages.stop - 1)


def quantize_(
    packed: PackedTensor,
    first_page: int,
    elements: Tensor,
    importance: Tensor | None = None,
    bounds: Tensor | None = None,
) -> None:
    """Quantize pages ``[B, H, pages, N, D]`` and pack them into a cache; the elements are overwritten.

    Args:
        packed: The cache.
        first_page: Index of the first page.
        elements: Transformed tokens, fp32, contiguous.
        importance: Importance score of each slot, ``[B, H, slots]``; ``None``: all are equal.
        bounds: Bounds on the weighted error of mixed pages, ``[pages]``, fp32.
    """
    _call_on_pages("quantize", packed, elements, first_page, importance=importance, bounds=bounds)


def attend(
    query: Tensor,
    coded: Tensor,
    constant: Tensor | None,
    key: Tensor,
    value: Tensor,
    keys: PackedTensor,
    values: PackedTensor,
    bias: Tensor | None,
    start: int,
    visible: int,
    bend: Bend,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to a cache and to new tokens.

    Args:
        query: Scaled query rows, ``[B, Hkv, rows, D]``, fp32, contiguous.
        coded, constant: Query rows transformed for packed keys, and a constant to add to their scores.
        key, value: New tokens, ``[B, Hkv, T, D]``, in the dtype of the exact rows.
        keys, values: The cache.
        bias: Added to the scores, ``[B, Hkv, rows, >= visible]``, fp32, any strides, or ``None``.
        start: Slot of the first new token.
        visible: End of the visible slots.
        bend: What happens to scores before the bias is added.
        sink_logits: Logits of what has weight and no value, ``[B, Hkv, rows, 1]``, fp32, contiguous, or ``None``.

    Returns:
        Output of packed values before the inverse transform, ``[B, Hkv, rows, Dv]``; their total weight,
        ``[B, Hkv, rows, 1]``; output of exact values, ``[B, Hkv, rows, Dv]``. All fp32.
    """
    B, H, rows, _ = query.shape
    layout, Dv = keys.layout, values.layout.head_dim
    pages = min(keys.pages, values.pages)
    threads = _threads(B * H * pages * layout.page_size * layout.head_dim)
    splits = min(pages, -(-4 * threads // (B * H))) if threads > 1 else min(pages, 1)
    states = B * H * (splits + 1) * rows  # each an accumulator, a maximum and a sum
    angles = layout.head_dim if layout.rotary else 2 * layout.mean_pairs
    cos_sin = H * layout.page_size * angles
    scratch = torch.empty(states * (Dv + 2) + cos_sin, dtype=torch.float32, device="cpu")
    packed, exact = query.new_empty(B, H, rows, Dv), query.new_empty(B, H, rows, Dv)
    weight = query.new_empty(B, H, rows, 1)
    key, value = _with_contiguous_rows(key), _with_contiguous_rows(value)
    words = (
        *_packed(keys), *_packed(values), *_tensor(query), *_tensor(coded),
        *_maybe(constant, 4), *_maybe(bias, 4), *_maybe(sink_logits, 4), *_tensor(key), *_tensor(value),
        *_tensor(scratch), *_tensor(packed), *_tensor(weight), *_tensor(exact),
        start, visible, splits, threads, *map(_float_bits, bend),
    )  # fmt: skip
    _call("attend", words)
    return packed, weight, exact


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
