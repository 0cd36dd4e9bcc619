"""Attend to tokens that are not packed, in Triton: the loop of a program that reads a share of them.

It is to `attention` what `attend_pages` is for packed tokens. They are the sinks and the ring of recent tokens,
which the cache holds exactly, and the new tokens of the call, which it does not hold yet. They are multiplied in
the model's own dtype.
"""

import triton
import triton.language as tl
from kvq_compile.kernels.triton.attend_pages import WEIGHT_BIAS
from kvq_compile.kernels.triton.primitives import load_mask, softmax_update


@triton.jit
def exact_place(index, packed_end, start, held, visible, SINKS: tl.constexpr, RING: tl.constexpr):
    """Return slots, rows of ``exact`` and numbers among the new tokens of the tokens ``index`` in the order sinks,
    ring, new; and which of them the cache holds, and which are new.
    """
    fresh = index - (SINKS + RING)
    slot = tl.where(index < SINKS, index, packed_end - SINKS + index)
    old = (fresh < 0) & (slot < held)
    now = (fresh >= 0) & (fresh < visible - start)
    row = tl.where(index < SINKS, index, SINKS + tl.maximum(slot - SINKS, 0) % RING)
    slot = tl.where(fresh >= 0, start + fresh, slot)
    return slot, row, fresh.to(tl.int64), old, now


@triton.jit
def load_keys(exact, key, row, fresh, old, now, stride, DIM: tl.constexpr, DTYPE: tl.constexpr):
    """Return the keys ``[tokens, DIM padded]`` of tokens from `exact_place`; zeros for what is neither."""
    dim = tl.arange(0, triton.next_power_of_2(DIM))
    ok = (dim < DIM)[None, :]
    k = tl.load(exact + row[:, None] * DIM + dim[None, :], mask=old[:, None] & ok, other=0.0)
    new = key + fresh[:, None] * stride + dim[None, :]
    k_new = tl.load(new, mask=now[:, None] & ok, other=0.0)
    return tl.where(now[:, None], k_new.to(DTYPE), k.to(DTYPE))


@triton.jit
def attend_exact(
    query, rows, column_ok, scale, key, value, key_exact, value_exact, split, splits, packed_end,
    start, held, new, visible, stride_kt, stride_vt, mask, mask_rows, stride_m, mask_width,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_SHARED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to share ``split`` of the tokens in the order sinks, ring, new; return accumulator, sum and
    maximum.
    """
    BLOCK_K: tl.constexpr = triton.next_power_of_2(KEY_DIM)
    BLOCK_V: tl.constexpr = triton.next_power_of_2(VALUE_DIM)
    k_dim = tl.arange(0, BLOCK_K)
    v_dim = tl.arange(0, BLOCK_V)
    q_ok = (k_dim < KEY_DIM)[:, None] & column_ok[None, :]
    q = tl.load(query + rows[None, :] + k_dim[:, None], mask=q_ok, other=0.0).to(DTYPE)
    total = SINKS + RING + new
    share = tl.cdiv(tl.cdiv(total, BLOCK), splits) * BLOCK
    last = tl.minimum(split * share + share, total)
    running_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_Q], tl.float32)
    accumulator = tl.zeros([BLOCK_V, BLOCK_Q], tl.float32)
    # Not pipelined: its buffers would cost the programs that read pages their room.
    for block in tl.range(split * share, last, BLOCK, num_stages=1):
        slot, row, fresh, old, now = exact_place(
            block + tl.arange(0, BLOCK), packed_end, start, held, visible, SINKS, RING
        )
        k = load_keys(key_exact, key, row, fresh, old, now, stride_kt, KEY_DIM, DTYPE)
        v_ok = (v_dim < VALUE_DIM)[:, None]
        v = tl.load(
            value_exact + row[None, :] * VALUE_DIM + v_dim[:, None],
            mask=old[None, :] & v_ok,
            other=0.0,
        )
        v_new = tl.load(
            value + fresh[None, :] * stride_vt + v_dim[:, None], mask=now[None, :] & v_ok, other=0.0
        )
        v = tl.where(now[None, :], v_new.to(DTYPE), v.to(DTYPE))
        scores = tl.dot(k, q, input_precision=PRECISION) * scale
        if MASK_KIND > 0:
            scores += load_mask(
                mask, mask_rows, column_ok, slot, stride_m, mask_width, MASK_KIND, MASK_SHARED
            )
        scores = tl.where((old | now)[:, None], scores, float("-inf"))
        weights, decay, running_max = softmax_update(scores, running_max, WEIGHT_BIAS)
        running_sum = running_sum * decay + tl.sum(weights, 0)
        accumulator = tl.dot(
            v, weights.to(DTYPE), accumulator * decay[None, :], input_precision=PRECISION
        )
    return accumulator, running_sum, running_max
