"""The specification in plain torch, to which tests compare every backend; its public names."""

from kvq_compile.kernels.reference.attention import softmax_attention
from kvq_compile.kernels.reference.cache import append_, leaving_pages, read, truncate_
from kvq_compile.kernels.reference.formats import pack, unpack
from kvq_compile.kernels.reference.pages import (
    coded_values,
    dequantize_packed,
    dequantize_pages,
    quantize_packed,
    quantize_pages,
    unpacked_values,
)
from kvq_compile.kernels.reference.uniform import from_groups, to_groups

__all__ = [
    "append_",
    "coded_values",
    "dequantize_packed",
    "dequantize_pages",
    "from_groups",
    "leaving_pages",
    "pack",
    "quantize_packed",
    "quantize_pages",
    "read",
    "softmax_attention",
    "to_groups",
    "truncate_",
    "unpack",
    "unpacked_values",
]
