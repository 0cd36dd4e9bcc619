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
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from kvq_compile import bounds
from kvq_compile.history import watching
from kvq_compile.kernels import reference
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated
from kvq_compile.kernels.reference.tables import to_coded
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import Tables
from kvq_compile.kernels.transform import hadamard
from kvq_compile.loading import cache_argument
from kvq_compile.testing.small_decoder import Decoder
from kvq_compile.testing.strategies import (
    DTYPES,
    HEAD_DIMS,
    SPECIAL,
    changed,
    channelwise_layouts,
    decoders,
    kv_tensors,
    lengths,
    masks,
    mixed_layout,
    page_layouts,
    specs,
    tensor_specs,
)

__all__ = [
    "DTYPES",
    "HEAD_DIMS",
    "SPECIAL",
    "Decoder",
    "assert_decodes_like",
    "assert_logits_close",
    "assert_matches_dequantized",
    "assert_within_bound",
    "bound_for",
    "changed",
    "channelwise_layouts",
    "decoders",
    "kv_tensors",
    "lengths",
    "masks",
    "mixed_layout",
    "page_layouts",
    "plain_cache",
    "rounding_bound",
    "rounding_error",
    "specs",
    "tensor_specs",
]


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
    widest = max(key.shape[3], value.shape[3])
    layouts = (
        spec.layout("key", key.shape[3], 0, widest),
        spec.layout("value", value.shape[3], 0, widest),
    )
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
