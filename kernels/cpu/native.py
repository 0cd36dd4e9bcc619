"""Build, load and call ``native.cpp``: a quantized cache read at the speed of a CPU's memory.

PyTorch's own CPU compiler needs a C++ compiler too, so needing one asks for nothing new. The file is built
once for a machine, in about two seconds, and kept in a cache directory; it has a plain C interface, so that
one build serves every Python and every torch. Where it cannot be built, `blocked` goes on in torch
operations, with a warning that says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kvq_compile.kernels.cpu.packed import PackedTensor
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.schemes import Mixed
from kvq_compile.kernels.tables import section

SOURCE = Path(__file__).with_name("native.cpp")
HEADER = Path(__file__).with_name("unpack_pages.h")  # which the source includes
# Sums may be taken in any order; infinities and NaN keep their meaning, which -ffast-math would take away.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"),
)
BUILD_SECONDS = 120
PARALLEL_FROM = 1 << 16  # packed numbers from which waking other threads pays
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Packed(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "params")),
        *((name, ctypes.c_void_p) for name in ("book", "mean", "scale", "frequency", "shift")),
        ("codes_stride", ctypes.c_int64 * 3),
        ("params_stride", ctypes.c_int64 * 3),
        ("tables_stride", ctypes.c_int64),
        ("first_slot", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("bits", "trits", "fp8")),
        *((name, ctypes.c_int32) for name in ("rows", "row_length", "units", "group_size")),
        *((name, ctypes.c_int32) for name in ("along_rows", "is_key", "couple", "entries")),
        *((name, ctypes.c_int32) for name in ("head_dim", "page_size")),
        *((name, ctypes.c_int32) for name in ("max_bits", "rank_field", "outliers")),
    )


class _Exact(ctypes.Structure):
    _fields_ = (
        ("held", ctypes.c_void_p),
        ("fresh", ctypes.c_void_p),
        ("held_stride", ctypes.c_int64 * 2),
        ("fresh_stride", ctypes.c_int64 * 3),
    )


class _Attend(ctypes.Structure):
    _fields_ = (
        ("key", _Packed),
        ("value", _Packed),
        ("exact_key", _Exact),
        ("exact_value", _Exact),
        *((name, ctypes.c_void_p) for name in ("query", "coded", "constant", "bias")),
        ("bias_stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in ("turns", "accumulator")),
        *((name, ctypes.c_void_p) for name in ("running_max", "running_sum")),
        *((name, ctypes.c_void_p) for name in ("packed_out", "weight_out", "exact_out")),
        *(
            (name, ctypes.c_int32)
            for name in ("batch", "heads", "query_rows", "pages", "page_size", "splits")
        ),
        *((name, ctypes.c_int32) for name in ("sinks", "ring", "dtype")),
        *((name, ctypes.c_int64) for name in ("held", "start", "visible")),
    )


def is_available() -> bool:
    """Say whether the library is there, building it at the first call."""
    return _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"attention on the CPU runs in slow torch operations, since {SOURCE.name} could not be built: {error}; "
            "install g++ or clang++, or name a compiler in CXX",
            stacklevel=2,
        )
        return None


def _build() -> Path:
    """Return the library's path, building it unless this machine has done so before."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found")
    texts = [path.read_text() for path in (SOURCE, HEADER)]
    identity = "\n".join([compiler, *FLAGS, _processor(), *texts])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvq_compile"
    library = folder / f"cpu_pages-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=BUILD_SECONDS)
            made.replace(library)  # in one step, so that processes building at once do no harm
    return library


def _processor() -> str:
    """Return what ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )


@cache
def _sizes(layout: Layout) -> tuple[int, ...]:
    """Return the integers of `_Packed` from ``bits`` on."""
    mixed = layout.scheme if isinstance(layout.scheme, Mixed) else None
    return (
        *(sum(layout.planes), layout.packing == "trits", layout.params == "fp8"),
        *(layout.rows, layout.row_length, layout.units, layout.group_size),
        *((layout.role == "key") == (layout.grouping == "token"), layout.role == "key"),
        *(layout.couple, layout.levels + 1, layout.head_dim, layout.page_size),
        *((mixed.max_bits, mixed.rank_field, mixed.outliers) if mixed else (0, 0, 0)),
    )


def _tables(packed: PackedTensor) -> tuple[int | None, ...]:
    """Return the pointers of `_Packed` to tables, those that unpacking needs, and the words between heads."""
    layout, frame = packed.layout, packed.frame
    if frame.tables is None:
        return None, None, None, None, None, 0
    words = frame.tables
    assert words.stride(1) == 1

    def address(name: str, needed: bool) -> int | None:
        first = section(name, layout.head_dim, layout.rotary)[0]
        return words.data_ptr() + 4 * first if needed else None

    return (
        address("codebook", layout.coder == "codebook"),
        *(address(name, layout.rotary) for name in ("mean", "scale", "frequency")),
        None if frame.shift is None else frame.shift.data_ptr(),
        words.stride(0),
    )


def _packed(packed: PackedTensor, first: int = 0) -> _Packed:
    """Describe the pages of a tensor from number ``first`` on."""
    codes, params = packed.parts[:2]
    strides = codes.stride(), params.stride()
    *tables, tables_stride = _tables(packed)
    return _Packed(
        codes.data_ptr() + first * strides[0][2] * codes.element_size(),
        params.data_ptr() + first * strides[1][2] * params.element_size(),
        *tables,
        strides[0][:3],
        strides[1][:3],
        tables_stride,
        packed.layout.sinks + first * packed.layout.page_size,
        *_sizes(packed.layout),
    )


def unpack(packed: PackedTensor, pages: slice) -> Tensor:
    """Return pages as tokens ``[B, H, n, D]`` (fp32), as `PackedTensor.unpack` does, which stands in where need be."""
    library = _library() if is_available() else None
    if library is None:
        return packed.unpack(pages)
    layout = packed.layout
    B, H = packed.parts[0].shape[:2]
    count = pages.stop - pages.start
    channels_first = layout.role == "value" and layout.coder != "mixed"
    tile = (layout.page_size, layout.head_dim)
    out = torch.empty(
        B,
        H,
        count,
        *(reversed(tile) if channels_first else tile),
        dtype=torch.float32,
        device="cpu",
    )
    struct = _packed(packed, pages.start)
    library.kvq_unpack_pages(
        ctypes.byref(struct), B, H, count, ctypes.c_void_p(out.data_ptr()), torch.get_num_threads()
    )
    return (out.transpose(-1, -2) if channels_first else out).flatten(2, 3)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to a cache and the new tokens behind it.

    Args:
        query: Scaled query rows, ``[B, Hkv, rows, D]``, fp32, contiguous.
        coded, constant: The same in the basis of the packed keys, and what to add to their scores.
        key, value: New tokens, ``[B, Hkv, T, D]``, in the dtype of the exact rows.
        keys, values: The cache.
        bias: Added to the scores, ``[B, Hkv, rows, >= visible]``, fp32, any strides, or ``None``.
        start: Slot of the first new token.
        visible: End of the slots that may be seen.

    Returns:
        What packed values gave, in their basis, ``[B, Hkv, rows, Dv]``, their weight ``[B, Hkv, rows, 1]``, and
        what exact values gave; fp32.
    """
    B, H, rows, _ = query.shape
    layout, Dv = keys.layout, values.layout.head_dim
    pages = min(keys.pages, values.pages)
    work = B * H * pages * layout.page_size * layout.head_dim
    threads = torch.get_num_threads() if work > PARALLEL_FROM else 1
    splits = min(pages, -(-4 * threads // (B * H))) if threads > 1 else min(pages, 1)
    state = torch.empty(
        B, H, splits + 1, rows, Dv + 2, dtype=torch.float32, device="cpu"
    )  # accumulators, maxima and sums
    count = B * H * (splits + 1) * rows
    turns = (
        torch.empty(H, layout.page_size, layout.head_dim, dtype=torch.float32, device="cpu")
        if layout.rotary
        else None
    )
    packed, exact = (
        torch.empty(B, H, rows, Dv, dtype=torch.float32, device="cpu"),
        torch.empty(B, H, rows, Dv, dtype=torch.float32, device="cpu"),
    )
    weight = torch.empty(B, H, rows, 1, dtype=torch.float32, device="cpu")
    key, value = _with_contiguous_rows(key), _with_contiguous_rows(value)
    address = state.data_ptr()
    call = _Attend(
        *(_packed(keys), _packed(values)),
        *(_exact(keys.parts[2], key), _exact(values.parts[2], value)),
        *(query.data_ptr(), coded.data_ptr()),
        *(_address(constant), _address(bias)),
        (0, 0, 0, 0) if bias is None else bias.stride(),
        *(_address(turns), address),
        *(address + 4 * count * Dv, address + 4 * count * (Dv + 1)),
        *(packed.data_ptr(), weight.data_ptr(), exact.data_ptr()),
        *(B, H, rows, pages, layout.page_size, splits),
        *(layout.sinks, layout.ring, DTYPES.index(keys.parts[2].dtype)),
        *(min(start, visible), start, visible),
    )
    library = _library()
    assert library is not None
    library.kvq_attend(ctypes.byref(call), threads)
    return packed, weight, exact


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _exact(held: Tensor, fresh: Tensor) -> _Exact:
    return _Exact(
        held.data_ptr(),
        fresh.data_ptr(),
        held.stride()[:2],
        fresh.stride()[:3],
    )
