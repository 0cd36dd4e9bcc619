"""Join attentions to the cache tensors they read, or give the reason why not."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.schemes import Channelwise, Role
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import NO_TABLES
from kvq_compile.lowering.find.attention import find_attentions
from kvq_compile.lowering.find.bodies import attentions_in_bodies
from kvq_compile.lowering.find.changes import check_operands
from kvq_compile.lowering.find.checks import (
    UNMASKED,
    check_mask,
    check_order,
    check_pair,
    check_rows,
    check_tensors,
    end_without_mask,
)
from kvq_compile.lowering.find.dependence import dependent
from kvq_compile.lowering.find.key_bias import without_bias
from kvq_compile.lowering.find.key_rotation import with_rotation, without_mean
from kvq_compile.lowering.find.latents import find_expansion
from kvq_compile.lowering.find.layers import Place, places_of
from kvq_compile.lowering.find.reasons import BY_OPTION, SHORT_WINDOW, is_expected
from kvq_compile.lowering.find.states import READ_ELSEWHERE, find_state, is_dead
from kvq_compile.lowering.find.trial import data_of
from kvq_compile.lowering.find.trims import window_of
from kvq_compile.lowering.find.writes import other_write, writes_of
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import order_of, root_of, same, shape_of, value_of, writes_in_place
from kvq_compile.lowering.sites import (
    RINGS,
    Attention,
    AttentionSite,
    Contradiction,
    Life,
    Quantization,
    Refusal,
    SiteReport,
    State,
    unexpected,
)

KEEPS_NOT = "keep_exact needs a cache that grows: the host does not know which pages of a cache of fixed size fill up"
NO_POSITIONS = "keys are coded before RoPE, and a buffer that keeps the last tokens does not tell their positions"
NOT_OF_LATENTS = "its keys are made of latents, and bits depend on attention or on a calibration"
GROWS = (Life.FRESH, Life.GROWN_PLAIN, Life.GROWN)
# Whose caches further attentions may read.
SHARED = (Life.FRESH, Life.GROWN_PLAIN, Life.GROWN, Life.BUFFER_PLAIN, Life.BUFFER)
HELD = (Life.GROWN, Life.BUFFER, Life.RING)
BY_TOKENS = (
    Life.GROWN,
    *RINGS,
)  # what a call needs to know of their lengths is how many tokens it brings


def find_sites(graph: Graph) -> PassReport:
    """Find the attentions whose caches can be quantized, and report the reason for each other one.

    Before:  a graph
    After:   the same graph, ``graph.sites`` and ``graph.reports``
    Because: rewriting needs certainty; anything else runs as captured, and the user reads the reason.

    Raises:
        Contradiction: A cache is quantized to something else than the call asks for.
    """
    outputs = set(graph.output.all_input_nodes)
    place_of_node = order_of(graph.fx)
    attentions = [
        *find_attentions(graph.fx, graph.contractions),
        *attentions_in_bodies(graph.fx, outputs),
    ]
    attentions.sort(key=lambda found: place_of_node[_node_of(found)])
    for order, (found, place) in enumerate(zip(attentions, places_of(attentions), strict=True)):
        node = _node_of(found)
        graph.attentions[node.name] = found if isinstance(found, Attention) else node
        try:
            if not isinstance(found, Attention):
                raise found[1]
            site = _site(order, place, found, outputs, graph)
            is_reader = _check_graph(site, graph)
        except Contradiction:
            raise
        except Exception as error:
            reason = error if isinstance(error, Refusal) else unexpected(error)
            graph.reports.append(left_alone(place.layer, place.where, node, str(reason)))
        else:
            (graph.readers if is_reader else graph.sites).append(site)
    find_other_readers(graph)
    return PassReport(tuple(f"{site.attention.output} is a site" for site in graph.sites))


def _node_of(found: Attention | tuple[fx.Node, Refusal]) -> fx.Node:
    return found.output if isinstance(found, Attention) else found[0]


def left_alone(layer: int, where: str, node: fx.Node, reason: str) -> SiteReport:
    """Return the report of a site that stays as it is."""
    about = source_line(node), "left alone", reason, is_expected(reason)
    return SiteReport(layer, node.name, *about, where=where)


def _site(
    order: int,
    place: Place,
    attention: Attention,
    outputs: set[fx.Node],
    graph: Graph,
) -> AttentionSite:
    known, expansion = (outputs, graph.updates, attention.output, graph.rings), None
    try:
        key, value = find_state(attention.key, *known), find_state(attention.value, *known)
    except Refusal as reason:
        key, value, expansion = find_expansion(graph, attention, outputs, reason)
    layer_spec = graph.spec.for_layer(order if graph.by_order else place.layer)
    if layer_spec is None:
        raise Refusal(BY_OPTION)
    calibrated = graph.by_order or (layer_spec.key_tables or layer_spec.value_tables) is not None
    if expansion is not None and (calibrated or layer_spec.key.attentive):
        raise Refusal(NOT_OF_LATENTS)
    check_pair(key, value)
    check_tensors(attention, key, value)
    check_mask(attention, key)
    if not _is_held_plain(key, layer_spec):
        layer_spec = without_bias(layer_spec, key, graph.inputs)
        layer_spec = with_rotation(layer_spec, key, graph.inputs, graph.rotations)
    if forgets(key):
        layer_spec = without_mean(layer_spec)
    heads = int(value_of(attention.query).shape[1]) if expansion is None else 0
    widest = max(int(value_of(state.base).shape[3]) for state in (key, value))
    quantizations = (
        quantization_of("key", layer_spec, key, heads, widest),
        quantization_of("value", layer_spec, value, heads, widest),
    )
    for state, quantization in zip((key, value), quantizations, strict=True):
        if quantization.layout.keep_exact and state.life not in GROWS:
            raise Refusal(KEEPS_NOT)
        check_window(state, quantization.layout)
        check_rows(state, quantization.layout)
        if attention.sink_logits is not None and quantization.layout.attentive:
            raise Refusal("bits depend on attention, whose softmax has logits of sinks")
        if state.last is not None and state.life not in RINGS and quantization.layout.attentive:
            raise Refusal("bits depend on attention, which reads only the last tokens of the cache")
    about = place.layer, order, place.where, attention, key, value
    return AttentionSite(*about, *quantizations, expansion)


def forgets(key: State) -> bool:
    """Return whether keys are held by a dynamic cache that forgets its first tokens: a ring turns their mean."""
    return key.kept is not None and key.life is not Life.RING_FRESH


def check_window(state: State, layout: Layout) -> None:
    """Make sure that some tokens of a sliding window would be packed.

    Raises:
        Refusal: None would: the exact region has room for all, or a cache in host memory cannot forget any.
    """
    if state.life in RINGS:
        _check_ring(state, layout)
    if state.kept is None:
        return
    window = window_of(state.kept)
    if state.life is not Life.GROWN and window is not None and window <= layout.ring:
        raise Refusal(
            f"{SHORT_WINDOW}, {window} of {layout.ring} tokens: nothing would be packed, and it stays as it is"
        )
    if layout.keep_exact:
        raise Refusal("keep_exact needs a cache that keeps all its tokens, got a sliding window")


def _check_ring(state: State, layout: Layout) -> None:
    """Make sure that some tokens of a ring would be packed, and that it knows what they are coded relative to.

    Raises:
        Refusal: They would not, or the positions of its tokens are not known.
    """
    if state.life is Life.RING:
        return
    slots = (shape_of(state.past) or ())[2]
    if slots <= layout.ring:
        raise Refusal(
            f"{SHORT_WINDOW}, {slots} of {layout.ring} tokens: nothing would be packed, and it stays as it is"
        )
    if layout.rotary:
        raise Refusal(NO_POSITIONS)


def _is_held_plain(key: State, spec: CacheSpec) -> bool:
    """Return whether the keys are held as ``spec`` codes them, by a cache that was quantized outside a graph."""
    if key.life not in HELD:
        return False
    held: Layout = value_of(key.past).page_layout
    return not held.has_tables


def quantization_of(
    role: Role, spec: CacheSpec, state: State, query_heads: int = 0, widest: int | None = None
) -> Quantization:
    """Return how keys or values are quantized; ``query_heads`` read them, as far as that is known, and the larger of
    keys and values has ``widest`` channels.

    Raises:
        Refusal: Their head dimension cannot be packed so, or keys are held as values are.
        Contradiction: They were calibrated for other shapes, or are held in another way.
    """
    tables = spec.tables(role)
    _, heads, _, head_dim = value_of(state.base).shape
    if tables is not None and (tables.heads, tables.head_dim) != (int(heads), int(head_dim)):
        raise Contradiction(
            f"calibration must be of this model, whose {role}s have {heads} heads of {head_dim} channels, "
            f"got {tables.heads} heads of {tables.head_dim}"
        )
    try:
        layout = spec.layout(role, int(head_dim), query_heads // int(heads), widest)
    except ValueError as error:
        raise Refusal(str(error)) from None
    if state.life in HELD:
        layout = _as_held(value_of(state.past).page_layout, layout)
    return Quantization(layout, tables if layout.has_tables else None)


def _as_held(held: Layout, wanted: Layout) -> Layout:
    """Return the layout of a cache that is held.

    One that was quantized outside a graph holds no queries, and the graph that made another may have shown how keys are
    rotated where this one does not, or the other way round.

    Raises:
        Refusal: It is laid out for keys, and these are values, or the other way round.
        Contradiction: It is not quantized as this model is compiled.
    """
    if held.role != wanted.role:
        raise Refusal(
            f"it reads {wanted.role}s from a cache that is quantized as {held.role}s are: "
            "what quantized it could not tell, or reads it in another way"
        )
    alike = wanted, replace(wanted, queries=0, shared_by=0)
    if held not in alike and _untold(held) not in [_untold(layout) for layout in alike]:
        told = _in_words(wanted), _in_words(held)
        if told[0] == told[1]:
            told = str(wanted.scheme), str(held.scheme)
        raise Contradiction(
            f"the cache must be quantized as this model is compiled, {told[0]}, got {told[1]}; start with an "
            "empty cache, or compile with the options that made this one"
        )
    return held


def _untold(layout: Layout) -> Layout:
    """Return a layout without what the graph told of the rotation of its keys; others as they are."""
    if not isinstance(layout.scheme, Channelwise):
        return layout
    return replace(layout, scheme=replace(layout.scheme, pairs="halves", tables=NO_TABLES))


def _in_words(layout: Layout) -> str:
    return (
        f"{layout.about} {layout.role}s with sinks={layout.sinks}, window={layout.window} and "
        f"page_size={layout.page_size}"
    )


def _check_graph(site: AttentionSite, graph: Graph) -> bool:
    """Make sure that the rest of the graph lets the site be rewritten; say whether its caches are those of another."""
    states = (site.key, site.value)
    taken = {
        (state.base, state.write): other for other in graph.sites for state, _ in other.states()
    }
    owners = [taken.get((state.base, state.write)) for state in states]
    is_reader = owners != [None, None]
    if is_reader and not (owners[0] is not None and _may_share(site, owners[0])):
        raise Refusal("another attention has taken over the same cache")
    if is_reader and owners[0] is not None:
        ends = [end_without_mask(each.attention, each.key) for each in (site, owners[0])]
        if ends[0] is not None and not same(
            *map(value_of, ends)
        ):  # else that of the owner is looked at
            raise Refusal(UNMASKED)
    check_order(site.attention, states)
    check_operands(site.attention, states, site.expansion is not None)
    for state in states:
        check_lengths(graph, state)
    return is_reader


def _may_share(site: AttentionSite, owner: AttentionSite) -> bool:
    """Return whether an attention can read the caches that another one is the first to read."""
    heads = [(shape_of(each.attention.query) or ())[1] for each in (site, owner)]
    attentive = any(quantization.layout.attentive for _, quantization in owner.states())
    alike = same(*heads) and site.key.life in SHARED and not attentive
    return alike and site.shares(owner) and site.key.kept is owner.key.kept


def find_other_readers(graph: Graph) -> None:
    """Note which buffers something else than attentions reads as well: it takes an ordinary tensor of the tokens.

    Leaves alone the attentions over latents, and over a buffer that is returned updated: what else reads that would
    miss the call's tokens, which are written behind the attentions.
    """
    sites = [*graph.sites, *graph.readers]
    for site in sites:
        mine = [site, *(other for other in sites if other is not site and other.shares(site))]
        ends = {each.attention.output for each in mine}
        states: dict[Role, State] = {"key": site.key, "value": site.value}
        for role, state in states.items():
            way = {node for each in mine for node in _way(each, getattr(each, role))}
            if _leads_elsewhere(state.readers, way, ends):
                states[role] = replace(state, is_read_elsewhere=True)
        if states["key"] is site.key and states["value"] is site.value:
            continue
        if site.expansion is None and all(
            _may_be_read_elsewhere(graph, state) for state in states.values()
        ):
            changed = replace(site, key=states["key"], value=states["value"])
            graph.sites = [changed if each is site else each for each in graph.sites]
            graph.readers = [changed if each is site else each for each in graph.readers]
        else:
            pasts = (state.past for state in states.values() if state.past is not None)
            written = next(filter(None, map(other_write, pasts)), None)
            _refuse(graph, site, written or READ_ELSEWHERE)


def _may_be_read_elsewhere(graph: Graph, state: State) -> bool:
    """Return whether what else reads a cache may have a copy of it: nothing but tokens is written there."""
    slotted = (Life.ALLOCATED, Life.BUFFER_PLAIN, Life.BUFFER)
    if state.life not in slotted or state.is_update:
        return False
    tokens = writes_of(state.past) if state.past is not None else []
    others = (node for node in graph.fx.nodes if writes_in_place(node) and node not in tokens)
    written = (node.kwargs.get("out") or next(iter(node.args), None) for node in others)
    return not any(root_of(x) is state.past for x in written)


def _way(site: AttentionSite, state: State) -> set[fx.Node]:
    """Return what lies between a cache and an attention of it, and leads to nothing but its keys and values."""
    past, found = state.base if state.is_update else state.past, site.attention
    if past is None:
        return set()
    way = {found.output, *dependent(past, found.output)}
    for other in (found.query, found.mask, found.sink_logits, site.key.new, site.value.new):
        if isinstance(other, fx.Node):
            way -= {other, *dependent(past, other)}
    return way


def _leads_elsewhere(
    readers: Iterable[fx.Node], way: Collection[fx.Node], ends: Collection[fx.Node]
) -> bool:
    """Return whether one of the readers, or what is made of it before the ``ends``, is not on the way to these."""
    stack, seen = [*readers], set(ends)
    while stack:
        node = stack.pop()
        if node not in way:
            return True
        if node not in seen:
            seen.add(node)
            stack += [user for user in node.users if node in data_of(user) and not is_dead(user)]
    return False


def _refuse(graph: Graph, site: AttentionSite, reason: str) -> None:
    graph.sites = [each for each in graph.sites if each is not site]
    graph.readers = [each for each in graph.readers if each is not site]
    graph.reports.append(left_alone(site.layer, site.where, site.attention.output, reason))


def drop_readers(graph: Graph) -> PassReport:
    """Leave alone what reads the caches of an attention that is left alone.

    Before:  sites and further readers of their caches
    After:   the same, without readers of other caches
    Because: checks that follow on `find_sites` refuse some sites.
    """
    lost = [x for x in graph.readers if not any(x.shares(site) for site in graph.sites)]
    for reader in lost:
        _refuse(graph, reader, "the attention that is the first to read its caches is left alone")
    return PassReport(tuple(f"{reader.attention.output} is left alone" for reader in lost))


def check_lengths(graph: Graph, state: State) -> None:
    """Make sure that the arguments of a call tell the lengths of a cache.

    Raises:
        Refusal: They do not.
    """
    for length in _lengths(state):
        graph.sizes.size(length)


def _lengths(state: State) -> list[Any]:
    """Return the sizes that the callable around the graph has to know."""
    tokens, slots = (shape_of(node)[2] for node in (state.new, state.base))  # type: ignore[index]
    first = value_of(state.position)
    is_number = first is not None and not isinstance(first, torch.Tensor)
    ends = [first + tokens] if state.life is Life.BUFFER_PLAIN and is_number else []
    kept = [] if state.kept is None else [(shape_of(state.kept) or ())[2]]
    held = [first] if state.life in RINGS and is_number else []
    return [*kept, *([tokens] if state.life in BY_TOKENS else [slots]), *ends, *held]


def source_line(node: fx.Node) -> str:
    """Return ``file:line`` of the innermost line of model code behind a node.

    What transformers calls for its models is no model code, unless there is nothing else.
    """
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not lines:
        return ""
    own = [line for line in lines if "/transformers/integrations/" not in line.replace("\\", "/")]
    file, line = (own or lines)[-1].split(", ")[:2]
    return f"{file.removeprefix('File ').strip(chr(34))}:{line.removeprefix('line ')}"
