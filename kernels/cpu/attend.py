"""Attend to a quantized cache on the CPU.

Few query rows, as in decoding, attend to the whole cache in one call of C++. More of them use matrix products over
blocks of pages unpacked to fp32, so that scratch memory does not depend on kv_len; a chunk of a prompt attends to
dequantized pieces (`many_queries`). The first two keep the softmax state in fp32: a running maximum, a running sum and
two accumulators. Packed tokens are transformed (packed.py): instead of inverting the transform of every token, the
query is transformed once and the accumulator of packed values once. Packed and exact tokens therefore have an
accumulator each.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from kvq_compile.kernels import many_queries
from kvq_compile.kernels.cpu import native
from kvq_compile.kernels.cpu.append import blocks, read_slots
from kvq_compile.kernels.cpu.packed import PackedTensor
from kvq_compile.kernels.layout import HIDES, Layout
from kvq_compile.kernels.score import Bend, Score, bend_

FEW_ROWS = 16  # query rows per KV head up to which unpacking costs more than the products


class _Softmax:
    """Running softmax of query rows ``[B, Hkv, rows, D]`` over blocks of keys and values.

    Sums and accumulators come in pairs: of packed tokens, before the inverse transform, and of exact tokens.
    """

    def __init__(self, rows: Tensor, value_dim: int) -> None:
        self.running_max = rows.new_full((*rows.shape[:3], 1), -math.inf)
        self.running_sums = [torch.zeros_like(self.running_max) for _ in range(2)]
        self.accumulators = [rows.new_zeros(*rows.shape[:3], value_dim) for _ in range(2)]

    def update(self, scores: Tensor, value: Tensor, which: int) -> None:
        """Accumulate values ``[B, Hkv, n, Dv]`` with scores ``[B, Hkv, rows, n]``."""
        new_max = torch.maximum(self.running_max, scores.amax(-1, keepdim=True))
        reference_point = new_max.clamp_min(-1e38)  # keeps fully masked rows at weight 0, not NaN
        weights = (scores - reference_point).exp_()
        decay = (self.running_max - reference_point).exp_()
        self.running_max = new_max
        for total in (*self.running_sums, *self.accumulators):
            total.mul_(decay)
        self.running_sums[which] += weights.sum(-1, keepdim=True)
        self.accumulators[which] += weights @ value

    def result(self, values: PackedTensor, sink_logits: Tensor | None) -> Tensor:
        """Return the attention output; the logits are of what has weight and no value, ``[B, Hkv, rows, 1]``."""
        total = (
            values.inverse_transform(self.accumulators[0], self.running_sums[0])
            + self.accumulators[1]
        )
        weight = self.running_sums[0] + self.running_sums[1]
        if sink_logits is not None:
            point = torch.maximum(self.running_max, sink_logits)
            shrink = (self.running_max - point).exp()
            total, weight = total * shrink, weight * shrink + (sink_logits - point).exp()
        return total / torch.where(weight == 0, 1.0, weight)


class _Products:
    """Products of query rows ``[B, Hkv, rows, D]`` with keys, or ``[B, Hkv, rows, D + Dv]`` with keys and values."""

    def __init__(self, rows: Tensor, keys: PackedTensor, values: PackedTensor) -> None:
        size = keys.layout.head_dim
        self._rows = [rows[..., :size]]
        self._coded = [keys.transform_query(self._rows[0])]
        if rows.shape[3] > size:
            self._rows.append(rows[..., size:])
            self._coded.append(values.transform_query(self._rows[1]))

    def packed(self, key: Tensor, value: Tensor) -> Tensor:
        """Return the products ``[B, Hkv, rows, n]`` with unpacked tokens, which lack their transforms."""
        (coded, constant), *of_values = self._coded
        products = coded @ key.transpose(-2, -1)
        if constant is not None:
            products += constant
        for coded, constant in of_values:
            products += coded @ value.transpose(-2, -1)
            if constant is not None:
                products += constant
        return products

    def exact(self, key: Tensor, value: Tensor) -> Tensor:
        """Return the products ``[B, Hkv, rows, n]`` with tokens as they are."""
        products = self._rows[0] @ key.transpose(-2, -1)
        for rows in self._rows[1:]:
            products += rows @ value.transpose(-2, -1)
        return products


def _apply_mask(
    scores: Tensor, mask: Tensor | None, columns: Tensor | slice, shape: tuple[int, ...]
) -> Tensor:
    """Mask scores ``[B, Hkv, G * T, n]``, ``shape`` being ``B, Hkv, G, T``; ``columns`` picks the mask's."""
    if mask is None:
        return scores
    mask = mask[..., columns]
    while mask.dim() < 4:
        mask = mask[None]
    heads = (shape[1], shape[2]) if mask.shape[1] != 1 else (1, 1)
    mask = mask.unflatten(1, heads)
    scores = scores.view(*shape, -1)
    scores = (
        scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
    )
    return scores.flatten(2, 3)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: PackedTensor,
    values: PackedTensor,
    mask: Tensor | None,
    start: int,
    score: Score,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attend to the tokens ``0 .. start - 1`` of a cache and to the new tokens after them.

    Args:
        query: ``[B, Hq, T, D]``; ``[B, Hq, T, D + Dv]`` where values take part in scores.
        key, value: Exact new tokens, ``[B, Hkv, Tn, D]`` and ``[B, Hkv, Tn, Dv]``.
        keys, values: The cache before the new tokens are written.
        mask: ``None``, boolean (True: attend) or additive, broadcasting to ``[B, Hq, T, M]`` with one
            column per slot; slots beyond its ``M`` columns are masked.
        start: Slot of the first new token.
        score: What is done to products of queries and keys.
        sink_logits: Logits that broadcast to ``[B, Hq, T, 1]``, of what has weight and no value; or ``None``.

    Returns:
        ``[B, Hq, T, Dv]`` in the dtype of ``query``.

    Raises:
        ValueError: The cache does not hold ``start`` tokens, or the mask shows a slot never written.
    """
    B, Hq, T, _ = query.shape
    Hkv, new = key.shape[1], key.shape[2]
    shape = (B, Hkv, Hq // Hkv, T)
    visible = start + new if mask is None else min(start + new, mask.shape[-1])
    _check_lengths(keys, values, start, mask, start + new)
    if many_queries.takes(query, key, value, score):
        plan = many_queries.find_plan(query, new, mask, None, start, keys.layout)
        if plan is not None:
            of_keys, of_values = (
                many_queries.Side(
                    x, packed.parts.cursor, partial(read_slots, packed), packed.layout
                )
                for x, packed in ((key, keys), (value, values))
            )
            join = many_queries.join_parts
            return many_queries.attend(query, of_keys, of_values, mask, score.scale, plan, join)
    rows = (query.reshape(B, Hkv, -1, query.shape[3]).float() * score.scale).contiguous()
    if sink_logits is not None:
        sink_logits = sink_logits.expand(B, Hq, T, 1).reshape(B, Hkv, -1, 1).float().contiguous()
    rest = start, visible, score.bend, sink_logits
    if rows.shape[2] <= FEW_ROWS and not score.of_values:
        bias = None
        if mask is not None:
            zeros = rows.new_zeros(*rows.shape[:3], visible)
            bias = _apply_mask(zeros, mask, slice(visible), shape)
        output = _read_at_once(rows, key, value, keys, values, bias, *rest)
    else:
        output = _read_in_blocks(rows, key, value, keys, values, mask, shape, *rest)
    return output.reshape(B, Hq, T, -1).to(query.dtype)


def _read_at_once(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    keys: PackedTensor,
    values: PackedTensor,
    bias: Tensor | None,
    start: int,
    visible: int,
    bend: Bend,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attend with few query rows, in one call."""
    key, value = key.to(keys.parts.exact.dtype), value.to(values.parts.exact.dtype)
    packed, weight, exact = native.attend(
        *(rows, *keys.transform_query(rows), key, value, keys, values, bias),
        *(start, visible, bend, sink_logits),
    )
    return values.inverse_transform(packed, weight) + exact


def _read_in_blocks(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    keys: PackedTensor,
    values: PackedTensor,
    mask: Tensor | None,
    shape: tuple[int, int, int, int],
    start: int,
    visible: int,
    bend: Bend,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attend to the packed tokens in blocks of pages unpacked to fp32, then to the exact ones."""
    softmax = _Softmax(rows, value.shape[3])
    layout, held, pages = keys.layout, min(start, visible), min(keys.pages, values.pages)
    products = _Products(rows, keys, values)
    widest = max((keys, values), key=lambda packed: packed.layout.head_dim)
    for block in blocks(widest, slice(0, pages)):
        first = layout.sinks + block.start * layout.page_size
        last = min(layout.sinks + block.stop * layout.page_size, held)
        if last <= first:
            break
        block_key, block_value = (
            native.unpack(packed, block).flatten(2, 3)[:, :, : last - first]
            for packed in (keys, values)
        )
        scores = bend_(products.packed(block_key, block_value), bend)
        softmax.update(_apply_mask(scores, mask, slice(first, last), shape), block_value, 0)
    packed_end = layout.sinks + pages * layout.page_size
    runs = ((0, min(layout.sinks, held)), (packed_end, held), (start, visible))
    slots = torch.cat([_run(*run) for run in runs])
    if len(slots):
        exact_key, exact_value = (
            _exact_tokens(packed.parts.exact, new, slots, start, packed.layout)
            for packed, new in ((keys, key), (values, value))
        )
        scores = bend_(products.exact(exact_key, exact_value), bend)
        scores = _apply_mask(scores, mask, slots, shape)
        softmax.update(scores, exact_value, 1)
    return softmax.result(values, sink_logits)


def _check_lengths(
    keys: PackedTensor, values: PackedTensor, start: int, mask: Tensor | None, end: int
) -> None:
    for packed in (keys, values):
        if packed.held < start:
            raise ValueError(
                f"position must start at or before the {packed.held} tokens held, got {start}"
            )
    if mask is not None and mask.shape[-1] > end:
        rest = mask[..., end:]
        if bool((rest if rest.dtype == torch.bool else rest > HIDES).any()):
            raise ValueError(f"mask must hide the slots that hold no token, from {end} on")


def _run(first: int, last: int) -> Tensor:
    return torch.arange(first, max(first, last), dtype=torch.int64, device="cpu")


def _exact_tokens(exact: Tensor, new: Tensor, slots: Tensor, start: int, layout: Layout) -> Tensor:
    """Return the tokens of ``slots``, ascending, from the exact rows and, from ``start`` on, from ``new``."""
    held = slots[slots < start]
    token = torch.where(
        held < layout.sinks, held, layout.sinks + (held - layout.sinks) % layout.ring
    )
    return torch.cat([exact[:, :, token], new[:, :, : len(slots) - len(held)]], 2).float()
