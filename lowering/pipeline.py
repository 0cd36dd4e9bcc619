"""Run the passes in order over a copy of a captured graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.layout import CacheSpec
from kvq_compile.lowering.find.sites import find_sites, left_alone, source_line
from kvq_compile.lowering.rewrite.dequantize_reads import dequantize_reads
from kvq_compile.lowering.rewrite.drop_dead import drop_dead
from kvq_compile.lowering.rewrite.extend_refused import extend_refused
from kvq_compile.lowering.rewrite.frames import Frames
from kvq_compile.lowering.rewrite.fuse_attention import (
    attend_to_new_tokens,
    fuse_attention,
    weigh_fresh_tokens,
)
from kvq_compile.lowering.rewrite.plan_conversions import Conversion, plan_conversions
from kvq_compile.lowering.rewrite.quantize_outputs import Extended, Output, quantize_outputs
from kvq_compile.lowering.rewrite.unchain_writes import unchain_writes
from kvq_compile.lowering.rewrite.unwrap_caches import unwrap_caches
from kvq_compile.lowering.sites import AttentionSite, Coding, Life, Seen, SiteReport
from kvq_compile.lowering.sizes import Size, SizeReader

RECORDING_GRADIENTS = (
    "gradients are being recorded, and rounding has none; "
    "run under torch.no_grad() or torch.inference_mode()"
)


@dataclass(frozen=True)
class Lowered:
    """A rewritten graph and how to call it.

    Attributes:
        module: The graph to hand to the inner compiler; no tensor subclass goes in or comes out.
        outputs: How each value that the captured graph returned is made from what ``module`` returns; behind
            them, the slots that ``conversions`` ask for.
        returned: How many values the captured graph returned.
        conversions: 16-bit buffers to convert after a call.
        appended: Places of the grown caches among the arguments, and how many tokens a call adds.
        pairs: Places of grown keys and of the values that belong to them.
        unwrapped: Places of the quantized caches; ``True`` where the length is an input of its own.
        tables: Tables of the caches that the graph makes, arguments of ``module`` behind all others.
        reports: What became of each attention.
    """

    module: fx.GraphModule
    outputs: list[Output]
    returned: int
    conversions: list[Conversion]
    appended: dict[int, Size]
    pairs: list[tuple[int, int]]
    unwrapped: dict[int, bool]
    tables: list[Tensor]
    reports: list[SiteReport]

    def claim(self, args: Sequence[Any]) -> None:
        """Make room for the call's tokens in the grown caches.

        Raises:
            ValueError: The keys and the values of a layer hold different numbers of tokens.
        """
        for key, value in self.pairs:
            if args[key].shape[2] != args[value].shape[2]:
                lengths = f"{int(args[key].shape[2])} keys and {int(args[value].shape[2])} values"
                raise ValueError(
                    f"keys and values of a cache must hold equally many tokens, got {lengths}"
                )
        for index, tokens in self.appended.items():
            args[index].claim(tokens(args))

    def flatten(self, args: Sequence[Any]) -> list[Any]:
        """Return the arguments of ``module`` for the arguments of the captured graph."""
        flat: list[Any] = []
        for index, arg in enumerate(args):
            if index in self.unwrapped:
                flat.extend(arg.parts)
                flat.extend(part for part in (*arg.frame, arg.originals) if part is not None)
                if self.unwrapped[index]:
                    flat.append(arg.shape[2])
            else:
                flat.append(arg)
        return flat + self.tables


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
    unchain_writes(graph)  # first: the finders know a cache by one node
    inputs = dict(zip(arguments, example_inputs, strict=True))
    sites, reports = find_sites(graph, spec, sizes, inputs)
    if _records_gradients(example_inputs):
        reports += [
            left_alone(site.layer, site.attention.output, RECORDING_GRADIENTS) for site in sites
        ]
        sites = []

    frames = Frames(
        graph, sites, inputs
    )  # its placeholders stand behind those of the captured graph
    caches = unwrap_caches(graph)  # before the rewriting: it speaks of parts
    made: dict[fx.Node, tuple[fx.Node, ...]] = {}
    seen: dict[fx.Node, Seen] = {}
    returned = len(next(iter(reversed(graph.nodes))).args[0])
    conversions = plan_conversions(graph, sites, arguments, sizes)
    for site in sites:
        if site.key.life is Life.ALLOCATED:
            made |= attend_to_new_tokens(graph, site, frames)
        else:
            seen |= weigh_fresh_tokens(graph, site)
            fuse_attention(graph, site, caches)
    states = [(state, coding) for site in sites for state, coding in site.states()]
    refused = extend_refused(graph, caches, [state for state, _ in states], sizes)
    states += [
        (state, Coding(caches[state.past].layout)) for state in refused if state.past is not None
    ]
    outputs = quantize_outputs(
        graph, states, made, frames, seen, arguments, sizes
    )  # after it: cat nodes have lost a reader
    drop_dead(graph)
    appended = {plan.argument: plan.tokens for plan in outputs if isinstance(plan, Extended)}
    unwrapped = {arguments[node]: cache.owns_length for node, cache in caches.items()}
    dequantize_reads(graph, caches)  # last: what is left are reads that no pass claimed
    graph.lint()
    module.recompile()
    reports += [_rewritten(site) for site in sites]
    return Lowered(
        module=module,
        outputs=outputs,
        returned=returned,
        conversions=conversions,
        appended=appended,
        pairs=_pairs(sites, arguments),
        unwrapped=unwrapped,
        tables=frames.tensors,
        reports=sorted(reports, key=lambda report: report.layer),
    )


def _copy(gm: fx.GraphModule, placeholders: list[fx.Node]) -> fx.GraphModule:
    """Copy a captured graph with all that AOTAutograd looks for; Dynamo still needs the original."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    graph.output(result)
    for node in placeholders:
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source
    module = fx.GraphModule(gm, graph)
    module.meta = gm.meta
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, name):
            setattr(module, name, getattr(gm, name))
    return module


def _records_gradients(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in inputs
    )


def _pairs(sites: Sequence[AttentionSite], arguments: dict[fx.Node, int]) -> list[tuple[int, int]]:
    grown = [(site.key.past, site.value.past) for site in sites if site.key.life is Life.GROWN]
    return [
        (arguments[key], arguments[value])
        for key, value in grown
        if key is not None and value is not None
    ]


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
    bits = f"{site.key_coding.layout.about} keys, {site.value_coding.layout.about} values"
    if site.key_coding.layout.rotary:
        bits += ", keys before RoPE"
    return SiteReport(site.layer, output.name, source_line(output), "rewritten", f"{how} ({bits})")
