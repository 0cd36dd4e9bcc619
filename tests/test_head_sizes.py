"""Heads of any size are served by every method on every device, with the bits of the specification."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvq_compile import make_spec
from kvq_compile.kernels import reference
from kvq_compile.kernels.cpu import backend as cpu
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.reference import backend as specification
from kvq_compile.kernels.schemes import Mixed, Role, Scheme, Uniform, scheme_of
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import PAGE_ELEMENTS
from kvq_compile.kernels.triton import backend as triton
from kvq_compile.kernels.words import WORD_BITS
from kvq_compile.testing.small_tables import random_tables
from native import CONVERSIONS, DEVICE, OVERFLOWS, frame_on_device
from thorough import spread
from written_caches import calibrated, unsigned_zeros

pytestmark = [CONVERSIONS, OVERFLOWS, pytest.mark.usefixtures("wide_tiles")]
METHODS = ("int8", "int4", "int3", "int2", "kivi", "qaq")
HEAD_DIMS = (4, 8, 12, 20, 24, 40, 72, 80, 96, 100, 104, 120, 256, 320, 576)
ROLES: tuple[Role, ...] = ("key", "value")
HEADS, SHARED, HELD = 2, 2, 43  # the tokens fill a page of 32


def layouts_of(method: str, head_dim: int, **options: Any) -> list[Layout]:
    spec = make_spec(method, sinks=3, window=4, page_size=32, **options)
    return [spec.layout(role, head_dim, SHARED) for role in ROLES]


def random_tokens(heads: int, tokens: int, head_dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(1, heads, tokens, head_dim, generator=generator)
    return x * (0.1 + 4 * torch.rand(1, heads, tokens, 1, generator=generator) ** 4)


def assert_served(layouts: list[Layout], frames: list[Calibrated]) -> None:
    """Assert that every device writes, reads and attends to keys and values as the specification does."""
    head_dim = layouts[0].head_dim
    new = [random_tokens(HEADS, 1, head_dim), random_tokens(HEADS, 1, head_dim)]
    query = random_tokens(HEADS * SHARED, 1, head_dim)
    parts: dict[Any, list[Packed]] = {specification: [], cpu: [], triton: []}
    for layout, frame in zip(layouts, frames, strict=True):
        x = random_tokens(HEADS, HELD, head_dim)
        for backend, written in parts.items():
            device = DEVICE if backend is triton else "cpu"
            own = frame_on_device(frame) if backend is triton else frame
            cache = Packed(*(part.to(device) for part in Packed.empty(x, 2, layout)))
            backend.append_(cache, own, x.to(device), None, 0, layout)
            read = backend.dequantize(cache, own, HELD, layout)
            written.append(Packed(*(part.cpu() for part in cache)))
            expected = parts[specification][-1]
            packed = zip(written[-1][:2], expected[:2], strict=True)
            assert all(
                torch.equal(*(unsigned_zeros(part[:, :, :1], layout) for part in pair))
                for pair in packed
            )
            assert torch.equal(read.cpu(), reference.read(*expected, HELD, layout, frame))
    about = None, None, HELD, Score(head_dim**-0.5), *layouts
    exact = specification.attend(query, *new, *parts[specification], *frames, *about)
    for backend, written in parts.items():
        device = DEVICE if backend is triton else "cpu"
        own = [frame_on_device(frame) for frame in frames] if backend is triton else frames
        tensors = [x.to(device) for x in (query, *new)]
        caches = [Packed(*(part.to(device) for part in cache)) for cache in written]
        out = backend.attend(*tensors, *caches, *own, *about).cpu()
        error = 1e-4
        if device == "cuda" and head_dim > 512:  # multiplied in fp16, or tiles would not fit
            held = [
                reference.read(*cache, HELD, layout, frame)
                for cache, layout, frame in zip(parts[specification], layouts, frames, strict=True)
            ]
            tokens = [torch.cat(pair, 2).half() for pair in zip(held, new, strict=True)]
            plain = reference.softmax_attention(query.half(), *tokens, None, about[3], None)
            error += 3 * float((plain.float() - exact).abs().max())
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=error)


@pytest.mark.long(but=["qaq-320", "int3-24", "int8-4", "int4-120", "int2-20"])
@pytest.mark.parametrize(("method", "head_dim"), spread(METHODS, HEAD_DIMS, 6))
def test_every_method_serves_heads_of_every_size_on_every_device(
    method: str, head_dim: int
) -> None:
    assert_served(layouts_of(method, head_dim), [UNCALIBRATED] * 2)


SCHEMES: list[Scheme] = [
    Uniform(3, "channel", 16, params="fp8"),
    Uniform(1, group_size=4),
    Uniform(1.5, packing="trits"),
    Mixed(3.5, 1, 6, outliers=4),
    Mixed(2.5, 0, 8, outliers=2, params="fp8"),
]


@pytest.mark.long(but=["scheme2-100", "scheme0-12", "scheme3-72"])
@pytest.mark.parametrize(("scheme", "head_dim"), spread(SCHEMES, [12, 20, 72, 100, 576], 5))
def test_every_scheme_serves_rows_that_fill_no_whole_words(scheme: Scheme, head_dim: int) -> None:
    layouts = [Layout(role, head_dim, Regions(3, 4, 32), scheme) for role in ROLES]
    assert_served(layouts, [UNCALIBRATED] * 2)


CALIBRATED = [{"bits": 3}, {"bits": 2, "couple": 2}, {"bits": 9, "couple": 4}]


@pytest.mark.long(but=["options0-8", "options1-72", "options2-40"])
@pytest.mark.parametrize(("options", "head_dim"), spread(CALIBRATED, [8, 24, 40, 72, 120], 3))
def test_calibrated_rotary_keys_of_every_size_are_served(
    options: dict[str, int], head_dim: int
) -> None:
    about: dict[str, Any] = {"group_size": head_dim, "seed": 0, "codebook": None}
    if "couple" in options:
        about["codebook"] = options["couple"], options["bits"]
    tables = [random_tables(HEADS, head_dim, rotary=role == "key", **about) for role in ROLES]
    layouts, frames = [], []
    for role, table in zip(ROLES, tables, strict=True):
        scheme = scheme_of(options, table.digest, rotary=role == "key")
        layouts.append(Layout(role, head_dim, Regions(3, 4, 32), scheme))
        frames.append(calibrated(layouts[-1], table))
    assert_served(layouts, frames)


@given(st.sampled_from(METHODS), st.integers(1, 600), st.sampled_from(ROLES))
def test_bits_count_the_padding_of_rows(method: str, head_dim: int, role: Role) -> None:
    """A row is longer than its codes by less than the codes that fill a word of its narrowest plane."""
    layout = layouts_of(method, head_dim)[ROLES.index(role)]
    cache = Packed.empty(torch.empty(1, 1, 1, head_dim), 1, layout)
    held = sum(part.numel() * part.element_size() for part in (cache.codes, cache.params))
    assert layout.bits_per_element == 8 * held / (layout.page_size * head_dim)
    groups, members = layout.params_shape
    params = 8 * cache.params.element_size() * groups * members * layout.param_elements
    codes = 8 * held - params
    if isinstance(layout.scheme, Mixed):
        rows, width, header = layout.code_rows, 1, 8 * WORD_BITS
    else:
        rows, width, header = layout.rows, sum(layout.planes), 0
    length = head_dim if role == "key" or isinstance(layout.scheme, Mixed) else layout.page_size
    unpadded = rows * length * width
    assert unpadded <= codes - header < unpadded + rows * WORD_BITS * width


@pytest.mark.parametrize("head_dim", [256, 257])
def test_an_outlier_may_be_in_any_channel(head_dim: int) -> None:
    """One byte names a channel of up to 256, two bytes any."""
    layout = Layout("key", head_dim, Regions(0, 0, 32), Mixed(2, outliers=2))
    x = torch.randn(1, 1, 32, head_dim, generator=torch.Generator().manual_seed(0))
    x[..., -1], x[..., 0] = 100.0, -100.0
    cache = Packed.empty(x, 1, layout)
    specification.append_(cache, UNCALIBRATED, x, None, 0, layout)
    read = specification.dequantize(cache, UNCALIBRATED, 32, layout)
    assert torch.equal(read[..., [0, -1]], x[..., [0, -1]])
    assert layout.params_shape[0] == layout.mixed.rank_field + 1 + 2 * (3 + (head_dim > 256))


@pytest.mark.parametrize("method", [*METHODS, "tc"])
@given(st.integers(1, 1024), st.integers(1, 1024), st.sampled_from([32, 64, 128, 256]))
def test_pages_of_large_heads_have_fewer_tokens_and_no_more_than_a_gpu_can_hold(
    method: str, head_dim: int, other: int, page_size: int
) -> None:
    """Keys and values have pages of one size; those of up to 128 channels are as large as was asked for."""
    spec, widest = make_spec(method, page_size=page_size), max(head_dim, other)
    sizes = {
        spec.layout(role, dim, 0, widest).page_size
        for role, dim in zip(ROLES, (head_dim, other), strict=True)
        if method != "tc" or dim % 2 == 0
    }
    padded = 1 << (widest - 1).bit_length()
    assert all(size == 32 or size * padded <= PAGE_ELEMENTS for size in sizes)
    assert len(sizes) <= 1 and (padded > 128 or sizes <= {page_size})
