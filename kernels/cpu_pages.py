"""Build, load and call ``cpu_pages.cpp``: a quantized cache read at the speed of a CPU's memory.

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

from kvq_compile.kernels.spec import PageLayout

SOURCE = Path(__file__).with_name("cpu_pages.cpp")
# Sums may be taken in any order; infinities and NaN keep their meaning, which -ffast-math would take away.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"),
)
BUILD_SECONDS = 120
PARALLEL_FROM = 1 << 16  # packed numbers from which waking other threads pays
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


class _Packed(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("codes_stride", ctypes.c_int64 * 3),
        ("params_stride", ctypes.c_int64 * 3),
        ("bits", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("row_length", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("along_rows", ctypes.c_int32),
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
        ("query", ctypes.c_void_p),
        ("rotated", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("bias_stride", ctypes.c_int64 * 4),
        ("accumulator", ctypes.c_void_p),
        ("running_max", ctypes.c_void_p),
        ("running_sum", ctypes.c_void_p),
        ("packed_out", ctypes.c_void_p),
        ("exact_out", ctypes.c_void_p),
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
    identity = "\n".join([compiler, *FLAGS, _processor(), SOURCE.read_text()])
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


def _packed(parts: Parts, layout: PageLayout) -> _Packed:
    codes, params = parts[0], parts[1]
    return _Packed(
        codes.data_ptr(),
        params.data_ptr(),
        (ctypes.c_int64 * 3)(*codes.stride()[:3]),
        (ctypes.c_int64 * 3)(*params.stride()[:3]),
        layout.bits,
        layout.rows,
        layout.row_length,
        layout.group_size,
        (layout.role == "key") == (layout.grouping == "token"),
    )


def unpack(parts: Parts, pages: slice, layout: PageLayout) -> Tensor:
    """Return pages as tokens ``[B, H, n, D]`` (fp32) in the basis in which they were coded."""
    codes, params = parts[0][:, :, pages], parts[1][:, :, pages]
    B, H, P = codes.shape[:3]
    out = torch.empty(B, H, P, layout.rows, layout.row_length)
    library = _library()
    assert library is not None
    packed = _packed((codes, params, *parts[2:]), layout)
    library.kvq_unpack_pages(
        ctypes.byref(packed), B, H, P, ctypes.c_void_p(out.data_ptr()), torch.get_num_threads()
    )
    return (out if layout.role == "key" else out.transpose(-1, -2)).flatten(2, 3)


def attend(
    query: Tensor,
    rotated: Tensor,
    key: Tensor,
    value: Tensor,
    key_parts: Parts,
    value_parts: Parts,
    bias: Tensor | None,
    start: int,
    visible: int,
    key_layout: PageLayout,
    value_layout: PageLayout,
) -> tuple[Tensor, Tensor]:
    """Attend to a cache and the new tokens behind it.

    Args:
        query: Scaled query rows, ``[B, Hkv, rows, D]``, fp32, contiguous.
        rotated: The same in the basis of the packed keys.
        key, value: New tokens, ``[B, Hkv, T, D]``, in the dtype of the exact rows.
        key_parts, value_parts: The cache.
        bias: Added to the scores, ``[B, Hkv, rows, >= visible]``, fp32, any strides, or ``None``.
        start: Slot of the first new token.
        visible: End of the slots that may be seen.
        key_layout, value_layout: The layouts.

    Returns:
        The output ``[B, Hkv, rows, Dv]``, fp32, as two summands: what packed values gave, in their basis, and
        what exact ones gave.
    """
    B, H, rows, _ = query.shape
    pages = min(int(key_parts[3][1]), int(value_parts[3][1]))
    work = B * H * pages * key_layout.page_size * key_layout.head_dim
    threads = torch.get_num_threads() if work > PARALLEL_FROM else 1
    splits = min(pages, -(-4 * threads // (B * H))) if threads > 1 else min(pages, 1)
    state = torch.empty(
        B, H, splits + 1, rows, value_layout.head_dim + 2
    )  # accumulators, maxima and sums
    count = B * H * (splits + 1) * rows
    address = state.data_ptr()
    out = torch.empty(2, B, H, rows, value_layout.head_dim)
    key, value = _with_contiguous_rows(key), _with_contiguous_rows(value)
    call = _Attend(
        *(_packed(key_parts, key_layout), _packed(value_parts, value_layout)),
        *(_exact(key_parts[2], key), _exact(value_parts[2], value)),
        *(query.data_ptr(), rotated.data_ptr(), None if bias is None else bias.data_ptr()),
        (ctypes.c_int64 * 4)(*(bias.stride() if bias is not None else (0, 0, 0, 0))),
        address,
        address + 4 * count * value_layout.head_dim,
        address + 4 * count * (value_layout.head_dim + 1),
        *(out[0].data_ptr(), out[1].data_ptr()),
        *(B, H, rows, pages, key_layout.page_size, splits),
        *(key_layout.sinks, key_layout.ring, DTYPES.index(key_parts[2].dtype)),
        *(min(start, visible), start, visible),
    )
    library = _library()
    assert library is not None
    library.kvq_attend(ctypes.byref(call), threads)
    return out[0], out[1]


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _exact(held: Tensor, fresh: Tensor) -> _Exact:
    return _Exact(
        held.data_ptr(),
        fresh.data_ptr(),
        (ctypes.c_int64 * 2)(*held.stride()[:2]),
        (ctypes.c_int64 * 3)(*fresh.stride()[:3]),
    )
