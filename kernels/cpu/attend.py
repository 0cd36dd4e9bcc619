"""Attend to a quantized cache block by block: the CPU path.

A few query rows, as in decoding, read the whole cache in one call of `cpu_pages`. Many rows, as in a chunk of a
prompt, go through blocks of pages unpacked to fp32 and matrix products, so that the scratch stays the same
however long the cache is. Both keep the softmax state in fp32: a running maximum, a running sum and two
accumulators. Packed tokens lie in a basis of their own (`bases`). Changing the basis of the query once and of
the packed accumulator once takes the place of changing that of every token, which is why packed and exact
tokens accumulate apart.

The lengths are read on the host, which is free on a CPU. On a GPU `attention` reads them on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvq_compile.kernels.cpu import native as cpu_pages
from kvq_compile.kernels.cpu.packed import PackedTensor, Parts
from kvq_compile.kernels.layout import HIDES, Layout
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated
from kvq_compile.kernels.reference import cache as reference
from kvq_compile.kernels.reference.queries import remember_

APPEND_TOKENS = 1024  # new tokens quantized at once
SCRATCH_NUMBERS = (
    1 << 19
)  # fp32 numbers of keys, and of values, unpacked at once: two megabytes each
FEW_ROWS = 16  # query rows of a KV head up to which unpacking costs more than the products


def first_slot(position: Tensor | None, start: int | None) -> int:
    """Return the slot of the first new token.

    Raises:
        ValueError: The positions do not follow one another.
    """
    if position is None:
        assert start is not None
        return start
    slots = position.tolist()
    if slots != list(range(slots[0], slots[0] + len(slots))):
        raise ValueError(f"cache positions must follow one another, got {slots}")
    return int(slots[0])


def append_(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    x: Tensor,
    start: int,
    layout: Layout,
    frame: Calibrated = UNCALIBRATED,
    importance: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    """Append in steps, so that quantizing a long prompt needs little scratch.

    A single token that completes no page, as nearly every decoded one, is written into its row at once.
    """
    held, pages = cursor.tolist()
    if x.shape[2] == 1 and start == held and layout.pages_at(start + 1) <= pages:
        exact[:, :, layout.exact_row(start)] = x[:, :, 0]
        remember_(exact, query, held, start, 1, layout)
        cursor[0] = start + 1
        return
    silent = 0 if query is None else x.shape[2] - query.shape[2]  # tokens before the first query
    for first in range(0, x.shape[2], APPEND_TOKENS):
        last = first + APPEND_TOKENS
        piece, asked = x[:, :, first:last], query
        if query is not None:
            asked = query[:, :, max(0, first - silent) : max(0, last - silent)]
        reference.append_(
            codes, params, exact, cursor, piece, start + first, layout, frame, importance, asked
        )


class _Softmax:
    """Running softmax of query rows ``[B, Hkv, rows, D]`` over blocks of keys and values.

    Sums and accumulators come in pairs: of packed tokens, in their basis, and of exact ones.
    """

    def __init__(self, rows: Tensor, value_dim: int) -> None:
        self.running_max = rows.new_full((*rows.shape[:3], 1), -math.inf)
        self.running_sums = [torch.zeros_like(self.running_max) for _ in range(2)]
        self.accumulators = [rows.new_zeros(*rows.shape[:3], value_dim) for _ in range(2)]

    def update(self, scores: Tensor, value: Tensor, which: int) -> None:
        """Take in scores ``[B, Hkv, rows, n]`` of values ``[B, Hkv, n, Dv]``."""
        new_max = torch.maximum(self.running_max, scores.amax(-1, keepdim=True))
        reference_point = new_max.clamp_min(
            -1e38
        )  # keeps rows that see nothing at weight 0, not NaN
        weights = (scores - reference_point).exp_()
        decay = (self.running_max - reference_point).exp_()
        self.running_max = new_max
        for total in (*self.running_sums, *self.accumulators):
            total.mul_(decay)
        self.running_sums[which] += weights.sum(-1, keepdim=True)
        self.accumulators[which] += weights @ value

    def result(self, values: PackedTensor) -> Tensor:
        """Return the attention output in the basis of the model."""
        total = values.leave(self.accumulators[0], self.running_sums[0]) + self.accumulators[1]
        weight = self.running_sums[0] + self.running_sums[1]
        return total / torch.where(weight == 0, 1.0, weight)


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
    key_parts: Parts,
    value_parts: Parts,
    mask: Tensor | None,
    start: int,
    scale: float,
    key_layout: Layout,
    value_layout: Layout,
    key_frame: Calibrated = UNCALIBRATED,
    value_frame: Calibrated = UNCALIBRATED,
) -> Tensor:
    """Attend to the tokens ``0 .. start - 1`` of a cache and to the new ones behind them.

    Args:
        query: ``[B, Hq, T, D]``.
        key, value: Exact new tokens, ``[B, Hkv, Tn, D]`` and ``[B, Hkv, Tn, Dv]``.
        key_parts, value_parts: The cache before the new tokens are written.
        mask: ``None``, boolean (True: attend) or additive, broadcasting to ``[B, Hq, T, M]`` with one
            column a slot; slots beyond its ``M`` columns are not attended to.
        start: Slot of the first new token.
        scale: Factor on the scores.
        key_layout, value_layout: Layouts of the two parts.
        key_frame, value_frame: What their packed tokens are coded relative to, where there are tables.

    Returns:
        ``[B, Hq, T, Dv]`` in the dtype of ``query``.

    Raises:
        ValueError: The cache does not hold ``start`` tokens, or the mask shows a slot never written.
    """
    B, Hq, T, _ = query.shape
    Hkv, new = key.shape[1], key.shape[2]
    shape = (B, Hkv, Hq // Hkv, T)
    keys = PackedTensor(key_parts, key_layout, key_frame)
    values = PackedTensor(value_parts, value_layout, value_frame)
    visible = start + new if mask is None else min(start + new, mask.shape[-1])
    _check_lengths(keys, values, start, mask, start + new)
    rows = (query.reshape(B, Hkv, -1, query.shape[3]).float() * scale).contiguous()
    if rows.shape[2] <= FEW_ROWS and cpu_pages.is_available():
        bias = (
            None
            if mask is None
            else _apply_mask(rows.new_zeros(*rows.shape[:3], visible), mask, slice(visible), shape)
        )
        output = _read_at_once(rows, key, value, keys, values, bias, start, visible)
    else:
        output = _read_in_blocks(rows, key, value, keys, values, mask, start, visible, shape)
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
) -> Tensor:
    """Attend with few query rows, in one call."""
    key, value = key.to(keys.parts[2].dtype), value.to(values.parts[2].dtype)
    packed, weight, exact = cpu_pages.attend(
        rows, *keys.meet(rows), key, value, keys, values, bias, start, visible
    )
    return values.leave(packed, weight) + exact


def _read_in_blocks(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    keys: PackedTensor,
    values: PackedTensor,
    mask: Tensor | None,
    start: int,
    visible: int,
    shape: tuple[int, int, int, int],
) -> Tensor:
    """Attend to the packed tokens in blocks of pages unpacked to fp32, then to the exact ones."""
    softmax = _Softmax(rows, value.shape[3])
    layout, held, pages = keys.layout, min(start, visible), min(keys.pages, values.pages)
    coded, constant = keys.meet(rows)
    step = max(1, SCRATCH_NUMBERS // (shape[0] * shape[1] * layout.page_size * layout.head_dim))
    for page in range(0, pages, step):
        block = slice(page, min(page + step, pages))
        first = layout.sinks + block.start * layout.page_size
        last = min(layout.sinks + block.stop * layout.page_size, held)
        if last <= first:
            break
        scores = coded @ cpu_pages.unpack(keys, block)[:, :, : last - first].transpose(-2, -1)
        if constant is not None:
            scores += constant
        scores = _apply_mask(scores, mask, slice(first, last), shape)
        softmax.update(scores, cpu_pages.unpack(values, block)[:, :, : last - first], 0)
    packed_end = layout.sinks + pages * layout.page_size
    runs = ((0, min(layout.sinks, held)), (packed_end, held), (start, visible))
    slots = torch.cat(
        [
            torch.arange(first, max(first, last), dtype=torch.int64, device="cpu")
            for first, last in runs
        ]
    )
    if len(slots):
        exact_key, exact_value = (
            _exact_tokens(packed.parts[2], new, slots, start, packed.layout)
            for packed, new in ((keys, key), (values, value))
        )
        scores = _apply_mask(rows @ exact_key.transpose(-2, -1), mask, slots, shape)
        softmax.update(scores, exact_value, 1)
    return softmax.result(values)


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


def _exact_tokens(exact: Tensor, new: Tensor, slots: Tensor, start: int, layout: Layout) -> Tensor:
    """Return the tokens of ``slots``, ascending, from the exact rows and, from ``start`` on, from ``new``."""
    held = slots[slots < start]
    token = torch.where(
        held < layout.sinks, held, layout.sinks + (held - layout.sinks) % layout.ring
    )
    return torch.cat([exact[:, :, token], new[:, :, : len(slots) - len(held)]], 2).float()
