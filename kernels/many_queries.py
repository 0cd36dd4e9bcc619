"""Attention of many query tokens to a cache, as of a chunk of a prompt: dequantize a piece, attend to it, join.

Other kernels unpack every page once for each tile of queries, which is right for few: reading bytes is what takes time.
Counted for 32 query and 8 KV heads of 128 channels on an H100, over 64k tokens: a tile takes about as long as a
decoding step, 60 us, of which the products of its 32 queries with all tokens are 20 at the speed of flash attention; a
chunk of 2,048 tokens has 256 tiles. Dequantizing all tokens once writes and reads 268 MB, which is 0.2 ms at the speed
of memory and a few times that with the arithmetic of a code, against 5.5 ms of products. So pieces win from some ten
tiles on. Measured, 2,048 tokens take 1.24 to 1.28 times as long as flash attention to 16 bit, and 1.5 with `tc`.

The history is dequantized a piece at a time into scratch memory of at most `SCRATCH_BYTES`, in the dtype of the
queries; PyTorch's flash attention attends to it, query heads of a KV head beside one another as rows, and parts are
joined by log-sum-exp (Dao et al. 2023). New tokens attend to themselves exactly, as a part of their own. A backend
gives what reads slots of its caches, and what joins two parts.

A mask is looked at first, by which the host waits for the device once: pages that it shows to all queries need no mask,
those that it hides from all are left out, and where it is causal over the new tokens their attention is. What remains,
as at the edges of a window and of left padding, takes the mask along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvq_compile.kernels.layout import HIDES, Layout
from kvq_compile.kernels.score import Score

MANY_ROWS = {"cuda": 512, "cpu": 128}  # queries of a KV head from which on pieces are faster
MANY_TOKENS = 32  # fewer may be a step, which is recorded as a CUDA graph
SCRATCH_BYTES = 32 << 20  # of dequantized keys and values: 8,192 tokens of 8 heads of 128 channels
MAX_CHANNELS = 256  # of a head in flash attention
CHANNELS_STEP = 8
BIAS_STEP = 16  # elements between rows of a mask, as memory-efficient attention asks
DTYPES = {
    "cuda": (torch.float16, torch.bfloat16),
    "cpu": (torch.float16, torch.bfloat16, torch.float32),
}
LOWEST = -1e38  # an additive mask of less hides
FAR = -1e30  # what hides in its place, which leaves a log-sum-exp of what sees nothing finite
CHECKED_ROWS = 2048  # of a mask at once

View = Literal["shown", "masked", "causal"]


class Span(NamedTuple):
    """Slots ``first .. last - 1``: shown to all queries, to those behind them, or as the mask says."""

    first: int
    last: int
    view: View


class Plan(NamedTuple):
    """What a call attends to.

    Attributes:
        start: Slot of the first new token.
        held: Slots before it; those between spans are hidden from all queries.
        new: The new ones, or ``None`` where none is seen.
    """

    start: int
    held: list[Span]
    new: Span | None

    @property
    def all_see(self) -> bool:
        """Whether each query sees a token."""
        spans = self.held if self.new is None else [*self.held, self.new]
        return any(span.view != "masked" for span in spans)


class Side(NamedTuple):
    """Keys or values of a call.

    Attributes:
        new: The new ones.
        cursor: Of the cache, ``[2]``.
        read: Reads slots from a first to before a last one of the cache, dequantized, into ``[B, Hkv, slots, D]``; the
            first is 0 or where a page begins.
        layout: The cache's layout.
    """

    new: Tensor
    cursor: Tensor
    read: Callable[[int, int, Tensor], None]
    layout: Layout


class Part(NamedTuple):
    """Attention to some tokens, ``[B, Hkv, queries of a KV head / T, T, Dv]``, and its log-sum-exp, a number each."""

    output: Tensor
    lse: Tensor


Join = Callable[[Part, Part], Part]


# --- which calls, and what they see ---------------------------------------------------------------


def takes(query: Tensor, key: Tensor, value: Tensor, score: Score) -> bool:
    """Return whether a call has so many queries that pieces are faster, and PyTorch has attention for it.

    A call that is recorded as a CUDA graph is left alone: how many pieces there are is the host's to know.
    """
    tokens, channels = query.shape[2:]
    rows = query.shape[1] // key.shape[1] * tokens
    if (
        tokens < MANY_TOKENS
        or rows < MANY_ROWS.get(query.device.type, rows + 1)
        or not score.is_plain
    ):
        return False
    fits = channels == value.shape[3] <= MAX_CHANNELS and channels % CHANNELS_STEP == 0
    if not fits or score.scale <= 0 or query.dtype not in DTYPES.get(query.device.type, ()):
        return False
    return not query.is_cuda or not (torch.version.hip or torch.cuda.is_current_stream_capturing())


def find_plan(
    query: Tensor, new: int, mask: Tensor | None, position: Tensor | None, start: int | None, layout: Layout
) -> Plan | None:  # fmt: skip
    """Return what a call of ``new`` new tokens sees; ``None`` where the mask is more exact than its queries.

    Waits for the device if there is a mask or a position.
    """
    start = int(position[0]) if position is not None else start or 0
    if mask is None:
        held = [Span(0, start, "shown")] if start else []
        return Plan(start, held, Span(start, start + new, "shown") if new else None)
    mask = mask.expand(*query.shape[:3], mask.shape[-1])[..., : start + new]
    kinds, causal = _kinds(mask, start)
    held = _spans(kinds[:start], layout)
    own = kinds[start:]
    span = None
    if own.any():
        view: View = "causal" if causal else "shown" if bool((own == 2).all()) else "masked"
        span = Span(start, start + len(own), view)
    plan = Plan(start, held, span)
    rounds = mask.dtype not in (torch.bool, query.dtype)
    masked = any(each.view == "masked" for each in (*held, *([span] if span else ())))
    return None if rounds and masked else plan


def _kinds(mask: Tensor, start: int) -> tuple[Tensor, bool]:
    """Return of each column of a mask ``[B, Hq, T, width]`` whether it is hidden (0), shown (2) or neither (1), on the
    host; and whether the mask is causal over columns from ``start`` on, as many as there are queries.
    """
    for dim in range(3):  # what is repeated is looked at once
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    boolean = mask.dtype == torch.bool
    numbers = mask.view(torch.uint8) if boolean else mask
    low, high = numbers.amin((0, 1, 2)), numbers.amax((0, 1, 2))
    if boolean:
        kinds = low + high
    else:
        seen, all_see = high > LOWEST, (low == 0) & (high == 0)
        kinds = seen.to(torch.uint8) + all_see.to(torch.uint8)
    own, tokens = mask[..., start:], mask.shape[2]
    square = own.shape[3] == tokens > 1
    if square:
        kinds = torch.cat([kinds, _is_causal(own).to(torch.uint8)[None]])
    kinds = kinds.cpu()
    return (kinds[:-1], bool(kinds[-1])) if square else (kinds, False)


def _is_causal(mask: Tensor) -> Tensor:
    """Return whether a mask ``[B, h, T, T]`` shows to each query the tokens up to its own, on the device."""
    right, tokens = [], mask.shape[2]
    token = torch.arange(tokens, dtype=torch.int64, device=mask.device)
    for first in range(0, tokens, CHECKED_ROWS):
        rows = mask[:, :, first : first + CHECKED_ROWS]
        behind = token <= token[first : first + CHECKED_ROWS, None]
        same = (
            rows == behind
            if mask.dtype == torch.bool
            else torch.where(behind, rows == 0, rows <= HIDES)
        )
        right.append(same.all())
    return torch.stack(right).all()


def _spans(kinds: Tensor, layout: Layout) -> list[Span]:
    """Return spans of whole pages that cover all columns but those that are hidden; the last may end anywhere."""
    end, spans, done = len(kinds), list[Span](), 0

    def masked_until(slot: int) -> None:
        if slot > done:
            spans.append(Span(done, slot, "masked"))

    first = 0
    values, counts = (x.tolist() for x in torch.unique_consecutive(kinds, return_counts=True))
    for kind, count in zip(values, counts, strict=True):
        last = first + count
        inner = _page_from(first, layout), end if last == end else _page_before(last, layout)
        if kind != 1 and inner[1] > inner[0]:
            masked_until(inner[0])
            if kind == 2:
                spans.append(Span(*inner, "shown"))
            done = inner[1]
        first = last
    masked_until(end)
    return spans


def _page_from(slot: int, layout: Layout) -> int:
    """Return the first place at or behind a slot where a page begins, or 0."""
    pages = -(-max(0, slot - layout.sinks) // layout.page_size)
    return 0 if slot == 0 else layout.sinks + pages * layout.page_size


def _page_before(slot: int, layout: Layout) -> int:
    """Return the last place at or before a slot where a page begins, or 0."""
    inner = slot - layout.sinks
    return 0 if inner < 0 else slot - inner % layout.page_size


# --- attention ------------------------------------------------------------------------------------


def attend(
    query: Tensor, keys: Side, values: Side, mask: Tensor | None, scale: float, plan: Plan, join: Join
) -> Tensor:  # fmt: skip
    """Attend as planned, and join parts; arguments are as the backends' ``attend`` takes them.

    Returns:
        ``[B, Hq, T, D]`` in the dtype of ``query``; NaN if the cache holds fewer tokens than the plan begins with.
    """
    B, Hq, T, D = query.shape
    if mask is not None:
        mask = mask.expand(B, Hq, T, mask.shape[-1])
    parts = _parts(query, keys, values, mask, scale, plan)
    found = next(parts, None)
    if found is None:
        return query.new_zeros(B, Hq, T, D)
    for part in parts:
        found = join(found, part)
    out = found.output.to(query.dtype).reshape(B, Hq, T, D).contiguous()  # as compilers are told
    if mask is not None and not plan.all_see:
        seen = mask[..., : plan.start + keys.new.shape[2]]
        seen = seen if seen.dtype == torch.bool else seen > LOWEST
        out.masked_fill_(~seen.any(-1, keepdim=True), 0.0)
    least = torch.minimum(keys.cursor[0], values.cursor[0])
    return out.masked_fill_(least < plan.start, float("nan"))


def _parts(
    query: Tensor, keys: Side, values: Side, mask: Tensor | None, scale: float, plan: Plan
) -> Iterator[Part]:
    """Yield the `Part` of the new tokens, then those of pieces of the history."""
    B, Hq, T, D = query.shape
    H = keys.new.shape[1]
    if plan.new is not None:
        seen = plan.new.last - plan.start
        key, value = (side.new[:, :, :seen].to(query.dtype) for side in (keys, values))
        yield _attend_to(query, key, value, mask, plan.new, scale)
    rows = query.reshape(B, H, Hq // H * T, D)
    pieces = [piece for span in plan.held for piece in _pieces(span, query, keys)]
    longest = max((piece.last - piece.first for piece in pieces), default=0)
    scratch = [query.new_empty(B * H * longest * D) for _ in range(2)]
    for piece in pieces:
        shape = B, H, piece.last - piece.first, D
        key, value = (memory[: math.prod(shape)].view(shape) for memory in scratch)
        for side, x in ((keys, key), (values, value)):
            side.read(piece.first, piece.last, x)
        if piece.view == "shown":
            output, lse = _flash(rows, key, value, False, scale)
            yield Part(output.unflatten(2, (Hq // H, T)), lse)
        else:
            yield _attend_to(query, key, value, mask, piece, scale)


def _pieces(span: Span, query: Tensor, keys: Side) -> list[Span]:
    """Cut a span where pages begin: what is dequantized at once, and repeated for a mask, fits scratch memory."""
    B, Hq, _T, D = query.shape
    heads = keys.new.shape[1] if span.view == "shown" else Hq
    page = keys.layout.page_size
    tokens = SCRATCH_BYTES // (2 * B * heads * D * query.dtype.itemsize) // page * page
    pieces, first = [], span.first
    while first < span.last:
        last = min(_page_before(first + max(tokens, page), keys.layout), span.last)
        last = span.last if last <= first else last
        pieces.append(Span(first, last, span.view))
        first = last
    return pieces


def _attend_to(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, span: Span, scale: float
) -> Part:
    """Attend to the tokens of a span as they are seen."""
    shared = query.shape[1] // key.shape[1]
    if span.view == "masked":
        assert mask is not None
        # No fused kernel takes both masks and groups.
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        output, lse = _biased(query, key, value, mask[..., span.first : span.last], scale)
    else:
        output, lse = _flash(query, key, value, span.view == "causal", scale)
    return Part(output.unflatten(1, (-1, shared)), lse)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to all tokens, or causally to as many as there are queries."""
    aten = torch.ops.aten
    if query.is_cuda:
        output, lse = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, scale=scale
        )[:2]
    else:
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
    return output, lse


def _biased(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to tokens under a mask with a column for each."""
    for dim in range(3):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    width = mask.shape[3]
    room = -(-width // BIAS_STEP) * BIAS_STEP
    far = max(FAR, torch.finfo(query.dtype).min)
    bias = query.new_empty(*mask.shape[:3], room)[..., :width]
    if mask.dtype == torch.bool:
        bias.fill_(0.0).masked_fill_(~mask, far)
    else:
        torch.clamp(mask, min=far, out=bias)
    bias = bias.expand(*query.shape[:3], width)
    aten = torch.ops.aten
    if query.is_cuda:
        output, lse = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, scale=scale
        )[:2]
        return output, lse[..., : query.shape[2]]
    output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scale
    )
    return output, lse


def join_parts(one: Part, other: Part) -> Part:
    """Return attention to the tokens of both parts, in fp32."""
    lse = [part.lse.reshape(one.output.shape[:4]) for part in (one, other)]
    total = torch.logaddexp(*lse)
    weights = [(each - total).exp()[..., None] for each in lse]
    return Part(one.output * weights[0] + other.output * weights[1], total)
