"""What to draw: hypothesis strategies for schemes, layouts, tokens, masks and whole decoders."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels.cache.tensor import Kind
from kvq_compile.kernels.channelwise_scheme import Pairs
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.schemes import (
    Adaptive,
    Channelwise,
    Grouping,
    Mixed,
    Role,
    Transform,
    Uniform,
)
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.methods import UNIFORM
from kvq_compile.testing.small_decoder import LAYOUTS, SPELLINGS, WRITES, Decoder

HEAD_DIMS = (64, 72, 80, 96, 120, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Numbers at which fp16 parameters or fp32 arithmetic change their behaviour: zeros, subnormal in fp16,
# its smallest normal number, its largest.
SPECIAL = (0.0, -0.0, 3e-8, -3e-8, 7e-6, 6.1e-5, -6.1e-5, 1.0, -3.0, 2048.5, 65504.0, -65504.0)


@st.composite
def tensor_specs(draw: st.DrawFn, head_dim: int, page_size: int, transform: bool = True) -> Uniform:
    """Draw how one tensor is quantized, in groups that divide ``head_dim`` or ``page_size``."""
    groupings: tuple[Grouping, ...] = ("token", "channel")
    transforms: tuple[Transform, ...] = ("none", "hadamard") if transform else ("none",)
    grouping = draw(st.sampled_from(groupings))
    whole = head_dim if grouping == "token" else page_size
    sizes = [size for size in (8, 16, 32, 48, 64, 128) if whole % size == 0]
    clip = draw(st.sampled_from((1.0, 0.95, 0.5)))
    return Uniform(
        bits=draw(st.sampled_from((1, 2, 3, 4, 8))),
        grouping=grouping,
        group_size=draw(st.sampled_from((None, *sizes))),
        clip=clip,
        transform=draw(st.sampled_from(transforms)),
        search=clip == 1.0 and draw(st.booleans()),
    )


@st.composite
def specs(draw: st.DrawFn, head_dim: int, transform: bool = True) -> CacheSpec:
    """Draw a cache for heads of ``head_dim`` channels: small regions, so that a short text fills pages."""
    page_size = draw(st.sampled_from((32, 64)))
    return CacheSpec(
        key=draw(tensor_specs(head_dim, page_size, transform)),
        value=draw(tensor_specs(head_dim, page_size, transform)),
        sinks=draw(st.integers(0, 6)),
        window=draw(st.integers(0, 40)),
        page_size=page_size,
    )


@st.composite
def page_layouts(draw: st.DrawFn, transform: bool = True, role: Role | None = None) -> Layout:
    """Draw the layout of one tensor."""
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    roles: tuple[Role, ...] = ("key", "value") if role is None else (role,)
    return draw(specs(head_dim, transform)).layout(draw(st.sampled_from(roles)), head_dim)


@st.composite
def channelwise_layouts(
    draw: st.DrawFn,
    head_dims: tuple[int, ...] = (64, 80, 20, 96, 128, 576),
    page_sizes: tuple[int, ...] = (32, 32, 64),
) -> Layout:
    """Draw the layout of keys whose channels differ in bits; a cache holds queries, or does not."""
    pairs: tuple[Pairs, ...] = ("halves", "neighbours", "none")
    scheme = Channelwise(
        draw(st.sampled_from((0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 8.0)) | st.floats(0.1, 8.0)),
        draw(st.sampled_from(pairs)),
    )
    regions = Regions(
        draw(st.integers(0, 5)), draw(st.integers(0, 40)), draw(st.sampled_from(page_sizes))
    )
    shared_by = draw(st.sampled_from((0, 1, 2, 4)))
    queries = 5 if shared_by else 0
    return Layout("key", draw(st.sampled_from(head_dims)), regions, scheme, queries, shared_by)


def mixed_layout(
    bits: float, page_size: int = 128, head_dim: int = 128, role: Role = "key", **options: Any
) -> Layout:
    """Return the layout of mixed pages without exact tokens; ``options`` are `Mixed`'s."""
    scheme = Mixed(bits, **({"params": "fp8"} | options))
    return Layout(role, head_dim, Regions(0, 0, page_size), scheme)


def changed(layout: Layout, **fields: Any) -> Layout:
    """Return a layout with other fields of its own, of its regions, of its scheme or of `Adaptive`."""

    def named(names: Iterable[str]) -> dict[str, Any]:
        return {name: fields.pop(name) for name in list(fields) if name in names}

    own = named(("role", "head_dim", "queries", "shared_by"))
    regions = replace(layout.regions, **named(("sinks", "window", "page_size")))
    adaptive = named(("target", "query_norm", "requantize", "keep_exact"))
    if adaptive:
        fields["adaptive"] = replace(layout.adaptive or Adaptive(), **adaptive)
    scheme = replace(layout.scheme, **fields)
    return replace(layout, regions=regions, scheme=scheme, **own)


@st.composite
def lengths(draw: st.DrawFn, layout: Layout, pages: int = 3) -> int:
    """Draw a number of tokens that fills up to ``pages`` pages, often one at the edge of a region."""
    edges = [0, 1, layout.sinks, layout.sinks + layout.window]
    edges += [edges[-1] + page * layout.page_size for page in range(1, pages + 1)]
    near = draw(st.sampled_from(edges)) + draw(st.integers(-1, 1))
    return max(0, draw(st.sampled_from((near, draw(st.integers(0, edges[-1]))))))


@st.composite
def kv_tensors(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, finite: bool = True
) -> Tensor:
    """Draw tokens ``shape``: channels and tokens of different size, some elements set to nasty numbers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    x = x * (
        torch.rand(shape[-1], generator=generator, dtype=torch.float32, device="cpu") * 4
        + draw(st.sampled_from((0.0, 0.0, 5.0, 300.0)))
    )
    x = x + torch.randn(shape[-1], generator=generator, dtype=torch.float32, device="cpu") * draw(
        st.sampled_from((0.0, 0.0, 3.0))
    )
    numbers = st.sampled_from(SPECIAL) | st.floats(-65504.0, 65504.0, width=16)
    if not finite:
        numbers |= st.sampled_from((math.nan, math.inf, -math.inf, 7e4, -1e30))
    flat = x.view(-1)
    for _ in range(draw(st.integers(0, 4)) if flat.numel() else 0):
        first, count = draw(st.integers(0, flat.numel() - 1)), draw(st.sampled_from((1, shape[-1])))
        flat[first : first + count] = draw(numbers)
    return x.clamp(-65504.0, 65504.0).to(dtype) if finite else x.to(dtype)


@st.composite
def masks(draw: st.DrawFn, batch: int, heads: int, tokens: int, slots: int) -> Tensor | None:
    """Draw a mask for queries that are the last ``tokens`` of ``slots``: none, boolean or additive.

    It is causal, or hides slots at random, or pads on the left; it broadcasts over any of its dimensions.
    Each query sees at least the first or its own slot.
    """
    kind = draw(st.sampled_from(("none", "bool", "additive")))
    if kind == "none":
        return None
    shape = draw(st.sampled_from(((), (1, 1), (batch, 1), (1, heads), (batch, heads))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    own = torch.eye(tokens, slots, dtype=torch.float32, device="cpu").roll(slots - tokens, 1).bool()
    seen = torch.ones(*shape, tokens, slots, dtype=torch.bool, device="cpu")
    if draw(st.booleans()):
        seen = seen.tril(slots - tokens)
    if draw(st.booleans()):
        seen &= torch.rand(
            seen.shape, generator=generator, dtype=torch.float32, device="cpu"
        ) < draw(st.sampled_from((0.1, 0.9)))
    if draw(st.booleans()):
        seen[..., : draw(st.integers(0, slots))] = False
    seen |= own
    if kind == "bool":
        return seen
    bias = torch.randn(seen.shape, generator=generator, dtype=torch.float32, device="cpu") * draw(
        st.sampled_from((0.0, 2.0))
    )
    return bias.masked_fill(
        ~seen, draw(st.sampled_from((-math.inf, torch.finfo(torch.float32).min)))
    )


@st.composite
def decoders(draw: st.DrawFn) -> Decoder:
    """Draw a `Decoder`: layers, heads, head dimension, dtype, kind and layout of cache, method, lengths, masks."""
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    kv, shared = draw(st.sampled_from(((1, 1), (1, 4), (2, 1), (2, 3))))
    kinds: tuple[Kind, ...] = ("grown", "static")
    kind = draw(st.sampled_from(kinds))
    mask_kind = draw(
        st.sampled_from(("none", "bool", "additive") if kind == "grown" else ("bool", "additive"))
    )
    prompt = draw(st.integers(2, 110))
    more = draw(st.lists(st.sampled_from((1, 1, 2, 33)), min_size=2, max_size=4))
    padding = draw(st.sampled_from(((0,), (0, 0), (3, 0), (0, prompt))))
    options: dict[str, Any] = {"method": draw(st.sampled_from(sorted(UNIFORM)))}
    if options["method"] != "kivi" and draw(st.booleans()):
        options["transform"] = "hadamard"
    options["group_size"] = draw(st.sampled_from([g for g in (8, 16, 32) if head_dim % g == 0]))
    options["key_bits"], options["value_bits"] = draw(
        st.sampled_from(((None, None), (4, 2), (1, 8)))
    )
    options |= {
        "sinks": draw(st.integers(0, 5)),
        "window": draw(st.sampled_from((0, 7, 32))),
        "page_size": 32,
    }
    return Decoder(
        layers=draw(st.integers(1, 2)),
        heads=(kv * shared, kv),
        head_dim=head_dim,
        dtype=draw(st.sampled_from(DTYPES)),
        kind=kind,
        chunks=(prompt, *more),
        padding=padding if mask_kind != "none" else (0,) * len(padding),
        mask_kind=mask_kind,
        options=options,
        seed=draw(st.integers(0, 2**16)),
        layout=draw(st.sampled_from(LAYOUTS)),
        spelling=draw(st.sampled_from(sorted(SPELLINGS))),
        write=draw(st.sampled_from(sorted(WRITES))),
    )
