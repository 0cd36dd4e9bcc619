"""Find the cache tensor behind the key or the value of an attention.

From the operand back: repeated heads and cut-off cache positions are peeled away until the tensor that the model
keeps is reached. How that tensor enters and leaves the graph is its `Life`::

    cat([past, new], 2), returned                 GROWN (past is quantized) or GROWN_PLAIN
    cat([past, new], 2)[:, :, -W:], returned      the same, of a sliding window
    new, returned                                 FRESH
    zeros(...), index_copy_(2, pos, new), returned   ALLOCATED
    placeholder, index_copy_(2, pos, new)         BUFFER or BUFFER_PLAIN; ``cache[:, :, pos] = new`` as well
    index_copy(placeholder, 2, pos, new), returned   the same, and the tensor that was passed in stays as it was
    cat([placeholder, new], 2), whose end is copied into the placeholder   RING or RING_PLAIN
    zeros(...), copy_(new[:, :, -S:]), returned      RING_FRESH
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.movement import cache_inputs, gathered_from, made_of, moved_from
from kvq_compile.lowering.find.reasons import NO_CACHE, why_not_kept
from kvq_compile.lowering.find.rings import Ring
from kvq_compile.lowering.find.trial import data_of, plain_name
from kvq_compile.lowering.find.trims import kept_of, suffix_of
from kvq_compile.lowering.find.updates import ALLOCATIONS, Update, updated_caches
from kvq_compile.lowering.find.writes import (
    ADDING,
    ADDS,
    NO_WRITE,
    other_write,
    read_write,
    writes_of,
)
from kvq_compile.lowering.nodes import (
    argument,
    getitem_index,
    input_of,
    is_full,
    order_of,
    root_of,
    same,
    shape_of,
    source_name,
    target_name,
    value_of,
    writes_in_place,
)
from kvq_compile.lowering.sites import Life, Refusal, State

READ_ELSEWHERE = "the cache is read outside attention in the same call"


@dataclass(frozen=True)
class _Read:
    """How an attention reads a tensor: ``first`` is the first node of the way from there, ``None`` if it is none."""

    base: fx.Node
    repeats: Any
    slots: Any
    first: fx.Node | None
    last: Any = None


def find_state(
    operand: fx.Node,
    outputs: set[fx.Node],
    updates: Mapping[fx.Node, Update] | None = None,
    attention: fx.Node | None = None,
    rings: Mapping[fx.Node, Ring] | None = None,
) -> State:
    """Return the state behind an attention's key or value.

    Args:
        operand: The key, not transposed, or the value: ``[B, H, S, D]``.
        outputs: Nodes that the graph returns.
        updates: What `name_updates` has found.
        attention: The result of the attention; of the writes into a buffer, the last before it is its own.
        rings: What `spell_rings` has found.

    Raises:
        Refusal: The tensor is not a cache, or not one that can be quantized.
    """
    read = _peel(operand)
    base = read.base
    shape = shape_of(base)
    if shape is None or len(shape) != 4:
        raise Refusal(f"keys and values must be [B, H, S, D], got {shape}")
    ring = (rings or {}).get(base)
    if ring is not None:
        return _ring(read, ring)
    update = (updates or {}).get(base)
    if update is not None:
        return _updated(read, update, outputs, attention)
    if _grows(base):
        if argument(base, 1, "dim", 0) in (2, -2):
            return _grown(read, outputs)
        if any(root_of(t).op == "placeholder" for t in argument(base, 0, "tensors")):
            raise Refusal("new tokens are joined along another dimension than 2")
    if base.op == "placeholder" or target_name(base) in ALLOCATIONS:
        return _written(read, outputs, attention)
    whole = [node for node in outputs if node is base or moved_from(node) is base]
    kept = whole[0] if whole and base not in whole else kept_of(base, outputs)
    if kept is None:
        raise Refusal(why_not_kept(base, outputs))
    return _fresh(read, kept) if whole else _fresh(read, base, None if kept is base else kept)


def read_base(operand: fx.Node) -> fx.Node:
    """Return what an attention's key or value is read from, before heads are repeated or a prefix is taken."""
    return _peel(operand).base


def _peel(node: Any) -> _Read:
    """Walk back along repeated heads and cut-off cache positions."""
    repeats: Any = 1
    slots: Any = None
    last: Any = None
    first: fx.Node | None = None
    while True:
        name, behind = target_name(node), node
        step = _repeat_of(node)
        if step is not None:
            node, times = step
            repeats = repeats * times
        elif moved_from(node) is not node:
            node = moved_from(node)
        elif name == "getitem" and slots is None and (cut := _prefix_of(node)) is not None:
            slots, node = cut, input_of(node)
        elif last is None and slots is None and _grows(suffix_of(node)):
            last, node = (shape_of(node) or ())[2], input_of(node)
        else:
            return _Read(node, repeats, slots, first, last)
        first = behind
        while first.args[0] is not node:
            first = input_of(first)


def _grows(node: Any) -> bool:
    """Return whether a tensor is joined from others, as a cache that grows is."""
    return target_name(node) in ("cat", "concat")


def _repeat_of(node: Any) -> tuple[fx.Node, Any] | None:
    """Return the tensor whose heads ``node`` repeats next to one another, and how often."""
    name = target_name(node)
    if name == "repeat_interleave" and argument(node, 2, "dim") in (1, -3):
        times = argument(node, 1, "repeats")
        return (input_of(node), times) if isinstance(times, int) else None
    if name == "expand":
        source, shape = shape_of(node.args[0]), shape_of(node)
        if source and shape and len(source) == len(shape) == 4 and same(source[1], 1):
            widened = not all(same(source[dim], shape[dim]) for dim in (0, 2, 3))
            return None if widened else (input_of(node), shape[1])
    if name in ("reshape", "view", "flatten") and target_name(node.args[0]) == "expand":
        expand = input_of(node)
        wide, inner, shape = shape_of(expand), shape_of(expand.args[0]), shape_of(node)
        if (
            wide is None
            or inner is None
            or shape is None
            or (len(wide), len(inner), len(shape)) != (5, 5, 4)
        ):
            return None
        merged = (
            same(shape[1], wide[1] * wide[2])
            and same(shape[2], wide[3])
            and same(shape[3], wide[4])
        )
        if same(inner[2], 1) and same(inner[1], wide[1]) and merged:
            narrow = _inserted_axis(input_of(expand))
            return None if narrow is None else (narrow, wide[2])
    return None


def _inserted_axis(node: Any) -> fx.Node | None:
    """Return the 4-d tensor that ``node`` gave an axis of size 1 behind its heads."""
    if target_name(node) == "unsqueeze" and argument(node, 1, "dim") in (2, -3):
        return input_of(node)
    index = getitem_index(node)
    if (
        index is not None
        and len(index) == 5
        and index[2] is None
        and all(is_full(i) for i in index if i is not None)
    ):
        return input_of(node)
    return None


def _prefix_of(node: fx.Node) -> Any:
    """Return how many leading cache positions a subscript keeps, if that is all it does."""
    index, shape = getitem_index(node), shape_of(node.args[0])
    if index is None or shape is None or (len(index), len(shape)) != (4, 4):
        return None
    cut = index[2]
    if not all(is_full(index[i], shape[i]) for i in (0, 1, 3)) or not isinstance(cut, slice):
        return None
    starts = cut.start is None or same(value_of(cut.start), 0)
    return cut.stop if starts and cut.step in (None, 1) and cut.stop is not None else None


def _grown(read: _Read, outputs: set[fx.Node]) -> State:
    cat = read.base
    tensors = [t for t in argument(cat, 0, "tensors") if not _is_empty(t)]
    if read.slots is not None:
        raise Refusal("attention reads only a part of the grown cache")
    kept = kept_of(cat, outputs)
    if kept is None:
        raise Refusal(why_not_kept(cat, outputs))
    trimmed = None if kept is cat else kept
    past, *new = tensors
    if any(isinstance(value_of(tensor), QuantizedKV) for tensor in new):
        raise Refusal("new tokens are joined in front of the cache")
    gathered = gathered_from(past)
    if not new or (past.op != "placeholder" and gathered is None):
        return _fresh(read, cat, trimmed)
    source = None if gathered is None else gathered[0]
    if len(new) != 1:
        raise Refusal("more than one tensor is joined to the cache")
    about = {"repeats": read.repeats, "source": source, "kept": trimmed, "last": read.last}
    held = value_of(past)
    if isinstance(held, QuantizedKV):
        if held.kind != "grown":
            raise Refusal("a quantized buffer of fixed size is grown by cat")
        if held.originals is not None and past.op != "placeholder":
            raise Refusal("rows are taken from a cache that keeps exact copies in host memory")
        return State(Life.GROWN, cat, new[0], past, **about)
    return State(Life.GROWN_PLAIN, kept, cat, past, **about)


def _ring(read: _Read, ring: Ring) -> State:
    """Return the state of a buffer that keeps the last of its tokens and the call's.

    Raises:
        Refusal: Something else reads it, or it is none of fixed size.
    """
    if ring.write is None:
        about = {"repeats": read.repeats, "slots": read.slots, "last": read.last}
        return State(Life.RING_FRESH, ring.past, ring.base, kept=ring.past, **about)
    held = value_of(ring.past)
    quantized = isinstance(held, QuantizedKV)
    if quantized and held.kind == "grown":
        raise Refusal("a quantized cache that grows by cat is overwritten as a whole")
    if read.slots is not None:
        raise Refusal("attention reads only the first of the tokens that a buffer keeps")
    if quantized and ring.position is not None and not _is_read_once(ring):
        raise Refusal("a buffer that is rolled once it is full is read outside attention, too")
    about = {"repeats": read.repeats, "last": read.last}
    life = Life.RING if quantized else Life.RING_PLAIN
    position = ring.held if ring.position is None else ring.position
    return State(life, ring.base, ring.new, ring.past, ring.write, position, **about)


def _is_read_once(ring: Ring) -> bool:
    """Return whether nothing but one reader sees what a buffer holds after a call."""
    readers = {user for user in ring.base.users if not is_dead(user)}
    if len(readers) != 1:
        return False
    (kept,) = readers
    return len([user for user in kept.users if user is not ring.write and not is_dead(user)]) == 1


def _fresh(read: _Read, whole: fx.Node, kept: fx.Node | None = None) -> State:
    """Return the state of keys or values that are all of this call, of which ``kept`` are returned if not all are.

    Raises:
        Refusal: They are not: a cache that entered the call is among what they are made of.
    """
    updated = [cache for cache in updated_caches(read.base) if cache.op == "placeholder"]
    if updated:
        raise Refusal(_why_no_update(read.base, updated))
    length = (shape_of(whole) or ())[2]
    for cache in cache_inputs(whole):
        value = value_of(cache)
        if isinstance(value, QuantizedKV) or not same(value.shape[2], length):
            raise Refusal(
                _adding(whole)
                or f"the cache {source_name(cache)} reaches attention through {target_name(read.base)}, "
                "which is not understood as new tokens behind those held"
            )
    about = {"repeats": read.repeats, "slots": read.slots, "last": read.last}
    return State(Life.FRESH, kept or whole, read.base, kept=kept, **about)


def _why_no_update(result: fx.Node, caches: Sequence[fx.Node]) -> str:
    """Return what is wrong with a copy of one of some caches of fixed size that holds something of the call."""
    by = f" by {plain_name(result)}" if set(caches) & {*result.all_input_nodes} else ""
    names = " or ".join(map(source_name, caches))
    return _adding(result) or f"the cache {names} is updated{by} {NO_WRITE}"


def _adding(result: fx.Node) -> str | None:
    """Return what is wrong with a tensor that elements of the call are added to, not written over others."""
    steps = map(plain_name, (result, *made_of(result)))
    adding = next((name for name in steps if name.rstrip("_") in ADDING), None)
    return None if adding is None else f"{adding} {ADDS}"


def _is_empty(node: Any) -> bool:
    shape = shape_of(node)
    return shape is not None and len(shape) == 1 and same(shape[0], 0)


def _written(read: _Read, outputs: set[fx.Node], attention: fx.Node | None) -> State:
    past = read.base
    if not writes_of(past):
        raise Refusal(_why_not_written(past, outputs))
    write, readers = _own_write(read, attention)
    position, new = read_write(write)
    quantized = isinstance(value_of(past), QuantizedKV)
    if quantized and value_of(past).kind == "grown":
        raise Refusal("a quantized cache that grows by cat is written in place")
    if past.op != "placeholder":
        if past not in outputs:
            raise Refusal(why_not_kept(past, outputs))
        if len(writes_of(past)) > 1:
            raise Refusal("the cache is allocated and written more than once in a call")
        life = Life.ALLOCATED
    else:
        life = Life.BUFFER if quantized else Life.BUFFER_PLAIN
    about = position, read.repeats, read.slots
    return State(life, past, new, past, write, *about, readers=readers)


def _own_write(read: _Read, attention: fx.Node | None) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Return the write whose tokens an attention reads, and what reads the cache up to the next write.

    Raises:
        Refusal: There is none, or nothing reads the cache in between.
    """
    past, writes = read.base, writes_of(read.base)
    place = order_of(past.graph)
    end = len(place) if attention is None else place[attention]
    readers = [
        user
        for user in past.users
        if user not in writes
        and user.op != "output"
        and past in data_of(user)
        and not is_dead(user)
    ]
    reads = [place[user] for user in readers]
    written = [place[write] for write in writes]
    before = [at for at in written if at < (end if read.first is None else place[read.first])]
    if not before or min(reads, default=end) < written[0]:
        raise Refusal(other_write(past) or "the cache is read before it is written")
    following = next((at for at in written if at > before[-1]), len(place))
    if following < end:
        raise Refusal("the cache is written between its read and the attention")
    own = tuple(user for user in readers if before[-1] < place[user] < following)
    if not own or (attention is None and len(own) > 1):
        raise Refusal(READ_ELSEWHERE)
    return writes[len(before) - 1], own


def _updated(
    read: _Read, update: Update, outputs: set[fx.Node], attention: fx.Node | None
) -> State:
    """Return the state of a fixed-size cache of which an updated copy is returned.

    Raises:
        Refusal: It is not returned, or both the cache as it was and the updated one are read.
    """
    past, result = update.past, read.base
    if result not in outputs:
        raise Refusal(why_not_kept(result, outputs))
    value, steps = value_of(past), {*update.steps}
    if isinstance(value, QuantizedKV) and value.kind == "grown":
        raise Refusal("a quantized cache that grows by cat is updated as one of fixed size")
    before = [user for user in past.users if user not in steps and not is_dead(user)]
    if any(isinstance(value_of(user), Tensor) or user.op == "output" for user in before):
        raise Refusal("the cache is read as it was before the write, too")
    users = [user for user in result.users if user not in steps and not is_dead(user)]
    readers = tuple(user for user in users if user.op != "output")
    if len(readers) > 1 and attention is None:
        raise Refusal(READ_ELSEWHERE)
    if past.op != "placeholder":
        life, base = Life.ALLOCATED, past
    else:
        life, base = Life.BUFFER if isinstance(value, QuantizedKV) else Life.BUFFER_PLAIN, result
    about = update.position, read.repeats, read.slots
    return State(life, base, update.new, past, result, *about, readers=readers)


def _why_not_written(past: fx.Node, outputs: set[fx.Node]) -> str:
    reason = why_not_kept(past, outputs)
    if reason != NO_CACHE or past.op != "placeholder":
        return reason
    return "attention reads a cache that this call does not write"


def is_dead(node: fx.Node) -> bool:
    """Return whether nothing reads a node, and it writes nothing."""
    return not node.users and node.op != "output" and not writes_in_place(node)
