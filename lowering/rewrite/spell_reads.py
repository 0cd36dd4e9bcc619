"""Normalize what an attention reads of a cache, whatever moves its elements on the way."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.arrangements import above
from kvq_compile.lowering.find.attention import find_attentions
from kvq_compile.lowering.find.movement import is_cache_like, keeps_dtype
from kvq_compile.lowering.find.states import read_base
from kvq_compile.lowering.find.trial import (
    CANNOT_BE_RUN,
    MIXING,
    Trial,
    data_of,
    plain_name,
    random_like,
    size_of_trial,
)
from kvq_compile.lowering.find.updates import ALLOCATIONS
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import (
    FULL,
    argument,
    as_number,
    erase_unread,
    getitem_index,
    insert_call,
    order_of,
    root_of,
    same,
    shape_of,
    target_name,
    value_of,
    writers_of,
    writes_in_place,
)
from kvq_compile.lowering.rewrite.spell_growth import of_other_spellings
from kvq_compile.lowering.sites import Attention
from kvq_compile.lowering.unchanged import unchanged

_MOVES = (
    *(
        "view",
        "view_as",
        "reshape",
        "reshape_as",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "transpose",
    ),
    *(
        "permute",
        "movedim",
        "swapaxes",
        "swapdims",
        "flatten",
        "unflatten",
        "detach",
        "alias",
        "contiguous",
    ),
    *("clone", "repeat_interleave", "repeat", "tile", "stack", "cat", "unbind", "chunk", "split"),
    *("gather", "index_select"),
)
_SIZES = ("size", "getitem", "getattr")
_TRIALS = 3
_MOST = 64  # steps between a cache and attention, far more than any spelling takes


def spell_reads(graph: Graph) -> PassReport:
    """Read a cache by ``cache[:, :, :end]`` and ``repeat_interleave`` of its heads.

    Before:  attend(query, cache.permute(0, 2, 1, 3).repeat_interleave(2, 2).transpose(1, 2))
    After:   attend(query, cache.repeat_interleave(2, 1))
    Because: later passes look for the cache behind heads that are repeated and cache positions that are cut off.

    Leaves alone: what evaluation does not prove to be that.
    """
    changes = []
    _erase_unread_sizes(graph.fx)  # of what earlier passes have named by another node
    returned = set(graph.output.all_input_nodes)
    kept = {*returned, *graph.updates}
    with unchanged(graph.fx):
        attentions = find_attentions(graph.fx, graph.contractions)
        found = [each for each in attentions if isinstance(each, Attention)]
        operands = [x for each in found for x in (each.key, each.value)]
        operands += [*of_other_spellings(graph.fx), *of_other_spellings(graph.fx, of_a_head=True)]
    for operand in dict.fromkeys(operands):
        if not operand.users:
            continue  # it went with the spelling of one before it
        base = read_base(operand)
        if base in returned or is_cache(base):
            continue
        with unchanged(graph.fx):
            read = find_read(operand, kept)
        if read is not None and not _is_of_update(graph, read):
            changes.append(f"{operand} is read as {spell(graph.fx, read)}")
            _erase_unread_sizes(graph.fx)
            graph.updates.pop(operand, None)  # the same as the one that is returned
    graph.used |= {node for node in graph.fx.nodes if node.users}
    return PassReport(tuple(changes))


def _is_of_update(graph: Graph, read: Read) -> bool:
    """Return whether a cache is read as it was to make an updated copy of it, which the attention reads."""
    updates = graph.updates.values()
    return any(read.cache is x.past and read.result in x.steps for x in updates)


def _erase_unread_sizes(graph: fx.Graph) -> None:
    """Erase the sizes that nothing reads any more, and what only these read: they would pass for readers of a cache."""
    unread: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        is_size = target_name(node) in _SIZES and not isinstance(value_of(node), Tensor)
        is_left = node in unread and node.op != "placeholder" and not writes_in_place(node)
        if (is_size or is_left) and not node.users:
            unread.update(node.all_input_nodes)
            graph.erase_node(node)


def find_read(operand: fx.Node, kept: Collection[fx.Node], in_turn: bool = False) -> Read | None:
    """Return how an operand is read from a cache, if evaluation bears it out; ``kept`` are caches besides arguments."""
    for cache in _caches(operand, kept):
        read = Read(operand, cache, kept, in_turn)
        if read.end()[0] and read.is_proved():
            return read
    return None


def is_cache(node: fx.Node) -> bool:
    """Return whether a node is a cache as states know it."""
    if target_name(node) == "cat":
        return argument(node, 1, "dim", 0) in (2, -2)
    return is_cache_like(node) or target_name(node) in ALLOCATIONS


def _caches(operand: fx.Node, kept: Collection[fx.Node]) -> Iterator[fx.Node]:
    """Yield what an operand may be read from, nearest first."""
    mine = _shape_with_heads(operand)
    for node in above(operand):
        theirs = shape_of(node) or ()
        if node is operand or len(mine) != 4 or len(theirs) != 4:
            continue
        if not (node in kept or is_cache(node)):
            continue
        fits = same(mine[0], theirs[0]) and same(mine[3], theirs[3])
        if fits and _times(mine[1], theirs[1]) and value_of(node).dtype == value_of(operand).dtype:
            yield node


def _shape_with_heads(operand: fx.Node) -> tuple[Any, ...]:
    """Return the shape of an operand as ``[B, H, S, D]``, that of a product of one head, ``[B, S, D]``, as well."""
    shape = shape_of(operand) or ()
    return (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape


def _times(heads: Any, of: Any) -> int:
    """Return how often heads are repeated; 0 where that is no number."""
    if not isinstance(heads, int) or not isinstance(of, int):
        return int(same(heads, of))
    return 0 if of == 0 or heads % of else heads // of


def _moves(step: fx.Node) -> bool:
    """Return whether a step moves, copies or repeats elements, and at every size those from the first token on.

    Anything else, a clamp or the last tokens of a window, could do nothing at the sizes and to the numbers of a trial.
    """
    name, value = plain_name(step), value_of(step)
    if not isinstance(value, Tensor):
        several = isinstance(value, (tuple, list)) and name in _MOVES
        return several or isinstance(value, (int, torch.SymInt))
    if name == "getitem":
        return _takes_a_part(step)
    if name == "narrow":
        return bool(argument(step, 2, "start") == 0)
    if name == "getattr":
        return step.args[1] in ("mT", "T")
    return name in _MOVES or keeps_dtype(step, name)


def _is_fixed(step: fx.Node) -> bool:
    """Return whether the elements of a tensor are the same in every call, though they may be repeated more often."""
    if step.op == "placeholder":
        return False
    if not isinstance(value_of(step), Tensor):
        return isinstance(value_of(step), (int, torch.SymInt))
    inputs = step.all_input_nodes
    if plain_name(step) in ("expand", "expand_as", "unsqueeze", "view", "reshape", "getitem"):
        inputs = inputs[:1]
    elif any(isinstance(value_of(other), torch.SymInt) for other in inputs):
        return False
    return all(map(_is_fixed, inputs))


def _takes_a_part(step: fx.Node) -> bool:
    """Return whether a subscript takes first tokens, or what numbers tell of axes whose size is a number."""
    parts, shape = getitem_index(step), shape_of(step.args[0])
    if parts is None or shape is None:
        return isinstance(step.args[1], int)  # one of several tensors
    sizes = iter(shape)
    for part in parts:
        if part is None:
            continue
        size = next(sizes)
        told = (part.start, part.stop, part.step) if isinstance(part, slice) else (part,)
        told = tuple(as_number(value_of(x)) for x in told)
        fixed = isinstance(size, int) and all(x is None or type(x) is int for x in told)
        if isinstance(size, int) and isinstance(value_of(part), Tensor):
            continue  # an index, which is looked at itself
        if not fixed and not _is_prefix(part):
            return False
    return True


def _is_prefix(part: Any) -> bool:
    return isinstance(part, slice) and part.start in (None, 0) and part.step in (None, 1)


class Read(Trial):
    """The operations between a cache and an operand of attention, of which other caches are no part.

    An operand ``[B, S, D]`` is one head, and the cache, or the piece of a tensor of several, has just that.

    Args:
        operand: Keys or values as attention takes them.
        cache: What may be the cache.
        kept: Caches besides arguments.
        in_turn: Whether query heads take KV heads in turn, and not as many next to one another.
    """

    ignores = True

    def __init__(
        self, operand: fx.Node, cache: fx.Node, kept: Collection[fx.Node], in_turn: bool = False
    ) -> None:
        super().__init__(operand, [cache], MIXING)
        self.in_turn, self._kept = in_turn, kept
        self.cache, self.given = cache, (root_of(cache),)
        self.times = _times(_shape_with_heads(operand)[1], (shape_of(cache) or ())[1])
        self.of_a_head = len(shape_of(operand) or ()) == 3

    def is_proved(self) -> bool:
        """Return whether the operand is the first tokens of the cache, or all, with its heads repeated."""
        if self._is_proved():
            return True
        self.ignored = {x for x in above(self.result) if x in self._kept and x is not self.cache}
        return bool(self.ignored) and self._is_proved()

    def _is_proved(self) -> bool:
        needed = self._needed([self.result], self._ends, _MOST)
        if not needed:
            return False
        place = order_of(self.result.graph)
        self.steps = sorted(needed, key=place.__getitem__)
        moved = {self.cache, *self.ignored}
        for step in self.steps:
            if not moved.isdisjoint(data_of(step)):
                moved.add(step)
        if not all(_moves(step) if step in moved else _is_fixed(step) for step in self.steps):
            return False
        if self._is_written_between(place):
            return False
        try:
            tried = [self.with_room(sizes, self.cache) for sizes in self.assignments(_TRIALS)]
            fitting = [sizes for sizes in tried if self._fits(sizes)]
            return bool(fitting) and all(map(self._holds, fitting))
        except CANNOT_BE_RUN:
            return False

    def _fits(self, sizes: Any) -> bool:
        """Return whether the cache has as many tokens as are read: one of fixed size may not, at sizes of a trial."""
        read, held = _shape_with_heads(self.result)[2], value_of(self.cache).shape[2]
        return size_of_trial(read, sizes) <= size_of_trial(held, sizes)

    def _is_written_between(self, place: dict[fx.Node, int]) -> bool:
        """Return whether a copy of a part of the cache is made, which does not see a write that follows."""
        writes = [place[x] for x in writers_of(self.cache.graph).get(root_of(self.cache), ())]
        last = place[self.first_reader()]
        first = min((place[step] for step in self.copies()), default=last)
        return any(first < write < last for write in writes)

    def copies(self) -> list[fx.Node]:
        """Return the steps that hold elements of the cache in memory of their own."""
        moved = {self.cache}
        for step in self.steps:
            if not moved.isdisjoint(data_of(step)):
                moved.add(step)
        return [step for step in moved if root_of(step) is not root_of(self.cache)]

    def end(self) -> tuple[bool, Any]:
        """Return whether the cache positions that are read are known, and how many they are; ``None`` for all."""
        size, whole = _shape_with_heads(self.result)[2], value_of(self.cache).shape[2]
        if same(size, whole):
            return True, None
        if isinstance(size, int):
            return True, size
        for node in self.result.graph.nodes:
            if node is self.result:
                break
            if isinstance(value_of(node), torch.SymInt) and same(value_of(node), size):
                return True, node
        return False, None

    def first_reader(self) -> fx.Node:
        """Return the first node that reads the operand."""
        place = order_of(self.result.graph)
        return min(self.result.users, key=place.__getitem__)

    def _holds(self, sizes: Any) -> bool:
        cache = random_like(value_of(self.cache), sizes)
        found = self.run(sizes, {self.cache: cache.clone()})
        if self.of_a_head:
            found = found.unsqueeze(1)
        if not isinstance(found, Tensor) or found.dim() != 4 or found.shape[2] > cache.shape[2]:
            return False
        times, blocks = (self.times, 1) if self.in_turn else (1, self.times)
        expected = cache.repeat(1, times, 1, 1).repeat_interleave(blocks, 1)
        return torch.equal(found, expected[:, :, : found.shape[2]])


def spell(graph: fx.Graph, read: Read) -> fx.Node:
    """Read the cache by a subscript and ``repeat_interleave`` wherever the operand was read; return the result."""
    operand, node, end = read.result, read.cache, read.end()[1]
    value = value_of(operand)
    with graph.inserting_before(operand.next if read.copies() else read.first_reader()):
        if end is not None:
            cut = value_of(node)[:, :, : _shape_with_heads(operand)[2]]
            node = insert_call(graph, operator.getitem, (node, (FULL, FULL, slice(None, end))), cut)
        if read.times != 1:
            node = insert_call(graph, torch.repeat_interleave, (node, read.times, 1), value)
        if read.of_a_head:
            node = insert_call(graph, torch.squeeze, (node, 1), value)
    operand.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    erase_unread(graph, read.steps)
    return node
