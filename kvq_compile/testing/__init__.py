"""Check quantized attention on your own model: assertions with derived tolerances, and what to draw.

Needs the ``test`` extra (``pip install "kvq-compile[test]"``). The strategies feed `hypothesis`; the
assertions need no hypothesis and take tensors that any test has at hand.

**Two questions, two tolerances.** Quantizing changes the output of an attention by up to
`bounds.error_bound`, which has nothing to do with how it is computed. Computing it in floating point adds
rounding, which has nothing to do with quantizing. So

- `assert_within_bound` compares with attention over the *exact* tokens: the error bound and rounding;
- `assert_matches_dequantized` compares with attention over what the cache *stands for*: rounding alone.

*Rounding* is measured against attention in fp64: at most twice the error of plain attention in the dtype of
the model, as any flash-style kernel of that dtype has, plus what fp32 arithmetic in any order may add
(`rounding_bound`), so that a lucky plain attention fails nobody.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from kvq_compile import bounds
from kvq_compile.history import watching
from kvq_compile.kernels import reference
from kvq_compile.kernels.cache.tensor import Kind, QuantizedKV
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated
from kvq_compile.kernels.reference.tables import to_coded
from kvq_compile.kernels.schemes import (
    Adaptive,
    Grouping,
    Mixed,
    Role,
    Transform,
    Uniform,
)
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import Tables
from kvq_compile.kernels.transform import hadamard
from kvq_compile.loading import cache_argument
from kvq_compile.methods import UNIFORM
from kvq_compile.testing.small_decoder import Decoder

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Numbers at which fp16 parameters or fp32 arithmetic change their behaviour: zeros, subnormal in fp16,
# its smallest normal number, its largest.
SPECIAL = (0.0, -0.0, 3e-8, -3e-8, 7e-6, 6.1e-5, -6.1e-5, 1.0, -3.0, 2048.5, 65504.0, -65504.0)


# Tolerances


def rounding_bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    bias: float = 0.0,
    rotated: bool = False,
) -> float:
    """Bound the error of attention computed in fp32, in any order, and rounded to the dtype of ``query``.

    With ``u = 2^-24``: a score is a sum of ``D`` products, scaled, added to a bias and to minus the largest
    score, so it is off by ``d = (D + 8) u (scale |q| |k| + bias)``, and an exponential by ``4 u`` more,
    relatively. By the argument of `bounds` weights in sum are off by ``2 tanh(d + 4 u)``, before sums over
    ``S`` tokens add ``2 (S + 8) u``. Rotating adds an fp32 product of ``D`` terms to query and output.

    Args:
        query, key, value: ``[B, Hq, T, D]``, ``[B, Hkv, S, D]``, ``[B, Hkv, S, Dv]``, finite.
        scale: Factor on the scores.
        bias: Largest magnitude of an additive mask, where it does not hide.
        rotated: Whether tokens are quantized in a rotated basis.
    """
    unit, D, S = 2.0**-24, query.shape[3], key.shape[2]
    norms = float(query.double().norm(dim=-1).max()) * float(key.double().norm(dim=-1).max())
    terms = D + 8 + (2 * D**1.5 if rotated else 0)
    scores = unit * (terms * abs(scale) * norms + (D + 8) * bias)
    sums = unit * (2 * (S + 8) + (2 * D**1.5 if rotated else 0))
    largest = float(value.double().abs().max())
    dtype = torch.finfo(query.dtype)
    result = largest * dtype.eps / 2 + dtype.smallest_normal * dtype.eps
    return largest * (2 * math.tanh(scores + 4 * unit) + sums) + result


def rounding_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    rotated: bool = False,
) -> float:
    """Return how far attention may be from fp64 for rounding alone: the measured and the derived part.

    The measured part is twice the largest error of plain attention in the dtype of ``query``; where that
    overflows, `rounding_bound` with the unit of that dtype takes its place.
    """
    exact = _attention64(query, key, value, mask, scale)
    tokens = key.to(query.dtype), value.to(query.dtype)
    bias = 0.0
    if mask is not None and mask.dtype != torch.bool:
        shown = mask[mask > -1e4]
        bias = float(shown.abs().max()) if shown.numel() else 0.0
        mask = mask.to(query.dtype)
    plain = reference.softmax_attention(query, *tokens, mask, scale).double()
    derived = rounding_bound(query, key, value, scale, bias=bias, rotated=rotated)
    error = float((plain - exact).abs().max())
    if not math.isfinite(error):
        error = derived * torch.finfo(query.dtype).eps / 2.0**-23
    return 2 * error + derived


def bound_for(
    spec: CacheSpec, query: Tensor, key: Tensor, value: Tensor, *, scale: float, held: int
) -> float:
    """Evaluate `bounds.error_bound` for one call of an attention.

    Args:
        spec: How the cache is kept.
        query: ``[B, Hq, T, D]``.
        key, value: All exact tokens, those of the call included, ``[B, Hkv, S, D]``; finite, and within the
            range of fp16.
        scale: Factor on the scores.
        held: Tokens in the cache before the call; as many as fill pages are packed.
    """
    layouts = spec.layout("key", key.shape[3]), spec.layout("value", value.shape[3])
    pages = layouts[0].pages_at(held)
    if pages == 0:
        return 0.0
    numbers = {
        bounds.QUERY_NORM: float(query.double().norm(dim=-1).max()),
        bounds.SCALE: abs(scale),
        bounds.HEAD_DIM: max(key.shape[3], value.shape[3]),
        bounds.VALUE_SPREAD: float((value.amax(2).double() - value.amin(2).double()).max()),
    }
    names = (
        (bounds.KEY_RANGE, bounds.KEY_MAX, bounds.KEY_DISTANCE),
        (bounds.VALUE_RANGE, bounds.VALUE_MAX, bounds.VALUE_DISTANCE),
    )
    both = spec.key_tables, spec.value_tables
    for x, layout, tables, symbols in zip((key, value), layouts, both, names, strict=True):
        packed = x[:, :, layout.sinks : layout.sinks + pages * layout.page_size]
        numbers |= _measured(packed.unflatten(2, (pages, -1)), layout, tables, symbols)
    return float(bounds.error_bound(spec).evalf(subs=numbers))


def _measured(
    pages: Tensor, layout: Layout, tables: Tables | None, symbols: tuple[Any, Any, Any]
) -> dict[Any, float]:
    """Return range, magnitude and distance of pages ``[B, H, P, N, D]`` in the basis in which they are quantized."""
    span, largest, distance = symbols
    calibrated = UNCALIBRATED
    if tables is not None:
        shift = (
            torch.zeros(pages.shape[0], dtype=torch.int32, device="cpu") if layout.rotary else None
        )
        calibrated = Calibrated(tables.on(pages.device), shift)
    if tables is None:
        coded = pages.double()
        if layout.transform == "hadamard":
            coded = coded @ hadamard(layout.head_dim, pages.device).double()
    else:
        coded = to_coded(pages.float(), layout, calibrated, layout.sinks).double()
    numbers = {largest: float(coded.abs().max())}
    if tables is not None:
        mean = calibrated.section("mean", layout) * calibrated.section("inverse", layout)
        numbers[largest] += float(mean.abs().max())
    if not bounds.is_derived(layout.scheme):
        codes, params = reference.quantize_pages(pages, layout, calibrated, layout.sinks)
        off = coded - reference.coded_values(codes, params, layout, calibrated).double()
        size = off.norm(dim=-1) if layout.role == "key" else off.abs()
        numbers[distance] = float(size.max())
    else:
        groups = reference.to_groups(coded, layout)
        numbers[span] = float((groups.amax(-1) - groups.amin(-1)).max())
    return numbers


# Assertions


def assert_within_bound(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: CacheSpec,
    *,
    held: int,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Assert that an attention over a quantized cache is as close to the exact one as `error_bound` says.

    Args:
        output: What the compiled attention returned, ``[B, Hq, T, Dv]``.
        query: ``[B, Hq, T, D]``.
        key, value: Every token it attends to before quantizing, ``[B, Hkv, S, D]``: the ``held`` tokens of
            the cache and those of the call.
        spec: How the cache is kept.
        held: Tokens in the cache before the call.
        mask: As the attention took it; columns from ``S`` on are ignored.
        scale: Factor on the scores; ``1 / sqrt(D)`` if none is given.
    """
    __tracebackhide__ = True
    scale = query.shape[3] ** -0.5 if scale is None else scale
    mask = None if mask is None else mask[..., : key.shape[2]]
    rotated = "hadamard" in (spec.key.transform, spec.value.transform)
    bound = bound_for(spec, query, key, value, scale=scale, held=held)
    rounding = rounding_error(query, key, value, mask, scale, rotated=rotated)
    exact = _attention64(query, key, value, mask, scale)
    what = f"error bound {bound:.3g} + rounding {rounding:.3g}"
    _assert_close(output, exact, bound + rounding, what)


def assert_matches_dequantized(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    caches: tuple[QuantizedKV, QuantizedKV] | None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Assert that an attention over a quantized cache is that over its dequantized tokens, up to rounding.

    Args:
        output: What the compiled attention returned, ``[B, Hq, T, Dv]``.
        query: ``[B, Hq, T, D]``.
        key, value: The tokens of the call, which it sees exactly, ``[B, Hkv, Tn, D]``.
        caches: Keys and values as they were *before* the call (``clone()`` them first); ``None``: empty.
        mask: As the attention took it; columns beyond the last token are ignored.
        scale: Factor on the scores; ``1 / sqrt(D)`` if none is given.
    """
    __tracebackhide__ = True
    scale = query.shape[3] ** -0.5 if scale is None else scale
    rotated = False
    if caches is not None:
        history = [cache.to(torch.float32).dequantize()[:, :, : cache.held()] for cache in caches]
        key, value = torch.cat([history[0], key], 2), torch.cat([history[1], value], 2)
        rotated = any(cache.page_layout.transform == "hadamard" for cache in caches)
    mask = None if mask is None else mask[..., : key.shape[2]]
    rounding = rounding_error(query, key, value, mask, scale, rotated=rotated)
    _assert_close(output, _attention64(query, key, value, mask, scale), rounding, "rounding")


def assert_decodes_like(
    model: nn.Module, input_ids: Tensor, *, options: dict[str, Any] | None = None, chunk: int = 1
) -> None:
    """Assert that a transformers model decodes on a quantized cache as it does on its dequantized one.

    The first half of ``input_ids`` is prefilled, the rest is fed ``chunk`` tokens at a time, whatever the
    model predicts. Each call is repeated, uncompiled, on a plain cache that holds the dequantized tokens.
    The logits of the two may differ by rounding: see `assert_logits_close`.

    Args:
        model: A causal language model that grows a ``DynamicCache``; in evaluation mode.
        input_ids: ``[B, S]``.
        options: As in ``torch.compile(model, backend="kvq", options=...)``.
        chunk: Tokens a call.
    """
    __tracebackhide__ = True
    exact, dtype = deepcopy(model).double(), next(model.parameters()).dtype
    compiled = torch.compile(
        model.forward, backend="kvq", options={"strict": True, **(options or {})}
    )
    half = input_ids.shape[1] // 2
    pieces = [input_ids[:, :half], *input_ids[:, half:].split(chunk, 1)]
    cache: Any = None
    name = cache_argument(model)
    with torch.no_grad(), watching() as graphs:
        for piece in pieces:
            plain = [plain_cache(cache, kind) for kind in (dtype, torch.float64)]
            got = compiled(input_ids=piece, use_cache=True, **{name: cache})
            expected, wanted = (
                m(input_ids=piece, **{name: c}).logits
                for m, c in zip((model, exact), plain, strict=True)
            )
            cache = getattr(got, name)
            assert_logits_close(got.logits, expected, wanted, layers=len(cache.layers))
    assert graphs, "nothing was compiled: the call went around the compiled code"


def assert_logits_close(logits: Tensor, expected: Tensor, exact: Tensor, *, layers: int) -> None:
    """Assert that logits are those of a model up to rounding.

    That is four times the largest difference between the model in its own dtype and in fp64 (once for each
    of the two that are compared, doubled since the order of operations differs), plus one unit in the last
    place of the largest logit a layer.

    Args:
        logits: What is tested, ``[B, T, V]``.
        expected: Of the model in its own dtype, which gives the unit in the last place.
        exact: Of the same model, over the same cache, in fp64.
        layers: Number of layers of the model.
    """
    __tracebackhide__ = True
    unit = torch.finfo(expected.dtype).eps * float(exact.abs().max()) * layers
    rounding = 4 * float((expected.double() - exact).abs().max()) + unit
    _assert_close(logits, exact, rounding, "rounding")


def plain_cache(cache: Any, dtype: torch.dtype) -> Any:
    """Return a ``DynamicCache`` of ``dtype`` with the tokens that ``cache`` stands for."""
    from transformers import DynamicCache

    plain = DynamicCache()
    for index, layer in enumerate(cache.layers if cache is not None else ()):
        tokens = [getattr(layer, name).to(dtype) for name in ("keys", "values")]
        dense = [x.dequantize() if isinstance(x, QuantizedKV) else x.clone() for x in tokens]
        plain.update(*dense, index)
    return plain


def _attention64(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return reference.softmax_attention(query.double(), key.double(), value.double(), mask, scale)


def _assert_close(output: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    __tracebackhide__ = True
    assert output.shape == exact.shape, (
        f"shape={list(output.shape)}, but must be {list(exact.shape)}"
    )
    error = float((output.double() - exact).abs().max()) if output.numel() else 0.0
    assert error <= tolerance, f"error={error:.4g}, but must be at most {tolerance:.4g} ({what})"


# What to draw


@st.composite
def tensor_specs(draw: st.DrawFn, head_dim: int, page_size: int, transform: bool = True) -> Uniform:
    """Draw how one tensor is quantized, in groups that divide ``head_dim`` or ``page_size``."""
    groupings: tuple[Grouping, ...] = ("token", "channel")
    transforms: tuple[Transform, ...] = ("none", "hadamard") if transform else ("none",)
    grouping = draw(st.sampled_from(groupings))
    whole = head_dim if grouping == "token" else page_size
    sizes = [size for size in (8, 16, 32, 48, 64, 128) if whole % size == 0]
    return Uniform(
        bits=draw(st.sampled_from((1, 2, 3, 4, 8))),
        grouping=grouping,
        group_size=draw(st.sampled_from((None, *sizes))),
        clip=draw(st.sampled_from((1.0, 0.95, 0.5))),
        transform=draw(st.sampled_from(transforms)),
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
    """Draw a `Decoder`: layers, heads, head dimension, dtype, kind of cache, method, lengths, masks."""
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
    )
