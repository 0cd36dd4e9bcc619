"""Layouts without tables: in all codings that ones with tables may have, and of tokens that differ in bits."""

from typing import Any

from hypothesis import strategies as st

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated
from kvq_compile.kernels.schemes import Adaptive, Mixed, Role, Uniform
from kvq_compile.kernels.spec import CacheSpec

Framed = tuple[Layout, Calibrated]


@st.composite
def plain_layouts(
    draw: st.DrawFn, role: Role | None = None, head_dims: tuple[int, ...] = (8, 20, 64, 72, 80, 96, 120),
    transforms: tuple[str, ...] = ("none",),
) -> Framed:  # fmt: skip
    bits = draw(st.sampled_from((1, 1.5, 1.5, 2, 3, 4, 8)))
    clip = draw(st.sampled_from((1.0, 1.0, 0.9)))
    spec = Uniform(
        bits,
        grouping=draw(st.sampled_from(("token", "channel"))),
        group_size=draw(st.sampled_from((None, 16))),
        up_to=True,
        clip=clip,
        search=clip == 1.0 and draw(st.booleans()),
        params=draw(st.sampled_from(("fp8", "e5m3", "fp16"))),
        packing=draw(st.sampled_from(("fields", "trits"))) if bits == 1.5 else "fields",
        transform=draw(st.sampled_from(transforms)),
    )
    cache = CacheSpec(spec, spec, draw(st.integers(0, 5)), draw(st.integers(0, 40)), 32)
    role = role or draw(st.sampled_from(("key", "value")))
    return cache.layout(role, draw(st.sampled_from(head_dims))), UNCALIBRATED


@st.composite
def mixed_layouts(
    draw: st.DrawFn, role: Role | None = None, head_dims: tuple[int, ...] = (8, 16, 20, 32, 64, 72, 80, 104, 320),
    page_sizes: tuple[int, ...] = (32, 32, 64), **fixed: Any,
) -> Layout:  # fmt: skip
    least = draw(st.integers(0, 3))
    most = draw(st.integers(least + 1, 8))
    page = draw(st.sampled_from(page_sizes))
    rows = draw(st.integers(max(1, page * least), page * most))
    options: dict[str, Any] = {
        "params": draw(st.sampled_from(["fp8", "fp16"])),
        "outliers": draw(st.sampled_from([0, 0, 2, 4])),
        "fit": draw(st.booleans()),
        "soften": draw(st.booleans()),
        "attentive": draw(st.sampled_from([True, True, False])),
    }
    target = draw(st.sampled_from([0.0, 0.0, 1e-3, 0.1]))
    if target:
        options["adaptive"] = Adaptive(target, 30.0)
    spec = Mixed(rows / page, least, most, **options | fixed)
    cache = CacheSpec(spec, spec, draw(st.integers(0, 5)), draw(st.integers(0, 40)), page)
    role = role or draw(st.sampled_from(("key", "value")))
    return cache.layout(role, draw(st.sampled_from(head_dims)))
