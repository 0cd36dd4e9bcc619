"""Plan checks, before a call runs, of the cache positions that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.cache.become import stays_plain
from kvq_compile.kernels.cache.ring import takes
from kvq_compile.kernels.cache.rows import why_not_by_row
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.bodies import attends_inside
from kvq_compile.lowering.find.changes import check_growth
from kvq_compile.lowering.find.checks import BY_ROW, end_without_mask
from kvq_compile.lowering.find.positions import change_between, needed_by, part_of, same_value
from kvq_compile.lowering.find.reasons import OVERWRITTEN, in_a_body
from kvq_compile.lowering.find.sites import left_alone
from kvq_compile.lowering.find.trial import nodes_by_memory
from kvq_compile.lowering.find.writes import is_write, read_write, writes_of
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import (
    EVALUATED,
    bodies_of,
    order_of,
    root_of,
    same,
    shape_of,
    source_name,
    target_name,
    value_of,
    writers_of,
    writes_in_place,
)
from kvq_compile.lowering.ring_nodes import overwrites
from kvq_compile.lowering.rings import BY_ROW as KEPT_BY_ROW
from kvq_compile.lowering.rings import RingWrite
from kvq_compile.lowering.sites import RINGS, AttentionSite, Life, Refusal, State
from kvq_compile.lowering.sizes import Size
from kvq_compile.lowering.slots import Counter, SlotCheck, Write

SLIDES = "what reads a buffer that is rolled once it is full is not understood"
SLOTTED = (Life.ALLOCATED, Life.BUFFER, Life.BUFFER_PLAIN, *RINGS)


def plan_slot_checks(graph: Graph) -> PassReport:
    """Plan which writes into static caches are checked before a call runs.

    Before:  sites that write into caches of fixed size
    After:   the same, ``graph.check``; those are no sites any more whose slots cannot be known beforehand, and nothing
             else stores them quantized
    Because: a quantized cache takes tokens one behind another, and a model may write otherwise: where it does the
             call has to run as it was captured, and that must be known before anything is written.
    """
    positions: dict[fx.Node, fx.Node] = {}  # each with the write that reads it
    writes: dict[fx.Node, Write] = {}
    masks: dict[fx.Node, tuple[fx.Node, fx.GraphModule]] = {}  # each with the attention
    _refuse_unfinished(graph)
    kept: list[AttentionSite] = []
    for site in graph.sites:
        inverted = site.attention.mask_hides
        try:
            ends = {site.key.write: end_without_mask(site.attention, site.key)}
            found = {
                state.write: _write(
                    graph,
                    state,
                    positions,
                    _hides(graph, state, site, masks),
                    inverted,
                    ends.get(state.write),
                )
                for state, _ in site.states()
                if state.life in SLOTTED
            }
        except Refusal as reason:
            _refuse(graph, site, reason)
        else:
            kept.append(site)
            writes |= {node: write for node, write in found.items() if node and write}
    graph.sites = kept
    _refuse_unfinished(graph)
    graph.dense = [pair for pair in graph.dense if _is_looked_at(graph, pair[0], positions, writes)]
    for cache in graph.inputs:
        if isinstance(value_of(cache), QuantizedKV):
            try:
                writes |= _other_writes(graph, cache, positions)
                _count_rows(graph, cache, writes)
            except Refusal as reason:
                graph.thaw = f"{source_name(cache)}: {reason}"
                graph.thawed.add(cache)
    if graph.thaw is not None:  # the call runs as captured
        others = {root_of(node.args[0]) for node in writes if EVALUATED in node.meta}
        graph.thawed |= {cache for cache in others if isinstance(value_of(cache), QuantizedKV)}
    part = part_of(positions, graph.arguments, on_host=True) if positions else None
    place = order_of(graph.fx)
    planned = tuple(writes[node] for node in sorted(writes, key=place.__getitem__))
    rings = _rings(graph)
    graph.check = SlotCheck(part, planned, rings) if planned or rings else None
    return PassReport(tuple(f"cache positions of {write.name} are looked at" for write in planned))


def _count_rows(graph: Graph, cache: fx.Node, writes: Mapping[fx.Node, Write]) -> None:
    """Note that a cache counts its rows from this call on, where each is written at positions of its own.

    Raises:
        Refusal: It cannot.
    """
    held: QuantizedKV = value_of(cache)
    rings = (ring for ring in graph.rings.values() if ring.past is cache)
    if held.by_row and any(rings):
        raise Refusal(KEPT_BY_ROW)
    mine = [node for node, write in writes.items() if write.rows and root_of(node) is cache]
    if not mine:
        return
    reason = why_not_by_row(held.page_layout)
    if held.kind != "static" or reason is not None:
        raise Refusal(f"{BY_ROW}, and {reason or 'as many of each are kept'}")
    if not held.by_row:
        graph.by_row.add(cache)
        graph.changes_memory = True


def _rings(graph: Graph) -> tuple[RingWrite, ...]:
    """Return the writes into rings that are quantized, and note whether one of them needs other memory."""
    found = []
    for ring in graph.rings.values():
        cache = value_of(ring.past)
        if not isinstance(cache, QuantizedKV) or cache.kind == "grown":
            continue
        tokens = (shape_of(ring.new) or ())[2]
        held = None if ring.held is None else graph.sizes.size(value_of(ring.held))
        anew = overwrites(ring)
        about = graph.arguments[ring.past], graph.sizes.size(tokens), held, anew
        found.append(RingWrite(*about, slides=ring.position is not None))
        graph.changes_memory |= not anew and not takes(cache, tokens)
    return tuple(found)


def _refuse(graph: Graph, site: AttentionSite, reason: Refusal) -> None:
    output = site.attention.output
    graph.reports.append(left_alone(site.layer, site.where, output, str(reason)))


def _refuse_unfinished(graph: Graph) -> None:
    """Refuse sites on a 16-bit buffer whose last write belongs to none: it tells how many tokens the buffer holds."""
    while True:
        owned = {state.write for state, _ in graph.states()}
        unfinished = [site for site in graph.sites if not _is_finished(site, owned)]
        if not unfinished:
            return
        graph.sites = [site for site in graph.sites if site not in unfinished]
        for site in unfinished:
            _refuse(graph, site, Refusal("the cache is written again behind its last attention"))


def _is_finished(site: AttentionSite, owned: set[fx.Node | None]) -> bool:
    plain = (state for state, _ in site.states() if state.life is Life.BUFFER_PLAIN)
    pasts = (state.past for state in plain if state.past is not None)
    return all(write in owned for past in pasts for write in writes_of(past)[-1:])


def _is_looked_at(
    graph: Graph, state: State, positions: dict[fx.Node, fx.Node], writes: dict[fx.Node, Write]
) -> bool:
    """Plan the look at the write of a cache that is read dense; say whether it can be known before the call."""
    if state.life not in SLOTTED or state.write is None:
        return True
    try:
        write = _write(graph, state, positions, None, False)
    except Refusal:
        return False
    writes |= {} if write is None else {state.write: write}
    return True


def _write(
    graph: Graph,
    state: State,
    positions: dict[fx.Node, fx.Node],
    hides: fx.GraphModule | bool | None,
    inverted: bool,
    end: Any = None,
) -> Write | None:
    """Plan the look at one write; ``hides``, ``inverted`` and ``end`` as `Write` has them, the last as a node.

    Raises:
        Refusal: Its cache positions cannot be known before the call, or the buffer is to stay plain.
    """
    assert state.past is not None
    reason = stays_plain(graph.inputs.get(state.past))
    if reason is not None:
        raise Refusal(reason)
    position, reader = state.position, state.write or state.base
    is_tensor = isinstance(value_of(position), torch.Tensor)
    if state.life in RINGS and not is_tensor:
        return None  # `_rings` plans the look at it
    if is_tensor:
        needed_by({position: reader}, graph.arguments)  # raises where it cannot be known
    name = source_name(state.past)
    argument = graph.arguments.get(state.past)
    evaluated = state.is_update or (state.write is not None and EVALUATED in state.write.meta)
    about = hides, inverted, state.is_update, evaluated
    count = (shape_of(state.new) or ())[2]
    read = None if end is None else graph.sizes.size(value_of(end))
    if not is_tensor:
        first = graph.sizes.size(value_of(position))
        return Write(name, argument, None, first, graph.sizes.size(count), *about, end=read)
    others = state.life in RINGS or state.by_row
    counter = None if others else _counter(graph, position, count)
    if counter is not None:
        number = graph.sizes.size(count)
        return Write(name, argument, None, None, number, *about, counter=counter, end=read)
    rows = _rows(position)
    alike = same(value_of(position).numel(), count * max(rows, 1))
    tokens = None if alike else graph.sizes.size(count)
    slides, place = state.life in RINGS, _place(position, positions, reader)
    return Write(name, argument, place, None, tokens, *about, slides, end=read, rows=rows)


def _counter(graph: Graph, position: fx.Node, count: Any) -> Counter | None:
    """Return the counter of a write at ``arange(count) + number``, where the number is an argument."""
    if target_name(position) != "add" or len(position.args) != 2 or position.kwargs:
        return None
    for steps, number in (position.args, position.args[::-1]):
        if not (isinstance(steps, fx.Node) and isinstance(number, fx.Node)):
            continue
        if number not in graph.arguments:
            continue
        value = value_of(number)
        is_number = isinstance(value, torch.Tensor) and value.dim() == 0
        counts = (
            target_name(steps) == "arange"
            and len(steps.args) == 1
            and steps.kwargs.keys() <= {"device", "dtype"}
            and same(value_of(steps.args[0]), count)
        )
        whole = not any(value_of(x).dtype.is_floating_point for x in (steps, position))
        if is_number and counts and whole:
            return Counter(graph.arguments[number], _added(graph, number))
    return None


def _added(graph: Graph, number: fx.Node) -> Size | None:
    """Return what a call adds to an argument; ``None`` where it changes it in another way."""
    total: Any = 0
    for node in writers_of(graph.fx).get(number, ()):
        if target_name(node) not in ("add_", "iadd") or node.args[0] is not number or node.kwargs:
            return None
        added = value_of(node.args[1])
        if not isinstance(added, (int, torch.SymInt)):
            return None
        total = total + added
    return graph.sizes.size(total)


def _rows(position: fx.Node) -> int:
    """Return how many rows are written at positions of their own; 0 where all are written at the same."""
    shape = shape_of(position) or ()
    return int(shape[0]) if len(shape) == 2 else 0


def _place(position: fx.Node, positions: dict[fx.Node, fx.Node], write: fx.Node) -> int:
    """Return the place of cache positions among those that are looked at, which ``write`` reads."""
    positions.setdefault(position, write)
    return [*positions].index(position)


def _hides(
    graph: Graph,
    state: State,
    site: AttentionSite,
    masks: dict[fx.Node, tuple[fx.Node, fx.GraphModule]],
) -> fx.GraphModule | bool | None:
    """Return what hides the cache positions behind the tokens of a call; ``masks`` are the parts that are known."""
    attention = site.attention
    if state.is_read_elsewhere:
        return None
    if attention.mask is None and state.life in RINGS:
        return False  # it reads all of the buffer
    if attention.mask is None:
        return True  # `check_mask`: attention is causal, or reads no cache position behind them
    if state.slots is not None and not isinstance(value_of(state.position), torch.Tensor):
        tokens = (shape_of(state.new) or ())[2]
        if same(value_of(state.slots), value_of(state.position) + tokens):
            return True
    mask, reader = attention.mask, attention.output
    for other, (its_reader, part) in masks.items():
        if same_value(other, mask) and not change_between((other, mask), (its_reader, reader)):
            return part
    try:
        part = part_of({mask: reader}, graph.arguments)
    except Refusal:
        return None
    masks[mask] = reader, part
    return part


def _other_writes(
    graph: Graph, cache: fx.Node, positions: dict[fx.Node, fx.Node]
) -> dict[fx.Node, Write]:
    """Plan the look at writes into a quantized cache that belong to no site.

    Raises:
        Refusal: A quantized cache cannot take one of them.
    """
    if value_of(cache).kind == "grown":
        check_growth(cache, graph.output.all_input_nodes)
    owned = {state.write for state, _ in graph.states()}
    writers = writers_of(graph.fx).get(cache, [])
    others = [node for node in writers if node not in owned]
    if others and value_of(cache).kind == "grown":
        raise Refusal(f"a cache that grows is written in place by {target_name(others[0])}")
    if owned.intersection(writers):  # else a view of the dense tensor shows what is written there
        _check_views(graph, cache, writers)
    found: dict[fx.Node, Write] = {}
    name, argument = source_name(cache), graph.arguments[cache]
    for node in others:
        if target_name(node) == "zero_" and node.args[0] is cache:
            nothing = graph.sizes.size(0)
            found[node] = Write(name, argument, None, nothing, nothing, True)
            continue
        if any(node is ring.write for ring in graph.rings.values()):
            if any(
                node is ring.write and ring.position is not None for ring in graph.rings.values()
            ):
                raise Refusal(SLIDES)
            continue  # `_rings` plans the look at it
        if target_name(node) == "copy_" and node.args[0] is cache:
            raise Refusal(OVERWRITTEN)
        if bodies_of(node):
            inside = attends_inside(node)
            raise Refusal(
                in_a_body(node) if inside else f"the body of {target_name(node)} writes it"
            )
        if not is_write(node) or node.args[0] is not cache:
            raise Refusal(f"{target_name(node)} writes something else than whole tokens")
        position, new = read_write(node)
        if isinstance(value_of(position), torch.Tensor):
            needed_by({position: node}, graph.arguments)
            place, rows = _place(position, positions, node), _rows(position)
            evaluated = EVALUATED in node.meta
            found[node] = Write(name, argument, place, is_evaluated=evaluated, rows=rows)
        else:
            first = graph.sizes.size(value_of(position))
            tokens = graph.sizes.size((shape_of(new) or ())[2])
            found[node] = Write(name, argument, None, first, tokens)
    return found


def _check_views(graph: Graph, cache: fx.Node, writers: list[fx.Node]) -> None:
    """Make sure that no view is taken before a write and read after it: it would show what was there before.

    Raises:
        Refusal: One is.
    """
    place = order_of(graph.fx)
    for node in nodes_by_memory(graph.fx).get(cache, ()):
        if node is cache or writes_in_place(node):
            continue
        for write in writers:
            if place[node] < place[write] and any(
                place[user] > place[write] for user in node.users
            ):
                raise Refusal("a view taken before a write is read after it")
