"""Build, load and call ``cpu_pages.cpp``: packed pages read at the speed of a CPU's memory.

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
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
# Sums may be taken in any order; infinities and NaN keep their meaning, which -ffast-math would take away.
FLAGS += ("-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
BUILD_SECONDS = 120

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


class _Attend(ctypes.Structure):
    _fields_ = (
        ("key", _Packed),
        ("value", _Packed),
        ("query", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("bias_stride", ctypes.c_int64 * 4),
        ("accumulator", ctypes.c_void_p),
        ("running_max", ctypes.c_void_p),
        ("running_sum", ctypes.c_void_p),
        ("batch", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("query_rows", ctypes.c_int32),
        ("pages", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("visible", ctypes.c_int64),
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
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


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
    library.kvq_unpack_pages(ctypes.byref(packed), B, H, P, ctypes.c_void_p(out.data_ptr()), torch.get_num_threads())
    return (out if layout.role == "key" else out.transpose(-1, -2)).flatten(2, 3)


def attend(
    query: Tensor,
    key_parts: Parts,
    value_parts: Parts,
    bias: Tensor | None,
    pages: int,
    visible: int,
    key_layout: PageLayout,
    value_layout: PageLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to the first ``visible`` tokens of the first ``pages`` pages.

    Args:
        query: Scaled rows in the basis of the packed keys, ``[B, Hkv, rows, D]``, fp32, contiguous.
        key_parts, value_parts: The cache.
        bias: Added to the scores, ``[B, Hkv, rows, >= visible]``, fp32, any strides, or ``None``.
        pages: Pages to read, at least one.
        visible: Tokens of them that may be seen.
        key_layout, value_layout: The layouts.

    Returns:
        Softmax state of each split: accumulators ``[splits, B, Hkv, rows, Dv]``, maxima and sums
        ``[splits, B, Hkv, rows, 1]``.
    """
    B, H, rows, _ = query.shape
    threads = torch.get_num_threads()
    splits = max(1, min(pages, 4 * threads // (B * H)))
    accumulator = torch.empty(B, H, splits, rows, value_layout.head_dim)
    running_max, running_sum = torch.empty(B, H, splits, rows), torch.empty(B, H, splits, rows)
    call = _Attend(
        _packed(key_parts, key_layout),
        _packed(value_parts, value_layout),
        query.data_ptr(),
        None if bias is None else bias.data_ptr(),
        (ctypes.c_int64 * 4)(*(bias.stride() if bias is not None else (0, 0, 0, 0))),
        accumulator.data_ptr(),
        running_max.data_ptr(),
        running_sum.data_ptr(),
        *(B, H, rows, pages, key_layout.page_size, splits, visible),
    )
    library = _library()
    assert library is not None
    library.kvq_attend_pages(ctypes.byref(call), threads)
    state = (accumulator, running_max[..., None], running_sum[..., None])
    return tuple(part.movedim(2, 0) for part in state)  # type: ignore[return-value]
