"""Quantize keys without the bias of their projection, where that bias would swamp them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import Tables
from kvq_compile.lowering.find.rotation import Rotation, find_rotation
from kvq_compile.lowering.nodes import VIEWS, argument, target_name, value_of
from kvq_compile.lowering.sites import Refusal, State

SWAMPS = 4.0  # times the size that the weights alone give a key's channel for inputs of unit size


def without_bias(spec: CacheSpec, key: State, inputs: Mapping[fx.Node, Any]) -> CacheSpec:
    """Return how to code a site: as ``spec`` says, or its keys without a huge constant part.

    Before:  key = rotate(linear(x, weight, bias)); a group's steps span ``bias`` and what is left of a key
    After:   keys are coded as ``unrotate(key) - bias``, in tables made from the graph's own constants
    Because: in Qwen2 and 2.5 the bias is hundreds of times as large as the rest, which a few steps then
        cannot tell apart: the field's best known silent failure.

    Leaves alone: biases of ordinary size; keys whose projection or rotation is not understood; calibrated
    tables, which have the mean taken off already; mixed pages and Hadamard's transform, which know no such tables.

    Args:
        spec: How the method codes a layer.
        key: The keys' state.
        inputs: The arguments of the call that is being compiled, by placeholder.
    """
    scheme = spec.key
    if not scheme.takes_bias or spec.key_tables is not None:
        return spec
    found = _projection(key.new)
    if found is None:
        return spec
    weight, bias = (_constant(node, inputs) for node in found)
    if weight is None or bias is None or weight.dim() != 2:
        return spec
    _, heads, _, head_dim = value_of(key.new).shape
    if bias.numel() != heads * head_dim or weight.shape[0] != bias.numel():
        return spec
    if not bool((bias.abs() > SWAMPS * weight.norm(dim=1)).any()):
        return spec
    try:
        rotation = find_rotation(key.new, inputs)
    except Refusal:
        return spec
    tables = _tables(bias.view(heads, head_dim), rotation, (1.0 - scheme.clip) / 2.0)
    rotary: dict[str, Any] = {
        "rotary": True,
        "tables": tables.digest,
    }  # those that take a bias have both
    return replace(spec, key=replace(scheme, **rotary), key_tables=tables)


def _projection(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """Return weight and bias of the one linear layer that a key is made of."""
    seen: set[fx.Node] = set()
    layers: list[fx.Node] = []
    waiting = [node]
    while waiting:
        at = waiting.pop()
        if at in seen or not isinstance(at, fx.Node):
            continue
        seen.add(at)
        if target_name(at) == "linear":
            layers.append(at)
        elif target_name(at) in (
            *VIEWS,
            "mul",
            "add",
            "sub",
            "neg",
            "cat",
            "stack",
            "chunk",
            "split",
            "float",
        ):
            waiting.extend(at.all_input_nodes)
    if len(layers) != 1:
        return None
    weight, bias = argument(layers[0], 1, "weight"), argument(layers[0], 2, "bias")
    return (weight, bias) if isinstance(weight, fx.Node) and isinstance(bias, fx.Node) else None


def _constant(node: fx.Node, inputs: Mapping[fx.Node, Any]) -> Tensor | None:
    """Return a parameter of the model."""
    value = inputs.get(node)
    return value.detach().float().cpu() if isinstance(value, torch.nn.Parameter) else None


def _tables(bias: Tensor, rotation: Rotation, margin: float) -> Tables:
    """Return tables that take a bias ``[H, D]`` off unrotated keys and clip as the spec does."""
    heads, head_dim = bias.shape
    order = torch.tensor(rotation.order, dtype=torch.int64, device="cpu").expand(heads, head_dim)
    frequency = torch.tensor(rotation.frequencies, dtype=torch.int64, device="cpu").int()
    return Tables.build(
        order=order,
        mean=bias.gather(1, order),
        scale=torch.ones(heads, head_dim, dtype=torch.float32, device="cpu"),
        margin=torch.full((heads, head_dim), margin, dtype=torch.float32, device="cpu"),
        frequency=frequency.expand(heads, head_dim // 2),
    )
