"""Refuse sites whose meaning the rewriting might change.

The rewriting moves a write behind the attention that reads it, lets attention take the call's own tokens
from where they were computed, and lets cache positions without a token go unread. Each check below guards one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.cache.rows import why_not_by_row
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.cache.trim import first_of
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.ops import BACKENDS
from kvq_compile.lowering.find.positions import change_between, same_positions, same_value
from kvq_compile.lowering.find.trims import window_of
from kvq_compile.lowering.nodes import (
    changes,
    order_of,
    root_of,
    same,
    shape_of,
    value_of,
)
from kvq_compile.lowering.sites import RINGS, Attention, Life, Refusal, State

UNMASKED = "attention reads cache positions that hold no token: there is no mask"
ELSEWHERE = "keys and values are written at different cache positions, or at such as are not understood to be the same"
BY_ROW = "each row of the cache is written at positions of its own"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SLOTTED = (Life.ALLOCATED, Life.BUFFER, Life.BUFFER_PLAIN)


def check_tensors(attention: Attention, key: State, value: State) -> None:
    """Make sure that the kernels know the dtype, the device and the shapes.

    Raises:
        Refusal: They do not.
    """
    query = value_of(attention.query)
    if query.dim() != 4:
        raise Refusal(f"the query must be [B, Hq, T, D], got {tuple(query.shape)}")
    if query.dtype not in DTYPES:
        raise Refusal(f"dtype {query.dtype} is not supported; use float16, bfloat16 or float32")
    if query.device.type.upper() not in BACKENDS:
        served = " or ".join(BACKENDS).lower()
        raise Refusal(f"device {query.device.type} is not supported; use {served}")
    if same(query.shape[2], 0):
        raise Refusal("the call has no tokens")
    if any(same(size, 0) for size in (*query.shape, *(shape_of(key.new) or ()))):
        raise Refusal("the call has no sequences, heads or channels")
    _check_dtypes(attention, key, value)
    for state in (key, value):
        heads = (shape_of(state.base) or (0, 0))[1]
        shared = attention.grouped or same(
            heads, 1
        )  # one head is broadcast even where nothing says so
        matches = same(heads * state.repeats, query.shape[1])
        groups = shared and state.repeats == 1 and query.shape[1] % heads == 0  # guarded on
        if not matches and not groups:
            raise Refusal(
                f"{query.shape[1]} query heads do not match {heads} KV heads repeated {state.repeats} times"
            )


def _check_dtypes(attention: Attention, key: State, value: State) -> None:
    """Make sure that keys and values are held in one dtype; queries and new tokens are cast to it."""
    dtypes = [value_of(state.base).dtype for state in (key, value)]
    if dtypes[0] != dtypes[1]:
        raise Refusal(f"keys and values must have one dtype, got {dtypes[0]} and {dtypes[1]}")
    if dtypes[0] not in DTYPES:
        raise Refusal(f"dtype {dtypes[0]} is not supported; use float16, bfloat16 or float32")
    for state in (key, value):
        if state.life is not Life.GROWN:
            continue
        held = value_of(state.past)
        if held.originals is not None and held.dtype != dtypes[0]:
            raise Refusal("a cache that keeps exact copies in host memory cannot change its dtype")


def check_pair(key: State, value: State) -> None:
    """Make sure that keys and values are two caches that move together; guards on numbers of tokens if need be.

    Raises:
        Refusal: They are not.
    """
    if key.life is not value.life:
        raise Refusal(f"keys are {key.life.value}, values {value.life.value}")
    tokens = [(shape_of(state.new) or ())[2] for state in (key, value)]
    if bool(tokens[0] != tokens[1]):  # Dynamo may know them by symbols of their own
        raise Refusal("keys and values are different numbers of tokens")
    heads = [(shape_of(state.base) or (0, 0))[1] for state in (key, value)]
    if not same(*heads):
        raise Refusal(f"keys have {heads[0]} KV heads and values {heads[1]}")
    if key.base is value.base or (key.past is not None and key.past is value.past):
        raise Refusal("keys and values are one tensor")
    windows = [None if state.kept is None else window_of(state.kept) for state in (key, value)]
    if (key.kept is None) != (value.kept is None) or windows[0] != windows[1]:
        raise Refusal("keys and values are kept in sliding windows of different lengths")
    if key.life is Life.GROWN:
        held = [value_of(state.past) for state in (key, value)]
        ends = [(cache.shape[2], first_of(cache.trim)) for cache in held]
        if any(bool(a != b) for a, b in zip(*ends, strict=True)):  # merges their symbols
            raise Refusal("keys and values hold different numbers of tokens")
    if key.life in RINGS:
        slots = [(shape_of(state.past) or ())[2] for state in (key, value)]
        if not same(*slots) or not same_value(key.position, value.position):
            raise Refusal("keys and values are kept in rings of different lengths")
        if (key.last is None) != (value.last is None):
            raise Refusal("keys and values are read from different cache positions on")
    if key.life not in _SLOTTED:
        return
    positions, writes = (key.position, value.position), (key.write, value.write)
    if not same_positions(*positions) or change_between(positions, writes):
        raise Refusal(ELSEWHERE)
    if not same_value(key.slots, value.slots):
        raise Refusal("keys and values are read up to different cache positions")


def check_mask(attention: Attention, key: State) -> None:
    """Make sure that cache positions without a token cannot be seen, and that the mask has a column for each.

    Raises:
        Refusal: That is not certain.
    """
    mask = value_of(attention.mask)
    if isinstance(mask, torch.Tensor):
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise Refusal(f"the mask must be boolean or floating, got {mask.dtype}")
        if mask.requires_grad and torch.is_grad_enabled():
            raise Refusal("the mask is trained")
        slots = (shape_of(attention.key) or (0, 0, 0))[2]
        if mask.dim() == 0 or (same(mask.shape[-1], 1) and not same(slots, 1)):
            raise Refusal("one column of the mask stands for all cache positions")
    if key.life not in _SLOTTED or mask is not None or attention.causal:
        return
    looked_at = end_without_mask(attention, key)
    if key.slots is None or (looked_at is not None and key.life is Life.ALLOCATED):
        raise Refusal(UNMASKED)


def end_without_mask(attention: Attention, key: State) -> Any:
    """Return up to which cache position an attention reads that has no mask, where the graph does not show that
    tokens are written up to there; else ``None``.
    """
    if key.life not in _SLOTTED or attention.mask is not None or attention.causal:
        return None
    tokens = (shape_of(key.new) or (0, 0, 0))[2]
    first = 0 if key.life is Life.ALLOCATED else value_of(key.position)
    known = not isinstance(first, torch.Tensor) and key.slots is not None
    return None if known and same(value_of(key.slots), first + tokens) else key.slots


def check_rows(state: State, layout: Layout) -> None:
    """Make sure that a cache can count its rows, where each is written at positions of its own.

    Raises:
        Refusal: It cannot.
    """
    if not state.by_row:
        return
    held = value_of(state.past)
    if isinstance(held, QuantizedKV) and held.kind != "static":
        raise Refusal(f"{BY_ROW}, and it keeps its last tokens, as many of each")
    if state.life is Life.ALLOCATED:
        raise Refusal(f"{BY_ROW}, and it is allocated in the same call; allocate it beforehand")
    reason = why_not_by_row(layout)
    if reason is not None:
        raise Refusal(f"{BY_ROW}, and {reason}; take another method")


def check_order(attention: Attention, states: Sequence[State]) -> None:
    """Make sure that a write can move behind the attention.

    Args:
        attention: The attention.
        states: Its keys and values.

    Raises:
        Refusal: What is written changes in between.
    """
    graph = attention.output.graph
    place = order_of(graph)
    for state in states:
        if state.life not in (*_SLOTTED, *RINGS, Life.GROWN):
            continue
        write = state.base if state.write is None else state.write
        needed = {
            root_of(node) for node in (state.new, state.position) if isinstance(node, fx.Node)
        }
        if changes(graph, needed, place[write] + 1, place[attention.output]):
            raise Refusal("what is written changes between the write and the attention")
        if state.life in RINGS and state.base is not state.past:  # else it runs as captured
            _check_readers(state)


def _check_readers(state: State) -> None:
    """Make sure that nothing but its attention reads a ring: it would see the tokens that are written behind that.

    Raises:
        Refusal: Something does.
    """
    assert state.past is not None
    own = {state.write, state.base, *state.base.all_input_nodes}
    if any(user not in own and user.users for user in state.past.users):
        raise Refusal("the cache is read outside attention in the same call")
