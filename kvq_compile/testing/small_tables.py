"""Random tables and the layouts that need them: for tests. Needs the ``test`` extra."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.schemes import Channelwise, Codebook, Role, Uniform, scheme_of
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import Tables


def random_tables(
    heads: int, head_dim: int, *, group_size: int, rotary: bool, codebook: tuple[int, int] | None,
    seed: int, size: float = 1.0,
) -> Tables:  # fmt: skip
    """Return tables for coding roughly normal tokens.

    Args:
        heads, head_dim: Shape of the tensor.
        group_size: Neighbouring stored channels that share a margin.
        rotary: Whether to rotate, at frequencies from a full rotation in six tokens down.
        codebook: Coupled channels and bits of an index, or ``None``.
        seed: Of the random numbers.
        size: Standard deviation of the mean of channels.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(3, heads, head_dim, generator=generator, dtype=torch.float32, device="cpu")
    if rotary:
        half = uniform[0, :, : head_dim // 2].argsort(-1)
        order = torch.cat([half, half + head_dim // 2], -1)
        scale = (0.5 + uniform[1, :, : head_dim // 2]).repeat(1, 2)
        exponent = half.float() / (head_dim // 2)
        frequency = (2.0**32 / 6.3 * 1e-4**exponent).round().int()
    else:
        order, scale, frequency = uniform[0].argsort(-1), 0.5 + uniform[1], None
    margin = 0.2 * uniform[2, :, : head_dim // group_size].repeat_interleave(group_size, -1)
    book = None
    if codebook is not None:
        couple, bits = codebook
        shape = (heads, head_dim // couple, 1 << bits, couple)
        book = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    mean = torch.randn(heads, head_dim, generator=generator, dtype=torch.float32, device="cpu")
    mean *= size
    return Tables.build(
        order=order, mean=mean, scale=scale, margin=margin, frequency=frequency, codebook=book
    )


@st.composite
def framed_tensors(
    draw: st.DrawFn, role: Role, head_dim: int, page_size: int, heads: int = 2
) -> tuple[Uniform | Codebook | Channelwise, Tables]:
    """Draw a calibrated scheme and its tables: rotary keys, codebooks, fp8, three levels."""
    rotary = role == "key" and draw(st.booleans())
    options: dict[str, Any] = {}
    codebook = None
    if draw(st.booleans()):
        couple = draw(st.sampled_from([c for c in (2, 4, 8) if head_dim % (2 * c) == 0]))
        bits = draw(st.sampled_from((2, 4, 8, 10)))
        codebook, options["couple"], options["bits"] = (couple, bits), couple, bits
        group_size = head_dim
    else:
        grouping = draw(st.sampled_from(("token", "token", "channel")))
        whole = head_dim if grouping == "token" else page_size
        group_size = draw(st.sampled_from([g for g in (4, 16, 32, 64, 128) if whole % g == 0]))
        options |= {
            "bits": draw(st.sampled_from((1, 1.5, 2, 3, 4, 8))),
            "grouping": grouping,
            "group_size": group_size,
            "params": draw(st.sampled_from(("fp16", "fp8"))),
        }
        if options["bits"] == 1.5:
            options["packing"] = draw(st.sampled_from(("fields", "trits")))
        if grouping == "channel":
            group_size = 1
        if not rotary and draw(st.booleans()):
            options["transform"] = "hadamard"
    tables = random_tables(
        heads, head_dim, group_size=group_size, rotary=rotary, codebook=codebook,
        seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip
    return scheme_of(options, tables.digest, rotary), tables


@st.composite
def framed_specs(draw: st.DrawFn, head_dim: int, heads: int = 2) -> CacheSpec:
    """Draw a cache whose keys and values are calibrated."""
    page_size = draw(st.sampled_from((32, 64)))
    key, key_tables = draw(framed_tensors("key", head_dim, page_size, heads))
    value, value_tables = draw(framed_tensors("value", head_dim, page_size, heads))
    sinks, window = draw(st.integers(0, 5)), draw(st.integers(0, 40))
    return CacheSpec(
        *(key, value, sinks, window, page_size), key_tables=key_tables, value_tables=value_tables
    )


@st.composite
def framed_layouts(
    draw: st.DrawFn, role: Role | None = None, heads: int = 2, batch: int = 2,
    head_dims: tuple[int, ...] = (64, 72, 80, 96, 100, 128), page_sizes: tuple[int, ...] = (32, 64),
) -> tuple[Layout, Calibrated]:  # fmt: skip
    """Draw a calibrated layout and what its tokens are quantized relative to."""
    roles: tuple[Role, ...] = ("key", "value")
    chosen: Role = draw(st.sampled_from(roles)) if role is None else role
    head_dim = draw(st.sampled_from(head_dims))
    page_size = draw(st.sampled_from(page_sizes))
    scheme, tables = draw(framed_tensors(chosen, head_dim, page_size, heads))
    regions = Regions(draw(st.integers(0, 5)), draw(st.integers(0, 40)), page_size)
    layout = Layout(chosen, head_dim, regions, scheme)
    shift: Tensor | None = None
    if layout.rotary:
        shift = torch.tensor(
            [draw(st.integers(-9, 9)) for _ in range(batch)], dtype=torch.int32, device="cpu"
        )
    return layout, Calibrated(tables.words, shift)


def turning_tables(head_dim: int, heads: int = 2, seed: int = 0, *, weighs: bool = False) -> Tables:
    """Return tables of keys whose mean turns: channels in pairs, from the fastest, in any order, and frequencies.

    Those that weigh channels have scales from 1 to 32.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack(
        [
            torch.randperm(head_dim, generator=generator, dtype=torch.int64, device="cpu")
            for _ in range(heads)
        ]
    )
    turns = 10000.0 ** -(
        torch.arange(head_dim // 2, dtype=torch.float64, device="cpu") * 2 / head_dim
    )
    frequency = (turns / (2 * math.pi) * 2.0**32).round().long().int()
    scale = torch.rand(heads, head_dim // 2, generator=generator, dtype=torch.float32, device="cpu")
    scale = torch.exp2(5.0 * scale) if weighs else torch.ones_like(scale)
    scale = scale.repeat(1, 2)  # after: exp2 is not the same to the bit in every place of a tensor
    return Tables.build(
        order=order,
        mean=torch.zeros_like(scale),
        scale=scale,
        margin=torch.zeros_like(scale),
        frequency=frequency.expand(heads, -1),
    )
