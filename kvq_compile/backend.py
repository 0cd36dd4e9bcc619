"""The ``kvq`` backend of ``torch.compile``: rewrite the captured graph, hand the rest to Inductor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kvq_compile import measured
from kvq_compile.compiling import compiling
from kvq_compile.entry import watch_export, watch_generate, watch_peft
from kvq_compile.errors import KVQError, KVQWarning
from kvq_compile.history import GraphReport, amend, graphs, record, unmet_layers
from kvq_compile.kernels.packed import PARTS_FORM
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.limits import make_room
from kvq_compile.lowering import logs
from kvq_compile.lowering.collectives import watch, watch_groups, why_not_recorded
from kvq_compile.lowering.find.layers import counts_layers
from kvq_compile.lowering.guards import see_caches, share_guards, unify
from kvq_compile.lowering.lost_writes import refusing_lost_writes
from kvq_compile.lowering.pipeline import lower
from kvq_compile.lowering.runtime import Compiled, Lowered
from kvq_compile.lowering.sites import DENSE, SiteReport, StateReport
from kvq_compile.lowering.steps import Record, Steps, record_on_gpu
from kvq_compile.lowering.tangents import refusing_tangents
from kvq_compile.options import Config, make_config

# How sizes are given to Inductor, whose keys of what it keeps on disk do not show that.
SIZES_FORM = 2
RECORDERS: dict[str, Record] = {"cuda": record_on_gpu}  # by the type of the device

watch_generate()
watch_peft()
watch_export()
watch_groups()


def kvq(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Compiled:
    """Compile one captured graph so that the caches it keeps are quantized.

    Called by ``torch.compile(..., backend="kvq")``, which finds it as an entry point.

    Args:
        gm: The captured graph.
        example_inputs: Arguments of the call that is being compiled.
        mode: As for ``torch.compile``; handed on to Inductor.
        options: See `kvq_compile.options.make_config`.

    Raises:
        ValueError: An option is unknown or out of range.
        KVQError: ``strict`` is set and an attention that keeps a cache could not be rewritten.
    """
    config = make_config(options)
    config = replace(config, mode=mode or config.mode)
    tell_of_cost(config.spec)
    with compiling(f"a graph of {len(gm.graph.nodes)} nodes"):
        return compile_graph(gm, example_inputs, config)


def tell_of_cost(spec: CacheSpec) -> None:
    """Warn where a method was measured to lose too much."""
    text = measured.warning(spec)
    if text is not None:
        warnings.warn(text, KVQWarning, stacklevel=3)


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Compiled:
    """Lower one graph, report on it and return the callable that Dynamo will run."""
    recorder, others = _recorder(gm, example_inputs, config)
    by_order, records = config.calibration is not None, recorder is not None
    unify(gm, example_inputs)
    lowered = lower(gm, example_inputs, config.spec, by_order, records, others)
    if config.calibration is not None and lowered.reports:
        config.calibration.check(example_inputs, len(lowered.reports))
    layers = () if config.calibration else tuple(index for index, _ in config.spec.layers)
    steps = _about_steps(lowered)
    report = GraphReport(tuple(lowered.reports), config.spec, layers, lowered.states, steps)
    record(report)
    if config.strict and _ends_the_model(gm, lowered.reports):
        text = unmet_layers(graphs())
        if text:
            raise KVQError(text)
    times = make_room(gm, lowered.reports, lowered.states)
    _tell_of_the_limit(times if lowered.reports else None)
    _tell(lowered.reports, lowered.states, config)

    see_caches(gm, example_inputs)
    module, inputs = gm, example_inputs
    if lowered.rows is not None:
        module, inputs = lowered.rows.module, lowered.rows.examples(inputs)
    if lowered.arranged is not None:
        module, inputs = lowered.arranged.module, lowered.arranged.take(inputs)
    compiled = _compiled(module, inputs, lowered, recorder, config, report)
    for form in (lowered.arranged, lowered.rows):
        compiled = compiled if form is None else form.around(compiled)
    compiled = refusing_lost_writes(gm, compiled)
    if lowered.quantizes:
        compiled = refusing_tangents(gm, compiled)
    if lowered.arranged is None:
        share_guards(gm, example_inputs)
    return compiled


def _compiled(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    lowered: Lowered,
    recorder: Record | None,
    config: Config,
    report: GraphReport,
) -> Compiled:
    """Return the callable for a graph that was lowered, and of which ``report`` tells."""

    def compile_inner(args: Sequence[Any]) -> Compiled:
        return _compile_inner(
            lowered.module, lowered.flatten(args), config, _patches(lowered, config)
        )

    def stays_plain(reason: str) -> None:
        told = [replace(site, outcome="left alone", detail=reason) for site in lowered.reports]
        record(GraphReport(tuple(told), config.spec))
        text = f"caches stay in 16 bit: {reason}"
        if config.strict:
            raise KVQError(text)
        warnings.warn(text, KVQWarning, stacklevel=3)

    def stops(reason: str) -> None:
        logs.sites.info("steps are not recorded any more: %s", reason)
        amend(report, f"are not recorded any more: {reason}")

    if lowered.thaw is not None:
        return lowered.around(gm.forward, stays_plain)
    if not lowered.compiles:
        return gm.forward
    if lowered.conversions or lowered.changes_memory:
        return lowered.run_once_then_convert(compile_inner, stays_plain)
    inner, run = compile_inner(example_inputs), None
    if recorder is not None and lowered.lengths is not None:
        run = Steps(lowered, inner, recorder, stops)
        watch(run, gm.graph)
    return lowered.around(inner, stays_plain, run)


def _recorder(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Config
) -> tuple[Record | None, str | None]:
    """Return what records steps on the device of a call's tensors, if anything does, and why it is not to."""
    devices = {x.device for x in inputs if isinstance(x, torch.Tensor)}
    kinds = {device.type for device in devices}
    if not config.records or len(kinds) != 1 or not kinds <= RECORDERS.keys():
        return None, None
    others = why_not_recorded(gm.graph, devices.pop(), config.records_collectives)
    return RECORDERS[kinds.pop()], others


def _about_steps(lowered: Lowered) -> str:
    """Return whether steps are replayed, or why not; empty where a graph is no step."""
    if lowered.unrecorded is not None:
        return f"are not recorded: {lowered.unrecorded}"
    return "" if lowered.lengths is None else "are replayed from CUDA graphs"


def _patches(lowered: Lowered, config: Config) -> dict[str, Any]:
    """Return Inductor's settings. A graph with caches is recorded here or not at all: not a prompt of each length."""
    from torch._inductor import list_mode_options

    patches = {**(list_mode_options(config.mode) if config.mode else {}), **config.inductor}
    if lowered.lengths is not None or (lowered.rewritten and not lowered.unwrapped):
        patches["triton.cudagraphs"] = False
    return patches


def _tell(reports: Sequence[SiteReport], states: Sequence[StateReport], config: Config) -> None:
    """Log what became of each attention; warn about attentions and caches that are not served."""
    for site in reports:
        logs.sites.info("%d (%s) %s: %s", site.layer, site.where, site.outcome, site.detail)
    _tell_dense(reports)
    refused = [site for site in reports if site.outcome == "left alone" and not site.expected]
    reasons = sorted({site.detail for site in refused})
    lost = [
        state
        for state in states
        if state.outcome == "left alone"
        and not state.expected
        and not any(state.detail.endswith(reason) for reason in reasons)
    ]
    if not refused and not lost:
        return
    told = []
    if refused:
        count = f"{len(refused)} of {len(reports)} attentions were left as they are"
        told.append(f"{count}: {'; '.join(reasons)}")
    if lost:
        names = "; ".join(f"{state.name}: {state.detail}" for state in lost)
        told.append(f"{len(lost)} of {len(states)} caches are not served: {names}")
    text = "; ".join(told)
    if config.strict:
        raise KVQError(text)
    warnings.warn(text, KVQWarning, stacklevel=2)


def _tell_dense(reports: Sequence[SiteReport]) -> None:
    """Warn where caches save memory and cost time."""
    dense = [site for site in reports if site.outcome == DENSE]
    if dense:
        reasons = "; ".join(sorted({site.detail for site in dense}))
        warnings.warn(
            f"{len(dense)} of {len(reports)} attentions read their caches dense, which are stored quantized, and are "
            f"slower than over 16 bit: {reasons}",
            KVQWarning,
            stacklevel=3,
        )


def _compile_inner(
    module: fx.GraphModule, inputs: list[Any], config: Config, patches: dict[str, Any]
) -> Compiled:
    if config.inner == "eager":
        return module.forward
    if config.inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(module, inputs)
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path

    # Otherwise Inductor chooses this assembler only where it compiles kernels itself: not in a process that finds them
    # on disk, whose keys for our kernels would then name another version than those they were stored under.
    _set_triton_ptxas_path()
    tag = torch.compiler.config.cache_key_tag
    form = {"cache_key_tag": f"{tag} kvq {PARTS_FORM} {SIZES_FORM}"}
    with torch.compiler.config.patch(form):  # type: ignore[attr-defined]
        given = [_settled(x) for x in inputs]
        return compile_fx(module, given, config_patches=patches)  # type: ignore[return-value]


def _settled(x: Any) -> Any:
    """Return a size as the symbol that the graph has for it, anything else as it is.

    Two sizes that have to be equal are one symbol in the graph, and Inductor binds the one with which an input was
    made, which need not be the same: the other cache's size is no input any more.
    """
    if not isinstance(x, torch.SymInt) or not x.node.expr.is_Symbol:
        return x
    return x.node.shape_env.create_symintnode(x.node.expr, hint=x.node.hint)


def _ends_the_model(gm: fx.GraphModule, reports: Sequence[SiteReport]) -> bool:
    """Return whether no layer of the model is still to be met: the graph runs to its end and holds its layers."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    runs_to_its_end = reason is not None and not reason.graph_break
    return runs_to_its_end and all(counts_layers(site.where) for site in reports)


def _tell_of_the_limit(times: int | None) -> None:
    """Warn at the last graph that Dynamo makes of a piece of code: from then on it runs without this backend."""
    if times is not None:
        warnings.warn(
            f"this code was compiled {times} times, which is PyTorch's limit: further variants of it run uncompiled "
            "and keep their caches as they are; raise torch._dynamo.config.recompile_limit",
            KVQWarning,
            stacklevel=3,
        )
