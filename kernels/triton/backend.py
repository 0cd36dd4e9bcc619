"""The four functions of the GPU backend, to which `ops` dispatches.

All of them take parts of caches as `ops` has them, contiguous, and launch without waiting for the device.
"""

from kvq_compile.kernels.triton.append import append_
from kvq_compile.kernels.triton.attend import attend
from kvq_compile.kernels.triton.dequantize import dequantize
from kvq_compile.kernels.triton.importance import importance

__all__ = ["SCHEMES", "append_", "attend", "dequantize", "importance", "is_available"]

SCHEMES = frozenset(("uniform", "codebook", "mixed", "channelwise"))


def is_available() -> bool:
    """Say whether the backend can run: where there is a GPU there is Triton."""
    return True
