"""The graph around an attention, before and after the rewriting, and what its cache takes: for `explain`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import fx

from kvq_compile.lowering.graph import Graph
from kvq_compile.lowering.nodes import order_of, shape_of, source_name, target_name, value_of
from kvq_compile.lowering.sites import (
    DENSE,
    Attention,
    Flow,
    Quantization,
    SiteFacts,
    SiteReport,
    State,
    Step,
    unexpected,
)
from kvq_compile.lowering.unchanged import once, unchanged

Lane = Literal["query", "keys", "values"]
MOST = 24  # steps of a picture
REACH = 6  # steps followed from an attention that was refused to its caches
_WRITES = ("quantize", "append_", "append_both_")
_KVQ = (*_WRITES, "attend", "dequantize", "importance")


@dataclass
class Anchor:
    """An attention and what is known of it, by nodes of the graph as it was captured.

    Attributes:
        output: Its output; where it was not understood, its softmax.
        attention: What was found.
        states: The caches of keys and of values, as far as they were found, each with its quantization.
        leaves: What pictures begin with.
        order: Of a site, its number in the order in which the graph runs its attentions.
    """

    output: fx.Node
    attention: Attention | None = None
    states: Mapping[Lane, tuple[State, Quantization]] = field(default_factory=dict)
    leaves: dict[fx.Node, Step] = field(default_factory=dict)
    order: int | None = None


def tell_captured(graph: Graph) -> dict[str, Anchor]:
    """Add to each report what is known of its attention and the graph around it; return where to look again."""
    try:
        with unchanged(graph.fx):
            found = _anchors(graph)
            graph.reports = [_captured(report, found.get(report.node)) for report in graph.reports]
    except Exception as error:  # a picture that fails must not cost the rewriting
        unexpected(error)
        return {}
    return found


def tell_rewritten(graph: Graph, found: Mapping[str, Anchor]) -> None:
    """Add to each report the graph around its attention as it is now."""
    try:
        outputs = {site.order: site.attention.output for site in graph.sites}
        moved = {a.output: outputs[a.order] for a in found.values() if a.order is not None}
        for anchor in found.values():
            anchor.output = moved.get(anchor.output, anchor.output)
            anchor.leaves = {moved.get(node, node): leaf for node, leaf in anchor.leaves.items()}
        with unchanged(graph.fx):
            graph.reports = [
                _rewritten(report, found.get(report.node), graph) for report in graph.reports
            ]
    except Exception as error:
        unexpected(error)


def _anchors(graph: Graph) -> dict[str, Anchor]:
    sites = {site.attention.output.name: site for site in graph.sites}
    anchors = {}
    for name, found in graph.attentions.items():
        site = sites.get(name)
        if site is not None:
            states: dict[Lane, tuple[State, Quantization]] = {
                "keys": (site.key, site.key_quantization),
                "values": (site.value, site.value_quantization),
            }
            anchors[name] = Anchor(site.attention.output, site.attention, states, order=site.order)
        elif isinstance(found, Attention):
            anchors[name] = Anchor(found.output, found, _stored(graph, found))
        else:
            anchors[name] = Anchor(found)
    outputs = {anchor.output for anchor in anchors.values()}
    ends = {node: _leaf(node, "other attention", "query", "input") for node in outputs}
    for anchor in anchors.values():
        anchor.leaves = {node: leaf for node, leaf in ends.items() if node is not anchor.output}
        anchor.leaves |= dict(_leaves(anchor))
    return anchors


def _stored(graph: Graph, found: Attention) -> dict[Lane, tuple[State, Quantization]]:
    """Return the caches, stored quantized all the same, that a refused attention reads."""
    stored: dict[Lane, tuple[State, Quantization]] = {}
    lanes: tuple[tuple[Lane, fx.Node], ...] = ("keys", found.key), ("values", found.value)
    for lane, operand in lanes:
        behind = _behind(operand)
        for state, quantization in [*graph.dense, *graph.extended]:
            if state.base in behind or state.past in behind:
                stored[lane] = state, quantization
    return stored


def _behind(node: fx.Node) -> set[fx.Node]:
    seen, front = {node}, [node]
    for _ in range(REACH):
        front = [each for f in front for each in f.all_input_nodes if each not in seen]
        seen.update(front)
    return seen


def _leaves(anchor: Anchor) -> Iterable[tuple[fx.Node, Step]]:
    if anchor.attention is None:
        return
    query, mask = anchor.attention.query, anchor.attention.mask
    yield query, _leaf(query, "query", "query", "input")
    if mask is not None:
        yield mask, _leaf(mask, "mask", "query", "input")
    for lane, (state, _) in anchor.states.items():
        yield state.new, _leaf(state.new, f"new {lane}", lane, "input")
        if state.cache is not None:
            yield state.cache, _leaf(state.cache, "cache", lane, "cache")


def _leaf(node: fx.Node, does: str, lane: Lane, kind: str) -> Step:
    return Step(node.name, does, _about(node), lane, kind, label=_label(node))


def _label(node: fx.Node) -> str:
    return readable_source(source_name(node)) if node.op == "placeholder" else ""


def readable_source(name: str) -> str:
    """Return how a model names an argument: ``past.layers[0].keys`` for ``L['past'].layers[0].keys``."""
    name = re.sub(r"^L\['(?:kwargs|args)'\]", "L", name)
    return re.sub(r"^L\['(\w+)'\]", r"\1", re.sub(r"^L\[['\"]?(\w+)['\"]?\]", r"\1", name))


def _about(node: fx.Node) -> str:
    shape = shape_of(node)
    if shape is None:
        return ""
    dtype = str(value_of(node).dtype).removeprefix("torch.")
    return f"{dtype} [{', '.join(map(str, shape))}]"


def _captured(report: SiteReport, anchor: Anchor | None) -> SiteReport:
    if anchor is None:
        return report
    lines = frames(anchor.output)
    before = _unique([*_flow(anchor, anchor.leaves), *_plain_writes(anchor)])
    return replace(report, stack=lines, facts=_facts(anchor), before=before)


def _plain_writes(anchor: Anchor) -> Iterable[Step]:
    """Yield the writes of an attention's caches that lie on no way to its output: those in place."""
    for lane, (state, _) in anchor.states.items():
        if state.write is not None and state.write is not state.base:
            inputs = [anchor.leaves[n].name for n in (state.cache, state.new) if n in anchor.leaves]
            yield Step(state.write.name, target_name(state.write), "", lane, "write", tuple(inputs))


def _facts(anchor: Anchor) -> SiteFacts | None:
    """Return heads, sizes and bytes a token of an attention's caches."""
    attention = anchor.attention
    if attention is None:
        return None
    shape = shape_of(attention.query) or ()
    query_heads = _number(shape[1]) if len(shape) == 4 else None
    if len(anchor.states) < 2:
        return SiteFacts(query_heads=query_heads)
    tensors, before, after = [], 0.0, 0.0
    for state, quantization in anchor.states.values():
        value = value_of(state.base)
        _, heads, _, size = map(_number, value.shape)
        tensors.append((heads, size))
        width = quantization.layout.bits_per_element
        # A packed cache shows the dtype of its exact tokens, that is the model's.
        before += (heads or 0) * (size or 0) * value.dtype.itemsize
        after += (heads or 0) * (size or 0) * width / 8
    (kv_heads, key_size), (_, value_size) = tensors
    key = anchor.states["keys"][0]
    dtype = str(value_of(key.base).dtype).removeprefix("torch.")
    return SiteFacts(query_heads, kv_heads, key_size, value_size, key.how, dtype, before, after)


def _number(size: Any) -> int | None:
    """Return a size; ``None`` for one that is open: to ask it for its number would fix it."""
    return size if isinstance(size, int) else None


def frames(node: fx.Node) -> tuple[str, ...]:
    """Return ``file:line in function: code`` of the lines behind a node, the innermost last."""
    trace = str(node.meta.get("stack_trace") or "").splitlines()
    told = []
    for number, line in enumerate(trace):
        match = re.match(r'\s*File "(.*)", line (\d+), in (\S+)', line)
        if match is None:
            continue
        code = trace[number + 1].strip() if number + 1 < len(trace) else ""
        told.append(f"{match[1]}:{match[2]} in {match[3]}: {code}".removesuffix(": "))
    return tuple(told)


def _flow(anchor: Anchor, leaves: Mapping[fx.Node, Step]) -> Flow:
    """Return the steps from the leaves to an attention's output, in the graph's order."""
    steps: dict[fx.Node, Step] = {}
    lanes = _lanes(anchor)
    front = [anchor.output]
    for _ in range(REACH if anchor.attention is None or not anchor.states else MOST):
        front = [node for node in front if node not in steps]
        for node in front:
            steps[node] = leaves.get(node) or _step(node, lanes, leaves, anchor)
        open_ = [node for node in front if node not in leaves]
        front = [each for node in open_ for each in node.all_input_nodes if _is_shown(each, leaves)]
        if not front or len(steps) >= MOST:
            break
    order = order_of(anchor.output.graph)
    return _unique(steps[node] for node in sorted(steps, key=lambda node: order.get(node, -1)))


def _unique(steps: Iterable[Step]) -> Flow:
    """Return steps, each once: the parts of a packed cache are one step."""
    return tuple(dict.fromkeys(steps))


def _is_shown(node: fx.Node, leaves: Mapping[fx.Node, Step]) -> bool:
    """Return whether a node is one of tokens, weights or caches: positions and lengths are left out."""
    return node in leaves or len(shape_of(node) or ()) > 2 or bool(_kvq(node))


def _lanes(anchor: Anchor) -> dict[fx.Node, Lane]:
    """Return to which operand the nodes behind an attention belong."""
    if anchor.attention is None:
        return {}
    lanes: dict[fx.Node, Lane] = {}
    operands: tuple[tuple[Lane, fx.Node], ...] = (
        ("keys", anchor.attention.key), ("values", anchor.attention.value)
    )  # fmt: skip
    for lane, operand in operands:
        stops = set(anchor.leaves)
        front = [operand]
        for _ in range(MOST):
            front = [node for node in front if node not in lanes]
            lanes.update((node, lane) for node in front)
            front = [each for node in front if node not in stops for each in node.all_input_nodes]
    return lanes


def _step(
    node: fx.Node, lanes: Mapping[fx.Node, Lane], leaves: Mapping[fx.Node, Step], anchor: Anchor
) -> Step:
    name = _kvq(node)
    inputs = [leaves[each].name if each in leaves else each.name
              for each in node.all_input_nodes if _is_shown(each, leaves)]  # fmt: skip
    kind = "attention" if node is anchor.output else "packed" if name else "step"
    if node.op == "placeholder":
        return _leaf(node, "argument", lanes.get(node, "query"), "input")
    does = f"kvq.{name}" if name else target_name(node) or node.op
    return Step(
        node.name, does, _about(node), lanes.get(node, "query"), kind, tuple(dict.fromkeys(inputs))
    )


def _kvq(node: fx.Node) -> str:
    """Return the name of the operator of this package that a node calls; empty where it calls none."""
    name = target_name(node).partition(".")[0]
    return name if name in _KVQ and "kvq" in str(node.target) else ""


def _rewritten(report: SiteReport, anchor: Anchor | None, graph: Graph) -> SiteReport:
    if anchor is None or report.outcome not in ("rewritten", DENSE):
        return report
    leaves, lanes = dict(anchor.leaves), _lanes(anchor)
    own = {state.cache: lane for lane, (state, _) in anchor.states.items()}
    for node, cache in graph.caches.items():
        lane = own.get(node) or lanes.get(cache.parts[0], "query")
        held = f"{cache.layout.about}, exact {cache.layout.sinks} + {cache.layout.window}"
        leaf = Step(node.name, "packed cache", held, lane, "packed", label=_label(node))
        leaves.update(dict.fromkeys((*cache.parts, *cache.calibrated), leaf))
    flow = _flow(anchor, leaves)
    return replace(report, after=_unique([*flow, *_writes(anchor, graph, leaves)]))


def _writes(anchor: Anchor, graph: Graph, leaves: Mapping[fx.Node, Step]) -> Iterable[Step]:
    """Yield the steps that put an attention's tokens into its packed caches."""
    for node, name in _calls_of_writes(graph.fx):
        for lane, (state, quantization) in anchor.states.items():
            into = _taken(node, name, state, graph)
            if into is None:
                continue
            layout = quantization.layout
            inputs = [leaves[each].name if each in leaves else each.name for each in into]
            about = f"{layout.about} [{layout.bits_per_element:.3g} bits]"
            names = tuple(dict.fromkeys(inputs))
            yield Step(node.name, f"kvq.{name}", about, lane, "write", names)


@once
def _calls_of_writes(graph: fx.Graph) -> list[tuple[fx.Node, str]]:
    """Return the calls that put tokens into packed caches, each with the name of its operator."""
    return [(node, name) for node in graph.nodes if (name := _kvq(node)) in _WRITES]


def _taken(node: fx.Node, name: str, state: State, graph: Graph) -> list[fx.Node] | None:
    """Return what a write takes, new tokens first, if it writes into a state's cache."""
    if name == "quantize":
        written = node.args[0]
        own = written in (state.base, state.whole, state.returned)
        return [written] if own and isinstance(written, fx.Node) else None
    cache = graph.caches.get(state.cache) if state.cache is not None else None
    cache = cache or graph.made.get(state.base)
    if name == "append_both_":
        keys, values, _, key, value = node.args[:5]
        pairs = [(keys, key), (values, value)]
    else:
        pairs = [(node.args[0], node.args[2])]
    for parts, written in pairs:
        if cache is not None and parts[0] is cache.parts[0]:  # type: ignore[index]
            return [written, *cache.parts[:1]]  # type: ignore[list-item]
    return None
