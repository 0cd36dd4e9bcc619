"""Layouts without tables in all codings that ones with tables may have."""

from hypothesis import strategies as st

from kvq_compile.kernels.frame import Frame
from kvq_compile.kernels.spec import CacheSpec, PageLayout, Role, TensorSpec

Framed = tuple[PageLayout, Frame | None]


@st.composite
def plain_layouts(
    draw: st.DrawFn, role: Role | None = None, head_dims: tuple[int, ...] = (64, 80, 96),
    transforms: tuple[str, ...] = ("none",),
) -> Framed:  # fmt: skip
    bits = draw(st.sampled_from((1, 1.5, 1.5, 2, 3, 4, 8)))
    spec = TensorSpec(
        bits,
        grouping=draw(st.sampled_from(("token", "channel"))),
        group_size=draw(st.sampled_from((None, 16))),
        clip=draw(st.sampled_from((1.0, 0.9))),
        params=draw(st.sampled_from(("fp8", "fp8", "fp16"))),
        packing=draw(st.sampled_from(("fields", "trits"))) if bits == 1.5 else "fields",
        transform=draw(st.sampled_from(transforms)),
    )
    cache = CacheSpec(spec, spec, draw(st.integers(0, 5)), draw(st.integers(0, 40)), 32)
    role = role or draw(st.sampled_from(("key", "value")))
    return cache.layout(role, draw(st.sampled_from(head_dims))), None
