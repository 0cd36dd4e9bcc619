"""Join attentions to the cache tensors they read; say why where that fails."""

from __future__ import annotations

import torch
from torch import fx

from kvq_compile.kernels.spec import CacheSpec, PageLayout
from kvq_compile.lowering.find_attention import find_attentions
from kvq_compile.lowering.find_state import NO_CACHE, find_state
from kvq_compile.lowering.graph import same, shape_of, value_of
from kvq_compile.lowering.sites import Attention, AttentionSite, Life, Refusal, SiteReport, State

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BY_OPTION = "left in 16 bit by the option layers"


def find_sites(graph: fx.Graph, spec: CacheSpec) -> tuple[list[AttentionSite], list[SiteReport]]:
    """Return the sites that can be rewritten under ``spec`` and a report of each that cannot."""
    outputs = set(next(iter(reversed(graph.nodes))).all_input_nodes)
    sites: list[AttentionSite] = []
    refused: list[SiteReport] = []
    for layer, found in enumerate(find_attentions(graph)):
        node = found.output if isinstance(found, Attention) else found[0]
        try:
            if not isinstance(found, Attention):
                raise found[1]
            sites.append(_site(layer, found, outputs, spec))
        except Refusal as reason:
            text = str(reason)
            refused.append(
                SiteReport(layer, node.name, source_line(node), "left alone", text, text in (NO_CACHE, BY_OPTION))
            )
    return sites, refused


def _site(layer: int, attention: Attention, outputs: set[fx.Node], spec: CacheSpec) -> AttentionSite:
    key = find_state(attention.key, outputs)
    value = find_state(attention.value, outputs)
    layer_spec = spec.for_layer(layer)
    if layer_spec is None:
        raise Refusal(BY_OPTION)
    if key.life is not value.life:
        raise Refusal(f"keys are {key.life.value}, values {value.life.value}")
    _check_tensors(attention, key, value)
    _check_slots(attention, key, value)
    try:
        key_layout = layer_spec.layout("key", int(value_of(key.base).shape[3]))
        value_layout = layer_spec.layout("value", int(value_of(value.base).shape[3]))
    except ValueError as error:
        raise Refusal(str(error)) from None
    for state, layout in ((key, key_layout), (value, value_layout)):
        if state.life in (Life.GROWN, Life.BUFFER):
            _check_layout(value_of(state.past).page_layout, layout)
    return AttentionSite(layer, attention, key, value, key_layout, value_layout)


def _check_layout(held: PageLayout, wanted: PageLayout) -> None:
    if held != wanted:
        raise ValueError(
            f"the cache must be quantized as this model is compiled, {wanted}, got {held}; start with an empty "
            "cache, or compile with the options that made this one"
        )


def _check_tensors(attention: Attention, key: State, value: State) -> None:
    query = value_of(attention.query)
    if query.dim() != 4:
        raise Refusal(f"the query must be [B, Hq, T, D], got {tuple(query.shape)}")
    if query.dtype not in DTYPES:
        raise Refusal(f"dtype {query.dtype} is not supported; use float16, bfloat16 or float32")
    if query.device.type not in ("cpu", "cuda"):
        raise Refusal(f"device {query.device.type} is not supported; use cpu or cuda")
    if same(query.shape[2], 0):
        raise Refusal("the call has no tokens")
    if value_of(key.base).dtype != query.dtype or value_of(value.base).dtype != query.dtype:
        raise Refusal("query, keys and values must have one dtype")
    for state in (key, value):
        heads = (shape_of(state.base) or (0, 0))[1]
        matches = same(heads * state.repeats, query.shape[1])
        if not matches and not (attention.grouped and state.repeats == 1 and query.shape[1] % heads == 0):
            raise Refusal(f"{query.shape[1]} query heads do not match {heads} KV heads repeated {state.repeats} times")


def _check_slots(attention: Attention, key: State, value: State) -> None:
    """Make sure that slots without a token cannot be seen, and that keys and values move together."""
    if key.life not in (Life.ALLOCATED, Life.BUFFER, Life.BUFFER_PLAIN):
        return
    if key.position is not value.position and not same(value_of(key.position), value_of(value.position)):
        raise Refusal("keys and values are written at different slots")
    if key.slots is not value.slots and not same(value_of(key.slots), value_of(value.slots)):
        raise Refusal("different numbers of slots are read from keys and values")
    if attention.mask is not None or attention.causal:
        return
    tokens = (shape_of(key.new) or (0, 0, 0))[2]
    position = value_of(key.position)
    first = 0 if key.life is Life.ALLOCATED else position
    if key.slots is None or isinstance(first, torch.Tensor) or not same(value_of(key.slots), first + tokens):
        raise Refusal("attention reads slots that hold no token: there is no mask")


def source_line(node: fx.Node) -> str:
    """Return ``file:line`` of the innermost line of model code behind a node."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not lines:
        return ""
    file, line = lines[-1].split(", ")[:2]
    return f"{file.removeprefix('File ').strip(chr(34))}:{line.removeprefix('line ')}"
