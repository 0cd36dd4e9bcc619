"""Tell the channelwise scheme how keys are rotated, where the graph shows it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.schemes import Channelwise
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import NO_TABLES, Tables
from kvq_compile.lowering import logs
from kvq_compile.lowering.find.rotation import Rotation, find_rotation
from kvq_compile.lowering.nodes import value_of
from kvq_compile.lowering.sites import Refusal, State


def with_rotation(
    spec: CacheSpec,
    key: State,
    inputs: Mapping[fx.Node, Any],
    known: dict[Hashable, Rotation],
) -> CacheSpec:
    """Return how to code a site: as ``spec`` says, and with what the graph tells of the rotation of its keys.

    Before:  keys are coded as attention sees them, the mean of a channel turning with the position
    After:   keys are coded without their turned mean, in tables of pairs and frequencies from the graph's constants
    Because: a mean that turns within a page is variance to a channel's step, and takes a third of a bit.

    Leaves alone: other schemes; keys that are not rotated, or in a way that is not understood, whose channels then
    get bits one by one instead of by pairs.

    Args:
        spec: How the method codes a layer.
        key: The keys' state.
        inputs: The arguments of the call that is being compiled, by placeholder.
        known: Rotations found in the same graph.
    """
    scheme = spec.key
    if not isinstance(scheme, Channelwise) or spec.key_tables is not None:
        return spec
    try:
        rotation = find_rotation(key.new, inputs, known)
    except Refusal as reason:
        logs.sites.info("%s keeps its mean, which may turn: %s", key.base, reason)
        return spec
    _, heads, _, head_dim = value_of(key.new).shape
    tables = rotation_tables(int(heads), int(head_dim), rotation)
    scheme = replace(scheme, pairs="halves", tables=tables.digest)
    return replace(spec, key=scheme, key_tables=tables)


def without_mean(spec: CacheSpec) -> CacheSpec:
    """Return how to code the keys of a layer that forgets its first tokens.

    Before:  keys are coded without their mean, which turns with the cache position
    After:   the channelwise scheme codes keys as attention sees them; others as they are
    Because: cache positions count anew where pages are dropped, and the mean of older pages would turn too far.
    """
    scheme = spec.key
    if not isinstance(scheme, Channelwise) or not scheme.takes_mean:
        return spec
    plain = replace(scheme, tables=NO_TABLES, weighs=False)
    return replace(spec, key=plain, key_tables=None)


def rotation_tables(
    heads: int, head_dim: int, rotation: Rotation | None, scale: Tensor | None = None
) -> Tables:
    """Return tables that order pairs from the fastest to the slowest.

    Args:
        heads, head_dim: Of the keys.
        rotation: How they are rotated; ``None``: not at all.
        scale: Of the model's channels ``[heads, head_dim]``, alike in both channels of a pair; ``None``: 1.
    """
    channels, frequencies = tuple(range(head_dim)), (0,) * (head_dim // 2)
    if rotation is not None:
        channels, frequencies = tuple(rotation.order), tuple(rotation.frequencies)
    frequency = torch.tensor(frequencies, dtype=torch.int64, device="cpu")
    pairs = frequency.abs().argsort(descending=True, stable=True)
    order = torch.tensor(channels, dtype=torch.int64, device="cpu").unflatten(0, (2, -1))
    order = order[:, pairs].flatten().expand(heads, head_dim)
    if scale is None:
        scale = torch.ones(heads, head_dim, dtype=torch.float32, device="cpu")
    return Tables.build(
        order=order,
        mean=torch.zeros_like(scale),
        scale=scale.gather(1, order),
        margin=torch.zeros_like(scale),
        frequency=frequency[pairs].int().expand(heads, head_dim // 2),
    )
