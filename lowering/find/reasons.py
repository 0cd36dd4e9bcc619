"""Reasons why keys or values are not found to be a cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.movement import is_cache_like
from kvq_compile.lowering.find.trial import MIXING, plain_name
from kvq_compile.lowering.find.writes import other_write, writes_of
from kvq_compile.lowering.nodes import VIEWS, root_of, same, shape_of, target_name, value_of

NO_CACHE = "keys and values are not kept after the call"
NOT_UNDERSTOOD = "an attention that is not understood reads what is kept after the call"
BY_OPTION = "left in 16 bit by the option layers"
A_PART_IS_KEPT = (
    "only a part of the keys and values is kept, "
    "which is not understood as their last tokens (a sliding window)"
)
SHORT_WINDOW = "its sliding window is no longer than the exact region"  # told, and no warning
OVERWRITTEN = "the cache is overwritten as a whole, and not with the last of its tokens and new ones behind them"
SOME_ROWS = (
    "only some rows of the cache are written or read, which must be the same wherever a call takes them, as those of "
    "cache[:batch]; write other rows outside compiled calls, as cache[row, :, :T] = tokens"
)
CHANGES_DTYPE = "the quantized cache is cast to another dtype in this call, which runs uncompiled; later ones do not"
IN_A_BODY = "it is attended to in the body of a higher-order operator, which is not looked into:"
OFFLOADED = (
    "keys and values are moved to another device once they are attended to (an offloaded cache), and a quantized cache "
    "stays where it is attended to; take a cache that is not offloaded"
)
_REACH = (
    32  # steps followed from an attention's operand to a cache, far more than any spelling takes
)
A_PART_IS_READ = "attention reads a part of it (sliding window?)"
_HINTS = {
    "transpose": "it is not understood as tokens in some order of the axes [B, H, S, D]",
    "permute": "it is not understood as tokens in some order of the axes [B, H, S, D]",
    "repeat": "repeat heads next to one another, as repeat_interleave does",
    "getitem": A_PART_IS_READ,
}


_OPERATORS = {
    "tag_activation_checkpoint": "torch.utils.checkpoint",
    "cond": "torch.cond",
    "map_impl": "map",
}


def in_a_body(node: fx.Node) -> str:
    """Return the reason why what a higher-order operator attends to stays as it is."""
    return f"{IN_A_BODY} {_OPERATORS.get(target_name(node), target_name(node))}"


def is_expected(reason: str) -> bool:
    """Return whether a reason to leave keys and values in 16 bit is one that needs no warning."""
    return reason in (NO_CACHE, BY_OPTION) or reason.startswith(SHORT_WINDOW)


def why_not_kept(base: fx.Node, outputs: set[fx.Node]) -> str:
    """Return the reason why the keys or values ``base`` are not what the model keeps.

    Args:
        base: What attention reads, heads and cache positions peeled away.
        outputs: Nodes that the graph returns.
    """
    for user in _neighbours(base.users):
        if target_name(user) == "getitem" and _copied(user):
            return OVERWRITTEN
        if target_name(user) == "getitem" and user in outputs:
            return A_PART_IS_KEPT
    if _is_rows_of_a_buffer(base):
        return SOME_ROWS
    if _overwritten(base):
        return OVERWRITTEN
    memory = root_of(base)
    lives_on = is_cache_like(memory) or any(root_of(node) is memory for node in outputs)
    written = other_write(memory) if lives_on else None
    if written is not None:
        return written
    read = _read_of_cache(base, outputs)
    if read is not None and _takes_rows(read):
        return SOME_ROWS
    if read is not None:
        name = target_name(base)
        hint = f"; {_HINTS[name]}" if name in _HINTS else ""
        return f"the cache reaches attention through {name}{hint}"
    returned = _returned_from(_viewed(base), outputs)
    if returned is None:
        return NO_CACHE
    if value_of(returned).device != value_of(base).device:
        return OFFLOADED
    return f"keys and values are returned through {target_name(returned)}, not as they are"


def _is_rows_of_a_buffer(base: fx.Node) -> bool:
    """Return whether ``base`` is written, and is a view of fewer rows than a cache tensor has."""
    memory, rows = root_of(base), shape_of(base)
    whole = shape_of(memory)
    if memory is base or memory.op != "placeholder" or not writes_of(base):
        return False
    return bool(whole and rows and len(whole) == len(rows) and not same(whole[0], rows[0]))


def _viewed(base: fx.Node) -> fx.Node:
    """Return the tensor that ``base`` is a view of, in whatever order of its axes."""
    while target_name(base) in VIEWS and shape_of(base.args[0]) is not None:
        base = base.args[0]  # type: ignore[assignment]
    return base


def _neighbours(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the nodes that hold keys or values in some form: those of three dimensions and more."""
    return [node for node in nodes if len(shape_of(node) or ()) >= 3 and not _mixes(node)]


def _mixes(node: fx.Node) -> bool:
    return plain_name(node) in (*MIXING, "sum")


def _copied(node: fx.Node) -> bool:
    return any(
        target_name(user) in ("copy_", "setitem") and user.args[0] is not node
        for user in node.users
    )


def _overwritten(node: fx.Node) -> bool:
    return any(target_name(user) == "copy_" and user.args[0] is node for user in node.users)


def is_kept(node: fx.Node, outputs: set[fx.Node]) -> bool:
    """Return whether a node is a tensor that lives on after the call: returned, quantized, or written in place."""
    if node.op == "placeholder":
        return (
            isinstance(value_of(node), QuantizedKV) or bool(writes_of(node)) or _overwritten(node)
        )
    return node in outputs


def _read_of_cache(base: fx.Node, outputs: set[fx.Node]) -> fx.Node | None:
    """Return what reads a cache that lies behind ``base``, moved or changed on its way to attention, if one does."""
    seen: set[fx.Node] = set()
    front = [base]
    for _ in range(_REACH):
        for node in front:
            if any(is_kept(given, outputs) for given in _neighbours(_inputs(node))):
                return node
        front = [
            node for node in _neighbours(n for f in front for n in _inputs(f)) if node not in seen
        ]
        seen.update(front)
    return None


def _inputs(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that a node takes; of one of several tensors (chunk, unbind), what they are parts of."""
    for given in node.all_input_nodes:
        if isinstance(value_of(given), (tuple, list)):
            yield from given.all_input_nodes
        else:
            yield given


def _takes_rows(read: fx.Node) -> bool:
    """Return whether a read of a buffer takes a part of it along its first axis, the others whole but for one."""
    whole, part = shape_of(read.args[0]) or (), shape_of(read) or ()
    if target_name(read) != "getitem" or not whole or len(whole) != len(part):
        return False
    other = [not same(a, b) for a, b in zip(whole, part, strict=True)]
    return other[0] and sum(other) <= 2


def _returned_from(base: fx.Node, outputs: set[fx.Node]) -> fx.Node | None:
    """Return the output that keys or values reach, if they do."""
    seen: set[fx.Node] = set()
    front = [base]
    for _ in range(_REACH):
        front = [
            node for node in _neighbours(n for f in front for n in f.users) if node not in seen
        ]
        for node in front:
            if node in outputs:
                return node
        seen.update(front)
    return None
