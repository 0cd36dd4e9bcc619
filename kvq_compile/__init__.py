"""Quantize the key-value cache of any decoder by ``torch.compile(model, backend="kvq")``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvq_compile.kernels import cache as cache  # tells torch.load what a saved cache may call

if TYPE_CHECKING:
    from kvq_compile.api import compile, quantize_cache_
    from kvq_compile.bounds import error_bound
    from kvq_compile.calibration.artifact import Calibration
    from kvq_compile.calibration.calibrator import calibrate
    from kvq_compile.errors import KVQError, KVQWarning
    from kvq_compile.explanations import Explanation, explain
    from kvq_compile.kernels.cache.arranged import ArrangedKV
    from kvq_compile.kernels.cache.tensor import QuantizedKV
    from kvq_compile.kernels.schemes import Codebook, Mixed, Uniform
    from kvq_compile.kernels.spec import CacheSpec
    from kvq_compile.options import make_spec
    from kvq_compile.reports import Report, report

__version__ = "0.1.0"
__all__ = [
    "ArrangedKV",
    "CacheSpec",
    "Calibration",
    "Channelwise",
    "Codebook",
    "Explanation",
    "KVQError",
    "KVQWarning",
    "Mixed",
    "QuantizedKV",
    "Report",
    "Uniform",
    "calibrate",
    "compile",
    "error_bound",
    "explain",
    "make_spec",
    "quantize_cache_",
    "report",
]

# Imported when first used: torch's compiler takes seconds, which `kvq --help` need not wait for. No module has the
# name of something public: once imported it would stand in its place.
_HOMES = {
    "api": ("compile", "quantize_cache_"),
    "bounds": ("error_bound",),
    "calibration.artifact": ("Calibration",),
    "calibration.calibrator": ("calibrate",),
    "errors": ("KVQError", "KVQWarning"),
    "explanations": ("Explanation", "explain"),
    "kernels.cache.arranged": ("ArrangedKV",),
    "kernels.cache.tensor": ("QuantizedKV",),
    "kernels.spec": ("CacheSpec",),
    "kernels.schemes": ("Channelwise", "Codebook", "Mixed", "Uniform"),
    "options": ("make_spec",),
    "reports": ("Report", "report"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"kvq_compile.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'kvq_compile' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
