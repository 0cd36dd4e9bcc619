"""Find the caches that can be stored quantized although what attends to them is not understood.

A cache is proved by what becomes of it, not by who reads it: tokens join it or are written into it, it is kept, and it
takes part in an attention, whatever that computes (`readers`). Such a cache is stored quantized, and its readers take
an ordinary tensor of its tokens, made anew in each call: the memory is saved, the time is not.

How much must be proved depends on how the tensor enters the graph::

    grown by cat, or written at cache positions    it takes part in a softmax, or is keys or values of one another
    all of this call's                             it is keys or values of another, around a softmax
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor, fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.ops import BACKENDS
from kvq_compile.kernels.schemes import Role
from kvq_compile.lowering.find.bodies import bodies_that_read, is_of_a_body
from kvq_compile.lowering.find.caches import is_feature_map
from kvq_compile.lowering.find.changes import check_joined
from kvq_compile.lowering.find.checks import DTYPES, check_rows
from kvq_compile.lowering.find.contraction import NOT_BORNE_OUT
from kvq_compile.lowering.find.evaluation import hint_of
from kvq_compile.lowering.find.gradients import records_gradients
from kvq_compile.lowering.find.key_bias import without_bias
from kvq_compile.lowering.find.key_rotation import with_rotation, without_mean
from kvq_compile.lowering.find.layers import place_of
from kvq_compile.lowering.find.movement import as_spelled, cache_inputs
from kvq_compile.lowering.find.readers import Attending, Readers, are_attended_together
from kvq_compile.lowering.find.reasons import A_PART_IS_READ, BY_OPTION, NO_CACHE
from kvq_compile.lowering.find.sites import (
    GROWS,
    HELD,
    KEEPS_NOT,
    check_lengths,
    check_window,
    forgets,
    quantization_of,
    source_line,
)
from kvq_compile.lowering.find.states import find_state
from kvq_compile.lowering.find.trims import suffix_of
from kvq_compile.lowering.find.updates import ALLOCATIONS
from kvq_compile.lowering.find.writes import is_write, read_write
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import (
    is_weight,
    same,
    shape_of,
    target_name,
    value_of,
    writers_of,
)
from kvq_compile.lowering.sites import (
    DENSE,
    Attention,
    Life,
    Quantization,
    Refusal,
    SiteReport,
    State,
)

OWN = (Life.FRESH, Life.RING_FRESH)  # all of this call's tokens
NO_SOFTMAX = "what stands between its keys and its values is no softmax"
PROJECTED = "its keys and values are computed anew from what is kept"
SINGLE_HEADS = (
    "attention takes single heads, or parts of them, of a cache that is kept with all its heads"
)
NO_PRODUCT = "what becomes of its softmax before it meets the values is not understood"


@dataclass(frozen=True)
class _Candidate:
    """What may be a cache, and what attends to it."""

    state: State
    readers: Readers


def find_dense(graph: Graph) -> PassReport:
    """Find the caches behind refused attentions that are caches all the same.

    Before:  sites, and reports on the attentions that are none
    After:   the same, ``graph.dense``
    Because: what a cache saves is the memory between calls, and that takes no knowledge of the attention.

    Leaves alone: quantized caches that grow or are written in place, which later passes keep quantized whatever reads
    them; calibrated methods, whose tables are fitted to the attentions that are sites.
    """
    if graph.by_order or graph.spec.key_tables is not None or records_gradients(graph):
        return PassReport()
    served = {node for state, _ in graph.states() for node in (state.base, state.past)}
    states = [state for state in _states(graph) if not {state.base, state.past} & served]
    attending = Attending(graph.fx) if states else None
    candidates = [
        _Candidate(state, attending.readers(state.whole, state.life not in OWN))
        for state in states
        if attending is not None
    ]
    for candidate in candidates:
        role = _role(candidate, candidates)
        if role is None or is_feature_map(candidate.state.whole):
            continue
        try:
            graph.dense.append((candidate.state, _quantization(graph, candidate, role)))
        except Refusal:
            continue  # as the attention was, for a reason of its own
    return PassReport(tuple(f"{state.base} is kept quantized" for state, _ in graph.dense))


def tell_dense(graph: Graph) -> PassReport:
    """Tell the attentions that were refused but whose caches are stored quantized from those that are left alone.

    Before:  reports on refused attentions
    After:   the same, of which some have another outcome; further ones on what attends without a softmax
    Because: the reader of a report wants to know what it costs that an attention was refused.
    """
    stored = [] if graph.thaw is not None else [*_kept(graph)]
    attending = Attending(graph.fx) if stored else None
    sites = (*graph.sites, *graph.readers)
    outputs = [site.attention.output for site in sites]
    fused = {
        node.name for output in outputs for node in (output, *output.all_input_nodes)
    }  # gated ones too
    served = [site.attention for site in sites]
    fused |= {softmax.name for softmax, found in graph.contractions.items() if found in served}
    for cache, role in stored:
        assert attending is not None
        readers = attending.readers(cache, True)
        names = _names(graph, readers)
        names |= {node.name for node in bodies_that_read(graph.fx, cache)}
        told = names & {*fused, *(report.node for report in graph.reports)}
        if role == "key" and readers.products and not told:
            graph.reports.append(_told(graph, cache, readers))
        for number, report in enumerate(graph.reports):
            if report.node not in names:
                continue
            if report.outcome == "left alone":
                detail = _detail(report.detail, cache, readers)
                report = replace(report, outcome=DENSE, detail=detail, expected=False)
                graph.reports[number] = report
            graph.reasons.setdefault(cache, report.detail)
    return PassReport(tuple(f"{cache} is read dense" for cache in graph.reasons))


def _detail(detail: str, cache: fx.Node, readers: Readers) -> str:
    """Return why a cache is read dense, from why its attention was refused."""
    vague = detail in (NO_CACHE, NOT_BORNE_OUT) or detail.endswith(A_PART_IS_READ)
    if vague and _takes_single_heads(cache, readers):
        return SINGLE_HEADS
    return PROJECTED if detail == NO_CACHE else detail


def _takes_single_heads(cache: fx.Node, readers: Readers) -> bool:
    """Return whether a product takes all tokens of a cache, and fewer elements than it holds."""
    whole = [hint_of(size) for size in shape_of(cache) or ()]
    taken = [shape_of(node) or () for by in readers.products.values() for node in by]
    sizes = [[hint_of(size) for size in shape] for shape in taken]
    return any(max(own) >= whole[2] and prod(own) < prod(whole) for own in sizes if own)


def _states(graph: Graph) -> Iterator[State]:
    """Yield the states of what the call grows, writes or returns, if it is ``[B, H, S, D]`` of tokens."""
    outputs = set(graph.output.all_input_nodes)
    rings = {ring.past: ring for ring in graph.rings.values()}
    for node in dict.fromkeys((*graph.inputs, *graph.output.all_input_nodes)):
        value = value_of(node)
        if not isinstance(value, Tensor) or is_weight(node):
            continue
        if (
            value.dim() != 4
            or isinstance(value, QuantizedKV)
            or any(same(n, 0) for n in value.shape)
        ):
            continue
        try:
            state = _state(graph, rings[node].base if node in rings else node, outputs)
        except Refusal:
            continue
        if state is not None and (state.base is node or node in rings):
            yield state


def _state(graph: Graph, node: fx.Node, outputs: set[fx.Node]) -> State | None:
    if node in graph.rings:
        if graph.rings[node].position is not None:
            return None  # what is read of it is spelled for attention alone
        return find_state(node, outputs, graph.updates, None, graph.rings)
    update = graph.updates.get(node)
    if update is not None:
        past = value_of(update.past)
        life = Life.BUFFER if isinstance(past, QuantizedKV) else Life.BUFFER_PLAIN
        life = life if update.past.op == "placeholder" else Life.ALLOCATED
        return State(life, node, update.new, update.past, node, update.position)
    if node.op != "placeholder" and target_name(node) not in ALLOCATIONS:
        state = find_state(node, outputs, graph.updates)
        return state if state.life in (Life.FRESH, Life.GROWN_PLAIN) else None
    writes = writers_of(graph.fx).get(node, [])
    if not writes or not all(is_write(write) and write.args[0] is node for write in writes):
        return None
    *earlier, write = writes
    if node.op != "placeholder" and earlier:
        return None
    (position, new), _ = read_write(write), [read_write(other) for other in earlier]
    life = Life.BUFFER_PLAIN if node.op == "placeholder" else Life.ALLOCATED
    return State(life, node, new, node, write, position)


def _role(one: _Candidate, candidates: Sequence[_Candidate]) -> Role | None:
    """Return whether a cache holds keys or values; ``None`` where it is not proved to be a cache.

    One that is quantized already stays what it was quantized as: nothing that reads it dense depends on that.
    """
    role = _role_to_readers(one, candidates)
    if role is None or one.state.life not in HELD:
        return role
    held: Role = value_of(one.state.past).page_layout.role
    return held


def _role_to_readers(one: _Candidate, candidates: Sequence[_Candidate]) -> Role | None:
    roles = one.readers.roles
    others = [other for other in candidates if _are_alike(one.state, other.state)]
    is_key = any(are_attended_together(one.readers, other.readers) for other in others)
    is_value = any(are_attended_together(other.readers, one.readers) for other in others)
    if not (is_key or is_value):
        alone = roles if one.state.life not in OWN else ()
        return ("value" if "value" in alone else "key") if alone else None
    if one.state.life in OWN and not roles:
        return None
    return "value" if is_value else "key"


def _are_alike(one: State, other: State) -> bool:
    if one.base is other.base or one.life is not other.life:
        return False
    mine, theirs = shape_of(one.base) or (), shape_of(other.base) or ()
    return same(mine[0], theirs[0]) and same(mine[2], theirs[2])


def _quantization(graph: Graph, found: _Candidate, role: Role) -> Quantization:
    """Return how a cache is stored.

    Raises:
        Refusal: It cannot be.
    """
    state = found.state
    check_joined(state)
    value, names = value_of(state.base), _names(graph, found.readers)
    if value.dtype not in DTYPES or value.device.type.upper() not in BACKENDS:
        raise Refusal(f"dtype {value.dtype} on {value.device.type} is not supported")
    reports = [report for report in graph.reports if report.node in names]
    if any(report.detail == BY_OPTION for report in reports):
        raise Refusal(BY_OPTION)
    if reports:
        layer = reports[0].layer
    else:
        layer = place_of(next(iter(found.readers.products)), state.base, len(graph.reports)).layer
    spec = graph.spec.for_layer(layer)
    if spec is None:
        raise Refusal(BY_OPTION)
    if role == "key":
        spec = without_bias(spec, state, graph.inputs)
        spec = with_rotation(spec, state, graph.inputs, graph.rotations)
        spec = without_mean(spec) if forgets(state) else spec
    quantization = quantization_of(role, spec, state)
    if quantization.layout.keep_exact and state.life not in GROWS:
        raise Refusal(KEEPS_NOT)
    check_window(state, quantization.layout)
    check_rows(state, quantization.layout)
    check_lengths(graph, state)
    return quantization


def _names(graph: Graph, readers: Readers) -> set[str]:
    """Return the names by which reports may call the attentions of a cache: their softmax or their result."""
    found = (graph.contractions.get(softmax) for softmax in readers.attentions)
    laid = (each.output for each in found if isinstance(each, Attention))
    return {node.name for node in (*readers.attentions, *readers.products, *readers.behind, *laid)}


def _kept(graph: Graph) -> Iterator[tuple[fx.Node, Role]]:
    """Yield the caches that leave the call quantized, and what they hold."""
    for state, quantization in graph.states():
        if state.life not in HELD:
            yield state.whole, quantization.layout.role
    results = (node for node in graph.output.all_input_nodes if not is_of_a_body(node))
    made = [(node, cache_inputs(node)) for node in results]
    anew = {ring.past: ring.base for ring in graph.rings.values() if ring.is_filled_anew}
    for node in graph.inputs:
        cache = value_of(node)
        if not isinstance(cache, QuantizedKV):
            continue
        grown = [result for result, inputs in made if result is not node and node in inputs]
        if cache.kind != "grown" or all(
            as_spelled(suffix_of(result) or result) for result in grown
        ):
            yield anew.get(node, node), cache.page_layout.role


def _told(graph: Graph, cache: fx.Node, readers: Readers) -> SiteReport:
    reason = NO_PRODUCT if readers.attentions else NO_SOFTMAX
    reader = next(iter({**readers.behind, **readers.products}))  # what both lead to, if possible
    place = place_of(reader, cache, len(graph.reports))
    about = place.layer, reader.name, source_line(reader), DENSE, reason
    return SiteReport(*about, where=place.where)
