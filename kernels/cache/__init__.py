"""`QuantizedKV`: the tensor that models see in place of 16-bit keys or values."""

from kvq_compile.kernels.cache.saved import rebuild_old as rebuild

__all__ = ["rebuild"]  # the name that files of format 1 know it by
