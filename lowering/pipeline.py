"""Run the passes in order over a copy of a captured graph."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.higher_order import register
from kvq_compile.kernels.cache.some_rows import counts_rows
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.lowering import find, logs
from kvq_compile.lowering.find.arrangements import is_packed, kept_and_read, propose
from kvq_compile.lowering.find.branches import refuse_branches
from kvq_compile.lowering.find.caches import find_states
from kvq_compile.lowering.find.dense import find_dense, tell_dense
from kvq_compile.lowering.find.gradients import TRANSFORMED, is_transformed, refuse_gradients
from kvq_compile.lowering.find.reasons import CHANGES_DTYPE, NO_CACHE, NOT_UNDERSTOOD
from kvq_compile.lowering.find.row_ranges import OTHER_AXIS, UPDATED_ROWS, row_ranges, why_not_lent
from kvq_compile.lowering.find.settled import settle_sizes
from kvq_compile.lowering.find.sites import drop_readers, find_sites, left_alone, source_line
from kvq_compile.lowering.find.slots import plan_slot_checks
from kvq_compile.lowering.flows import tell_captured, tell_rewritten
from kvq_compile.lowering.graph import Graph, Pass
from kvq_compile.lowering.nodes import source_name, writers_of
from kvq_compile.lowering.outputs import Plain
from kvq_compile.lowering.rewrite.add_tables import add_tables
from kvq_compile.lowering.rewrite.arrange_caches import arrange_caches
from kvq_compile.lowering.rewrite.attend_to_new_tokens import attend_to_new_tokens
from kvq_compile.lowering.rewrite.cast_operands import cast_operands
from kvq_compile.lowering.rewrite.dequantize_reads import dequantize_reads
from kvq_compile.lowering.rewrite.drop_idle_casts import cast_caches, drop_idle_casts
from kvq_compile.lowering.rewrite.drop_orphans import drop_orphans
from kvq_compile.lowering.rewrite.extend_refused import extend_refused
from kvq_compile.lowering.rewrite.fix_lengths import fix_lengths
from kvq_compile.lowering.rewrite.fuse_attention import fuse_attention
from kvq_compile.lowering.rewrite.gather_rows import gather_rows
from kvq_compile.lowering.rewrite.hold_slots import hold_slots
from kvq_compile.lowering.rewrite.name_updates import name_updates
from kvq_compile.lowering.rewrite.narrow_rows import narrow_rows
from kvq_compile.lowering.rewrite.plan_conversions import plan_conversions
from kvq_compile.lowering.rewrite.promote_caches import promote_caches
from kvq_compile.lowering.rewrite.quantize_early import quantize_early
from kvq_compile.lowering.rewrite.quantize_outputs import quantize_outputs
from kvq_compile.lowering.rewrite.read_contractions import read_contractions
from kvq_compile.lowering.rewrite.scale_queries import scale_queries
from kvq_compile.lowering.rewrite.spell_attributes import spell_attributes
from kvq_compile.lowering.rewrite.spell_growth import spell_growth
from kvq_compile.lowering.rewrite.spell_heads import spell_heads
from kvq_compile.lowering.rewrite.spell_reads import spell_reads
from kvq_compile.lowering.rewrite.spell_rings import spell_rings
from kvq_compile.lowering.rewrite.spell_sizes import spell_sizes
from kvq_compile.lowering.rewrite.spell_writes import spell_writes
from kvq_compile.lowering.rewrite.store_dense import store_dense
from kvq_compile.lowering.rewrite.unchain_writes import unchain_writes
from kvq_compile.lowering.rewrite.unwrap_caches import unwrap_caches
from kvq_compile.lowering.rewrite.weigh_tokens import weigh_fresh_tokens
from kvq_compile.lowering.runtime import Lowered
from kvq_compile.lowering.sites import (
    DENSE,
    AttentionSite,
    Contradiction,
    Life,
    LostWrite,
    Refusal,
    SiteReport,
    unexpected,
)
from kvq_compile.lowering.unchanged import remembering, unchanged

register()  # before Dynamo traces a call whose caches are quantized

ANALYSIS: tuple[Pass, ...] = (
    spell_writes,  # first: the other passes know a write by one spelling,
    unchain_writes,  # the finders a cache by one node
    spell_growth,  # and its growth by one spelling
    spell_rings,
    hold_slots,
    scale_queries,
    name_updates,
    spell_reads,  # what reads a cache that is known by now
    spell_heads,
    read_contractions,
    find_sites,
    refuse_gradients,
    refuse_branches,
    drop_readers,
    find_dense,
    plan_slot_checks,
    tell_dense,
    find_states,
)
REWRITING: tuple[Pass, ...] = (
    add_tables,
    unwrap_caches,  # before the rewriting, which speaks of parts
    gather_rows,
    promote_caches,
    cast_operands,
    plan_conversions,
    attend_to_new_tokens,
    weigh_fresh_tokens,
    fuse_attention,
    extend_refused,
    store_dense,
    quantize_outputs,  # after it: cat nodes have lost a reader
    drop_orphans,
    dequantize_reads,  # what is left are reads that no pass claimed
    quantize_early,
)
RECORDING: tuple[Pass, ...] = (fix_lengths,)  # where steps are to be recorded
PASSES = ANALYSIS + REWRITING + RECORDING


def lower(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    spec: CacheSpec,
    by_order: bool = False,
    record: bool = False,
    hindrance: str | None = None,
) -> Lowered:
    """Rewrite what can be rewritten in a copy of a captured graph; report on every attention.

    Args:
        gm: The graph that Dynamo captured; it is left untouched, and returned where there is nothing to rewrite.
        example_inputs: The arguments of the call that is being compiled.
        spec: What caches are quantized to.
        by_order: Whether ``spec`` numbers layers in the order in which the graph runs its attentions, as
            calibrations do, and not as the model does.
        record: Whether steps are to be recorded, so that nothing but memory may differ from one to the next.
        hindrance: Why those that could be are not, if so.

    Raises:
        Contradiction: A cache is quantized to something else than the call asks for.
        LostWrite: A write cannot be expressed on a quantized cache.
    """
    with torch.random.fork_rng(devices=[]), remembering():
        # What is evaluated on random numbers is the same in every process.
        torch.default_generator.manual_seed(0)
        return _lower_rows_or_all(gm, example_inputs, spec, by_order, record, hindrance)


def _lower_rows_or_all(gm: fx.GraphModule, example_inputs: Sequence[Any], *about: Any) -> Lowered:
    """Lower a graph on the rows of its caches that it takes, where these are made for more; else on all of them."""
    settle_sizes(gm.graph)
    gm = spell_sizes(spell_attributes(drop_idle_casts(gm)))
    if cast := cast_caches(gm.graph):
        reason = f"{CHANGES_DTYPE}: {', '.join(cast)}"
        reports = [SiteReport(0, "", "", DENSE, reason)]
        return Lowered.as_captured(gm, reports, example_inputs)
    if is_transformed(gm.graph):
        return _as_captured(gm, example_inputs)
    try:
        known = row_ranges(gm.graph)
    except Exception as error:
        return _after_fault(gm, example_inputs, error)
    place_of = {node: place for place, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    told: list[Lowered] = []
    while known:
        form = narrow_rows(gm, known)
        lowered = _lower_in_either_way(form.module, form.examples(example_inputs), *about)
        reasons = {node: _why_not_rows(lowered, place_of[node]) for node in known}
        served = {
            node for node in known if lowered.serves(place_of[node]) and reasons[node] is None
        }
        if served == known.keys():
            alike = all(counts_rows(example_inputs[place]) for place in form.rows)
            return replace(lowered, rows=form, changes_memory=lowered.changes_memory or not alike)
        told.append(_left_alone(lowered, next(filter(None, reasons.values()), None)))
        known = {node: rows for node, rows in known.items() if node in served}
    lowered = _lower_in_either_way(gm, example_inputs, *about)
    if not told or lowered.rewritten or lowered.conversions or lowered.thaw is not None:
        return lowered
    return replace(lowered, reports=told[0].reports, states=told[0].states)


def _as_captured(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Lowered:
    """Return a captured graph with transforms, which runs on packed caches as it does outside of compiled code.

    Those that it writes become ordinary tensors: what is packed has no derivatives, and is none of several results.
    """
    packed = [isinstance(x, (QuantizedKV, ArrangedKV)) for x in example_inputs]
    takes, written = gm.graph.find_nodes(op="placeholder"), writers_of(gm.graph)
    places = frozenset(at for at, node in enumerate(takes) if packed[at] and node in written)
    outcome = DENSE if any(packed) and not places else "left alone"
    told = [SiteReport(0, "", "", outcome, TRANSFORMED)]
    if places:
        return Lowered.thawed(gm, told, TRANSFORMED, places, None)
    return Lowered.as_captured(gm, told if any(packed) or _untold(gm.graph) else [], example_inputs)


def _why_not_rows(lowered: Lowered, place: int) -> str | None:
    """Return why an argument that stands for some rows of a cache cannot be quantized as that."""
    how = None if lowered.arranged is None else lowered.arranged.inputs[place]
    if how is not None and how.groups[0] != "B":
        return OTHER_AXIS
    if lowered.updates(place):
        return UPDATED_ROWS
    about = ((x.quantization.layout, x.kind) for x in lowered.converted(place))
    return next(filter(None, (why_not_lent(*of) for of in about)), None)


def _left_alone(lowered: Lowered, reason: str | None) -> Lowered:
    """Return what is told of a graph where rows of caches cannot be taken for ``reason``, if there is one."""
    if reason is None:
        return lowered
    reports = [replace(x, outcome="left alone", detail=reason) for x in lowered.reports]
    states = tuple(replace(x, outcome="left alone", detail=reason) for x in lowered.states)
    return replace(lowered, reports=reports, states=states)


def _lower_in_either_way(gm: fx.GraphModule, example_inputs: Sequence[Any], *about: Any) -> Lowered:
    """Lower a graph as it is; with its caches arranged, where that does not serve all of it."""
    if any(isinstance(x, ArrangedKV) for x in example_inputs):
        return _lower_arranged(gm, example_inputs, *about)
    lowered = _lower_as_laid_out(gm, example_inputs, *about)
    outcomes = {report.outcome for report in lowered.reports}
    outcomes |= {report.outcome for report in lowered.states}
    if outcomes and outcomes <= {"rewritten", "quantized"}:
        return lowered
    arranged = _lower_arranged(gm, example_inputs, *about)
    if arranged.arranged is not None:
        return arranged
    told = lowered.reports if outcomes else arranged.reports
    if lowered.states or not all(report.detail == NO_CACHE for report in told):
        return replace(lowered, reports=told)
    return replace(lowered, reports=[*told, *_untold(gm.graph)])


def _untold(graph: fx.Graph) -> list[SiteReport]:
    """Return a report on caches of a graph none of whose attentions was found to read one."""
    try:
        caches = kept_and_read(graph)
    except Exception as error:
        return [SiteReport(0, "", "", "left alone", str(unexpected(error)))]
    names = sorted({source_name(x) if x.op == "placeholder" else "a result" for x in caches})
    reason = f"{NOT_UNDERSTOOD}: {', '.join(names)}"
    return [SiteReport(0, "", "", "left alone", reason)] if names else []


def _lower_arranged(gm: fx.GraphModule, example_inputs: Sequence[Any], *about: Any) -> Lowered:
    """Lower a graph some of whose caches are not laid out as ``[B, H, S, D]``; as captured if none is served."""
    proposed, packed = propose(gm.graph), is_packed(gm.graph)
    known = proposed
    rejoins, told = False, []
    while known:
        try:
            form = arrange_caches(gm, known, rejoins)
        except Refusal:
            if not rejoins:
                rejoins = True
                continue
            several = {node for node, how in known.items() if how.sizes and node not in packed}
            known = {node: how for node, how in known.items() if node not in several}
            if not several:
                break
            continue
        except Exception as error:
            return _after_fault(gm, example_inputs, error)
        lowered = _lower_as_laid_out(form.module, form.take(example_inputs), *about)
        told = [report for report in lowered.reports if report.outcome == "left alone"]
        if not lowered.compiles:
            return Lowered.as_captured(gm, lowered.reports, example_inputs)
        if lowered.thaw is not None:  # all of them: the captured graph writes into views
            held = (at for taken, _ in form.places.values() for at in taken)
            lowered = replace(lowered, thaws=lowered.thaws.union(held))
        served = form.served(*_quantized(lowered)) | packed
        if not known.keys() <= served:
            known = {node: how for node, how in known.items() if node in served}
        elif packed or any(_quantized(lowered)):
            untold = not lowered.reports and not proposed.keys() <= known.keys()
            reports = _untold(gm.graph) if untold else lowered.reports
            return replace(lowered, arranged=form, reports=reports)
        else:
            break
    return Lowered.as_captured(gm, told, example_inputs)


def _after_fault(gm: fx.GraphModule, example_inputs: Sequence[Any], error: Exception) -> Lowered:
    """Return a captured graph, run on ordinary tensors: a fault of ours costs memory, and no answer."""
    reason = str(error if isinstance(error, Refusal) else unexpected(error))
    reports = [SiteReport(0, "", "", "left alone", reason)]
    packed = [isinstance(x, (QuantizedKV, ArrangedKV)) for x in example_inputs]
    if not any(packed):
        return Lowered.as_captured(gm, reports, example_inputs)
    places = frozenset(at for at, thaws in enumerate(packed) if thaws)
    return Lowered.thawed(gm, reports, reason, places, None)


def _quantized(lowered: Lowered) -> tuple[set[int], set[int]]:
    """Return the places of the arguments that are caches, or will be, and of the results that are."""
    converted = {c.argument for c in lowered.conversions if c.output is None}
    results = {at for at, plan in enumerate(lowered.outputs) if not isinstance(plan, Plain)}
    results |= {c.output for c in lowered.conversions if c.output is not None}
    return {*lowered.unwrapped, *converted}, results


def _lower_as_laid_out(
    gm: fx.GraphModule, example_inputs: Sequence[Any], spec: CacheSpec, by_order: bool, record: bool,
    hindrance: str | None,
) -> Lowered:  # fmt: skip
    """Lower a graph whose caches are ``[B, H, S, D]``."""
    try:
        graph = Graph.copy_of(gm, spec, example_inputs, by_order)
        graph.hindrance = hindrance
        return replace(_lower(graph, gm, record), states=tuple(graph.state_reports))
    except (Contradiction, LostWrite):
        raise
    except Exception as error:
        return _after_fault(gm, example_inputs, error)


def _lower(graph: Graph, gm: fx.GraphModule, record: bool) -> Lowered:
    run(ANALYSIS, graph)
    if not graph.states() and not any(isinstance(x, QuantizedKV) for x in graph.inputs.values()):
        tell_captured(graph)
        return Lowered.as_captured(gm, graph.reports, ())
    if graph.thaw is not None:
        refused = [
            left_alone(site.layer, site.where, site.attention.output, graph.thaw)
            for site in (*graph.sites, *graph.readers)
        ]
        graph.reports += refused
        tell_captured(graph)
        places = frozenset(graph.arguments[cache] for cache in graph.thawed)
        return Lowered.thawed(gm, graph.reports, graph.thaw, places, graph.check)
    graph.reports += [_rewritten(site) for site in (*graph.sites, *graph.readers)]
    graph.reports.sort(key=lambda report: report.layer)
    anchors = tell_captured(graph)
    updated = {
        graph.arguments[state.past]: graph.results.index(state.base)
        for state, _ in graph.states()
        if state.is_update and state.past is not None and state.past in graph.arguments
    }
    before = logs.lines(graph.fx) if logs.graphs.isEnabledFor(logging.DEBUG) else []
    run(REWRITING, graph)
    run(RECORDING if record else (), graph)
    tell_rewritten(graph, anchors)
    graph.module.recompile()
    logs.tell(logs.graphs, (logs.diff(before, logs.lines(graph.fx)) for _ in range(1)))
    logs.artifact("rewritten_graph", lambda: "\n".join(logs.lines(graph.fx)))
    arguments = graph.arguments
    unwrapped = {
        arguments[node]: cache.owns_length
        for node, cache in graph.caches.items()
        if node in arguments
    }
    return Lowered(
        module=graph.module,
        reports=graph.reports,
        outputs=graph.plans,
        returned=graph.returned,
        conversions=graph.conversions,
        pairs=_pairs(graph),
        unwrapped=unwrapped,
        tables=list(graph.calibration.tensors.values()),
        captured=gm,
        check=graph.check,
        updated=updated,
        lengths=graph.lengths,
        unrecorded=graph.unrecorded,
        changes_memory=graph.changes_memory,
        by_row=tuple(arguments[node] for node in graph.inputs if node in graph.by_row),
    )


def run(passes: Sequence[Pass], graph: Graph) -> None:
    """Run passes in order; check the graph, tell what changed and how long it took after each."""
    for pass_ in passes:
        start = time.perf_counter()
        looks = pass_.__module__.startswith(find.__name__)
        with unchanged(graph.fx) if looks else nullcontext():
            report = pass_(graph)
        seconds = time.perf_counter() - start
        if not looks:
            graph.fx.lint()
        logs.tell(logs.passes, (f"{pass_.__name__}: {change}" for change in report.changes))
        logs.tell(logs.timing, [f"{pass_.__name__}: {1e3 * seconds:.2f} ms"])


def _pairs(graph: Graph) -> list[tuple[int, int]]:
    arguments = graph.arguments
    grown = [
        (site.key.cache, site.value.cache) for site in graph.sites if site.key.life is Life.GROWN
    ]
    return [
        (arguments[key], arguments[value])
        for key, value in grown
        if key is not None and value is not None
    ]


def _rewritten(site: AttentionSite) -> SiteReport:
    output, key = site.attention.output, site.key
    how = {
        Life.FRESH: "attends exactly to its own tokens, returns them quantized",
        Life.GROWN_PLAIN: "attends exactly, returns the dynamic cache quantized",
        Life.GROWN: "reads the quantized cache, quantizes on write",
        Life.ALLOCATED: "attends exactly to its own tokens, writes them into a quantized buffer",
        Life.BUFFER_PLAIN: "runs as captured once, then its buffer is quantized in place",
        Life.BUFFER: "reads the quantized buffer, quantizes on write",
        Life.RING_FRESH: "attends exactly to its own tokens, returns the last of them quantized",
        Life.RING_PLAIN: "runs as captured once, then its buffer is quantized in place",
        Life.RING: "reads the quantized buffer of the last tokens, quantizes on write",
    }[key.life]
    if key.is_update and key.life is Life.BUFFER_PLAIN:
        how = "runs as captured, then the updated cache is returned quantized"
    bits = (
        f"{site.key_quantization.layout.about} keys, {site.value_quantization.layout.about} values"
    )
    if site.key_quantization.layout.rotary:
        bits += ", keys before RoPE"
    if site.expansion is not None:
        bits += ", values are latents, of which keys are made as well"
    if key.is_read_elsewhere or site.value.is_read_elsewhere:
        bits += ", which something else reads dense"
    detail = f"{how} ({bits})"
    return SiteReport(
        site.layer, output.name, source_line(output), "rewritten", detail, where=site.where
    )
