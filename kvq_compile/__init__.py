"""Quantize the key-value cache of any decoder by ``torch.compile(model, backend="kvq")``."""

from kvq_compile.errors import KVQError, KVQWarning
from kvq_compile.kernels.cache import QuantizedKV
from kvq_compile.kernels.spec import CacheSpec, TensorSpec

__version__ = "0.1.0"
__all__ = ["CacheSpec", "KVQError", "KVQWarning", "QuantizedKV", "TensorSpec"]
