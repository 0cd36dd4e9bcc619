"""Quantize the key-value cache of any decoder by ``torch.compile(model, backend="kvq")``."""

from kvq_compile.api import Explanation, compile, explain, quantize_cache_
from kvq_compile.bounds import error_bound
from kvq_compile.errors import KVQError, KVQWarning
from kvq_compile.kernels.cache import QuantizedKV
from kvq_compile.kernels.spec import CacheSpec, TensorSpec
from kvq_compile.methods import make_spec
from kvq_compile.report import Report, report

__version__ = "0.1.0"
__all__ = [
    "CacheSpec",
    "Explanation",
    "KVQError",
    "KVQWarning",
    "QuantizedKV",
    "Report",
    "TensorSpec",
    "compile",
    "error_bound",
    "explain",
    "make_spec",
    "quantize_cache_",
    "report",
]
