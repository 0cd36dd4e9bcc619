"""The five functions of the GPU backend, to which `ops` dispatches.

All of them take parts of caches as `ops` has them, contiguous, and launch without waiting for the device, but for
attention of many query tokens.
"""

from functools import partial

from torch import Tensor

from kvq_compile.kernels import many_queries
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated, Packed
from kvq_compile.kernels.rows import attend_rows
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.triton.append import append_, append_both_
from kvq_compile.kernels.triton.attend import attend as attend_fused
from kvq_compile.kernels.triton.dequantize import dequantize, read_slots
from kvq_compile.kernels.triton.importance import importance
from kvq_compile.kernels.triton.join import join_parts

__all__ = [
    "SCHEMES",
    "append_",
    "append_both_",
    "attend",
    "dequantize",
    "importance",
    "is_available",
]

SCHEMES = frozenset(("uniform", "codebook", "mixed", "channelwise"))


def is_available() -> bool:
    """Say whether the backend can run: where there is a GPU there is Triton."""
    return True


def attend(
    query: Tensor, key: Tensor, value: Tensor, keys: Packed, values: Packed,
    key_calibrated: Calibrated, value_calibrated: Calibrated, mask: Tensor | None,
    position: Tensor | None, start: int | None, score: Score, key_layout: Layout,
    value_layout: Layout, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend as `attend.attend` says: to packed pages, or with many query tokens to dequantized pieces of them."""
    if many_queries.takes(query, key, value, score):
        if (
            keys[3].dim() == 2 or values[3].dim() == 2
        ):  # pieces of rows that end elsewhere are others
            return attend_rows(
                attend, query, key, value, keys, values, key_calibrated, value_calibrated, mask,
                position, start, score, key_layout, value_layout, sink_logits,
            )  # fmt: skip
        plan = many_queries.find_plan(query, key.shape[2], mask, position, start, key_layout)
        if plan is not None:
            of_keys, of_values = (
                many_queries.Side(
                    new, cache[3], partial(read_slots, cache, relative, layout), layout
                )
                for new, cache, relative, layout in (
                    (key, keys, key_calibrated, key_layout),
                    (value, values, value_calibrated, value_layout),
                )
            )
            return many_queries.attend(
                query, of_keys, of_values, mask, score.scale, plan, join_parts
            )
    return attend_fused(
        query, key, value, keys, values, key_calibrated, value_calibrated, mask, position, start,
        score, key_layout, value_layout, sink_logits,
    )  # fmt: skip
