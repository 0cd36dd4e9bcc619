"""Attention over calibrated caches is as close to the exact one as `error_bound` says, for every coding."""

from dataclasses import replace

import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile import bounds
from kvq_compile.kernels import ops
from kvq_compile.kernels.cpu import backend
from kvq_compile.kernels.packed import Calibrated, Packed
from kvq_compile.kernels.schemes import Codebook, Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import Tables
from kvq_compile.options import make_spec
from kvq_compile.testing import assert_within_bound, bound_for, kv_tensors
from kvq_compile.testing.small_tables import framed_specs, random_tables

HEADS = 2


def attend(query: Tensor, x: list[Tensor], spec: CacheSpec, held: int) -> Tensor:
    """Attend to ``held`` tokens of a cache and to the rest exactly."""
    caches, frames, layouts = [], [], []
    for tokens, role in zip(x, ("key", "value"), strict=True):
        layout, tables = spec.layout(role, tokens.shape[3]), spec.tables(role)
        calibrated = [] if tables is None else [tables.words]
        if layout.rotary:
            calibrated.append(torch.zeros(tokens.shape[0], dtype=torch.int32))
        caches.append(ops.quantize(tokens[:, :, :held], held, False, layout, calibrated))
        frames.append(Calibrated.of(calibrated, layout))
        layouts.append(layout)
    new = [tokens[:, :, held:] for tokens in x]
    parts = [Packed(*cache) for cache in caches]
    return backend.attend(
        query, *new, *parts, *frames, None, None, held, Score(0.125), layouts[0], layouts[1]
    )


def drawn_normal(data: st.DataObject, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    return torch.randn(shape, generator=generator)


@given(st.data())
def test_the_bound_holds_for_calibrated_caches(data: st.DataObject) -> None:
    head_dim = data.draw(st.sampled_from((64, 80)))
    spec = data.draw(framed_specs(head_dim, HEADS))
    held = spec.sinks + spec.window + data.draw(st.integers(0, 2 * spec.page_size))
    x = [data.draw(kv_tensors((1, HEADS, held + 1, head_dim))).clamp(-400, 400) for _ in range(2)]
    query = drawn_normal(data, 1, 2 * HEADS, 1, head_dim) * data.draw(st.sampled_from((0.01, 0.3)))
    output = attend(query, x, spec, held)
    assert_within_bound(output, query, x[0], x[1], spec, held=held, scale=0.125)


def test_the_bound_is_not_empty() -> None:
    """Negative twin: a coding that is worse than the spec says breaks the bound."""
    one = torch.ones(HEADS, 64)
    order = torch.arange(64).expand(HEADS, 64)
    tables = Tables.build(order=order, mean=0 * one, scale=one, margin=0 * one)
    fine = Uniform(8, tables=tables.digest)
    both = {"key_tables": tables, "value_tables": tables}
    coarse = CacheSpec(fine, Uniform(1, tables=tables.digest), 0, 0, 32, **both)
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(1, HEADS, 33, 64, generator=generator) for _ in range(2)]
    query = torch.zeros(1, HEADS, 1, 64)
    off = attend(query, x, coarse, 32) - attend(query, x, replace(coarse, value=fine), 32)
    bound = bound_for(replace(coarse, value=fine), query, *x, scale=0.125, held=32)
    assert float(off.abs().max()) > bound


def test_the_bound_of_a_codebook_is_in_measured_distances() -> None:
    tables = random_tables(HEADS, 64, group_size=64, rotary=False, codebook=(4, 4), seed=0)
    spec = Codebook(4, 4, tables=tables.digest)
    cache = CacheSpec(spec, spec, key_tables=tables, value_tables=tables)
    free = bounds.error_bound(cache).free_symbols
    assert {bounds.KEY_DISTANCE, bounds.VALUE_DISTANCE} <= free
    assert isinstance(bounds.error_bound(cache), sympy.Expr)


@given(st.data(), st.sampled_from((("fitted", 1), ("paper", 0))), st.sampled_from(("fp8", "fp16")))
def test_the_bound_holds_for_mixed_pages(
    data: st.DataObject, kind: tuple[str, int], params: str
) -> None:
    variant, least = kind
    spec = make_spec(
        "qaq", variant=variant, params=params, min_bits=least, sinks=2, window=5, page_size=32
    )
    held = 7 + data.draw(st.integers(0, 70))
    x = [data.draw(kv_tensors((1, HEADS, held + 1, 64))).clamp(-400, 400) for _ in range(2)]
    query = drawn_normal(data, 1, 2 * HEADS, 1, 64) * data.draw(st.sampled_from((0.001, 0.1)))
    assert_within_bound(attend(query, x, spec, held), query, *x, spec, held=held, scale=0.125)
