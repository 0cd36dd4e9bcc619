"""Run the passes in order over a copy of a captured graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.spec import CacheSpec, PageLayout
from kvq_compile.lowering.dequantize_reads import dequantize_reads
from kvq_compile.lowering.find_sites import find_sites, source_line
from kvq_compile.lowering.fuse_attention import attend_to_new_tokens, fuse_attention
from kvq_compile.lowering.graph import shape_of, value_of
from kvq_compile.lowering.quantize_outputs import Extended, Output, quantize_outputs
from kvq_compile.lowering.sites import AttentionSite, Life, SiteReport
from kvq_compile.lowering.sizes import Size, SizeReader
from kvq_compile.lowering.unwrap_caches import unwrap_caches

RECORDING_GRADIENTS = (
    "gradients are being recorded, and rounding has none; run under torch.no_grad() or torch.inference_mode()"
)


@dataclass(frozen=True)
class Conversion:
    """A 16-bit buffer to convert once the call has run.

    Attributes:
        argument: Its place among the arguments.
        position: Number of the graph output that holds the slots just written, or ``None``.
        end: Tokens held after the call, where that is known from the arguments.
        layout: What to convert to.
    """

    argument: int
    position: int | None
    end: Size | None
    layout: PageLayout


@dataclass(frozen=True)
class Lowered:
    """A rewritten graph and how to call it.

    Attributes:
        module: The graph to hand to the inner compiler; no tensor subclass goes in or comes out.
        inputs: Example inputs of that graph.
        outputs: How each value that the captured graph returned is made from what ``module`` returns.
        conversions: 16-bit buffers to convert after a call.
        appended: Places of the grown caches among the arguments, and how many tokens a call adds.
        unwrapped: Places of the quantized caches; ``True`` where the length is an input of its own.
        reports: What became of each attention.
    """

    module: fx.GraphModule
    inputs: list[Any]
    outputs: list[Output]
    conversions: list[Conversion]
    appended: dict[int, Size]
    unwrapped: dict[int, bool]
    reports: list[SiteReport]

    def flatten(self, args: Sequence[Any]) -> list[Any]:
        """Return the arguments of ``module`` for the arguments of the captured graph."""
        flat: list[Any] = []
        for index, arg in enumerate(args):
            if index in self.unwrapped:
                flat.extend(arg.parts)
                if self.unwrapped[index]:
                    flat.append(arg.shape[2])
            else:
                flat.append(arg)
        return flat


def lower(gm: fx.GraphModule, example_inputs: Sequence[Any], spec: CacheSpec) -> Lowered:
    """Rewrite what can be rewritten in a copy of a captured graph; report on every attention.

    Args:
        gm: The graph that Dynamo captured; it is left untouched.
        example_inputs: The arguments of the call that is being compiled.
        spec: What caches are quantized to.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    module = _copy(gm, placeholders)
    graph = module.graph
    arguments = {node: i for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    sizes = SizeReader(list(arguments))
    sites, reports = find_sites(graph, spec)
    if _records_gradients(example_inputs):
        reports += [_left(site, RECORDING_GRADIENTS) for site in sites]
        sites = []

    caches = unwrap_caches(graph)  # first: the passes below speak of parts
    made: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for site in sites:
        if site.key.life is Life.ALLOCATED:
            made |= attend_to_new_tokens(graph, site)
        else:
            fuse_attention(graph, site, caches)
    outputs = quantize_outputs(graph, sites, made, arguments, sizes)  # after it: cat nodes have lost a reader
    conversions = _plan_conversions(graph, sites, arguments, sizes)
    _drop_dead(graph)
    appended = {plan.argument: plan.tokens for plan in outputs if isinstance(plan, Extended)}
    unwrapped = {arguments[node]: cache.owns_length for node, cache in caches.items()}
    dequantize_reads(graph, caches)  # last: what is left are reads that no pass claimed
    graph.lint()
    module.recompile()
    reports += [_rewritten(site) for site in sites]
    lowered = Lowered(
        module, [], outputs, conversions, appended, unwrapped, sorted(reports, key=lambda report: report.layer)
    )
    lowered.inputs.extend(lowered.flatten(example_inputs))
    return lowered


def _copy(gm: fx.GraphModule, placeholders: list[fx.Node]) -> fx.GraphModule:
    """Copy a captured graph with all that AOTAutograd looks for; Dynamo still needs the original."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    graph.output(result)
    for node in placeholders:
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    module = fx.GraphModule(gm, graph)
    module.meta = gm.meta
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, name):
            setattr(module, name, getattr(gm, name))
    return module


def _records_gradients(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _plan_conversions(
    graph: fx.Graph,
    sites: Sequence[AttentionSite],
    arguments: dict[fx.Node, int],
    sizes: SizeReader,
) -> list[Conversion]:
    """Return the slots that 16-bit buffers were written at, for their conversion after the call."""
    output = next(iter(reversed(graph.nodes)))
    extra: list[fx.Node] = []
    conversions: list[Conversion] = []
    for site in sites:
        for state, layout in site.states():
            if state.life is not Life.BUFFER_PLAIN:
                continue
            assert state.past is not None
            if isinstance(value_of(state.position), Tensor):
                if state.position not in extra:
                    extra.append(state.position)
                index = len(output.args[0]) + extra.index(state.position)
                conversions.append(Conversion(arguments[state.past], index, None, layout))
            else:
                end = value_of(state.position) + (shape_of(state.new) or (0, 0, 0))[2]
                conversions.append(Conversion(arguments[state.past], None, sizes.size(end), layout))
    output.args = ((*output.args[0], *extra),)
    return conversions


def _drop_dead(graph: fx.Graph) -> None:
    """Erase what the rewriting left without users; writes have none and stay."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "call_method") and not node.users and not _writes(node):
            graph.erase_node(node)


def _writes(node: fx.Node) -> bool:
    if node.is_impure():
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = getattr(node.target, "__name__", "")
    return name == "setitem" or name.endswith("_") or "inplace" in node.kwargs or "out" in node.kwargs


def _left(site: AttentionSite, reason: str) -> SiteReport:
    output = site.attention.output
    return SiteReport(site.layer, output.name, source_line(output), "left alone", reason)


def _rewritten(site: AttentionSite) -> SiteReport:
    output, life = site.attention.output, site.key.life
    how = {
        Life.FRESH: "attends exactly to its own tokens, returns them quantized",
        Life.GROWN_PLAIN: "attends exactly, returns the grown cache quantized",
        Life.GROWN: "reads the quantized cache, quantizes on write",
        Life.ALLOCATED: "attends exactly to its own tokens, writes them into a quantized buffer",
        Life.BUFFER_PLAIN: "runs as captured once, then its buffer is quantized in place",
        Life.BUFFER: "reads the quantized buffer, quantizes on write",
    }[life]
    bits = f"{site.key_layout.bits}-bit keys, {site.value_layout.bits}-bit values"
    return SiteReport(site.layer, output.name, source_line(output), "rewritten", f"{how} ({bits})")

