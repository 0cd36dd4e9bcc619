"""Quantize-on-write of pages whose tokens differ in bits leaves the bytes of the reference.

As `test_kernels_quantize_frames`: kernels run natively where there is a GPU and in Triton's interpreter
elsewhere, the reference always on the CPU.
"""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.reference import mixed
from kvq_compile.kernels.schemes import Adaptive, Mixed
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.triton import backend, mixed_write
from kvq_compile.kernels.triton.constants import WriteConstants
from kvq_compile.testing import changed, mixed_layout
from kvq_compile.testing.small_tables import random_tables
from native import CONVERSIONS, DEVICE, OVERFLOWS, examples
from uncalibrated import mixed_layouts
from written_caches import DTYPES, REOPENING_DTYPES, Caches, full, pieces, spoil

pytestmark = [CONVERSIONS, OVERFLOWS, pytest.mark.usefixtures("wide_tiles")]
EXAMPLES = examples(Fraction(1, 3))


def random_tokens(layout: Layout, tokens: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return tokens of two heads, some of them much larger than others, as a projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, 2, layout.head_dim, generator=generator)
    x *= 0.1 + 4 * torch.rand(1, tokens, 2, 1, generator=generator) ** 4
    return x.to(dtype).transpose(1, 2)


def random_importance(slots: int, seed: int) -> Tensor:
    return torch.rand(1, 2, slots, generator=torch.Generator().manual_seed(seed)) ** 8


@EXAMPLES
@given(st.data())
def test_tokens_leave_the_bytes_of_the_reference_in_whatever_pieces_they_come(
    data: st.DataObject,
) -> None:
    layout = data.draw(mixed_layouts())
    dtype = data.draw(st.sampled_from(DTYPES))
    caches, count = Caches(layout, dtype), full(layout, 2)
    x, importance = random_tokens(layout, count, dtype, 0), random_importance(count + 3, 1)
    if data.draw(st.booleans()):
        importance = importance.mT.contiguous().mT  # heads lie together
    for start, stop in pairwise(pieces(data, layout, count)):
        weights = data.draw(st.sampled_from([None, importance, importance]))
        caches.append(x[:, :, start:stop], start, data.draw(st.booleans()), weights)
    caches.assert_equal()


@EXAMPLES
@given(st.data())
def test_rewriting_from_an_earlier_slot_leaves_the_bytes_of_the_reference(
    data: st.DataObject,
) -> None:
    layout = data.draw(mixed_layouts())
    dtype = data.draw(st.sampled_from(REOPENING_DTYPES))
    caches, count = Caches(layout, dtype), full(layout, 1) + data.draw(st.integers(0, 9))
    importance = random_importance(count, 1)
    caches.append(random_tokens(layout, count, dtype, 0), 0, True, importance)
    # A page is cut open where fewer tokens are left than it has.
    start = data.draw(st.integers(layout.sinks, layout.sinks + 31) | st.integers(0, count))
    tokens = data.draw(st.integers(1, 3))
    caches.append(random_tokens(layout, tokens, dtype, 1), start, data.draw(st.booleans()))
    caches.assert_equal()
    start += tokens
    rest = max(1, full(layout, 1) - start)
    importance = random_importance(start + rest, 2)
    caches.append(random_tokens(layout, rest, dtype, 2), start, False, importance)
    caches.assert_equal()


@EXAMPLES
@given(st.data())
def test_any_element_is_coded_as_the_reference_codes_it(data: st.DataObject) -> None:
    layout = data.draw(mixed_layouts())
    caches = Caches(layout, torch.float32)
    x = random_tokens(layout, full(layout, 1), torch.float32, 0).contiguous()
    spoil(data, x)
    weights = None
    if data.draw(st.booleans()):
        weights = random_importance(x.shape[2], 1)
        slot = data.draw(st.integers(0, x.shape[2] - 1))
        weights[:, :, slot:] *= data.draw(st.sampled_from([0.0, 1.0, 1e-30, float("nan")]))
    caches.append(x, 0, True, weights)
    caches.assert_equal()


@triton.jit
def allocate_kernel(weighted, bits, ranks, N: tl.constexpr, LAYOUT: tl.constexpr):
    where = tl.program_id(0) * N + tl.arange(0, N)
    found = mixed_write.allocate(tl.load(weighted + where), 0.0, LAYOUT)
    tl.store(bits + where, found)
    tl.store(ranks + where, mixed_write.rank(found, LAYOUT))


@EXAMPLES
@given(
    st.integers(0, 3), st.integers(1, 5), st.floats(0, 1),
    st.lists(st.floats(0, 131008, width=32), min_size=64, max_size=64),
)  # fmt: skip
@example(0, 4, 0.5, [0.0] * 64)
@example(1, 7, 0.3, [1.0] * 64)  # all needs are equal
@example(0, 8, 0.9, [2.0**-i for i in range(64)])
@example(0, 3, 0.7, [2.0**-149] * 32 + [2.0**-126] * 32)
def test_a_page_is_given_the_bits_and_the_order_of_the_specification(
    least: int, more: int, share: float, spans: list[float]
) -> None:
    rows = max(1, int(32 * (least + share * more)))
    plain = mixed_layout(rows / 32, 32, 16, min_bits=least, max_bits=least + more, soften=False)
    spec = Mixed(rows / 32, least, least + more, params="fp8", soften=False)
    layout = CacheSpec(spec, spec, 0, 0, 32).layout("key", 16)
    x = torch.tensor(spans).view(2, 32)
    bits, ranks = (torch.empty(2, 32, dtype=torch.int32, device=DEVICE) for _ in range(2))
    allocate_kernel[(2,)](x.to(DEVICE), bits, ranks, N=32, LAYOUT=WriteConstants.of(layout))
    expected = mixed.allocate(x, None, plain)
    assert torch.equal(bits.cpu(), expected)
    assert torch.equal(ranks.cpu(), mixed.rank(expected).int())


@triton.jit
def bound_kernel(ends, bounds, LAYOUT: tl.constexpr):
    where = tl.program_id(0)
    tl.store(bounds + where, mixed_write.bound_at(tl.load(ends + where), LAYOUT))


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("target", [0.0, 0.03])
def test_a_page_is_held_to_the_bound_of_the_specification(role: Any, target: float) -> None:
    spec = Mixed(2, 0, 4, adaptive=Adaptive(target, 300.0) if target else None)
    layout = CacheSpec(spec, spec, 0, 0, 32).layout(role, 16)
    lengths = [1 << k for k in range(6, 31)]
    ends = torch.tensor([32, *(n + step for n in lengths for step in (-1, 0, 1))], device=DEVICE)
    bounds = torch.empty(len(ends), device=DEVICE)
    bound_kernel[(len(ends),)](ends.int(), bounds, LAYOUT=WriteConstants.of(layout))
    assert bounds.tolist() == [layout.bound_at(end) for end in ends.tolist()]


def test_importance_is_looked_up_by_slot() -> None:
    """Of otherwise equal tokens those that matter have more bits, whenever the page is packed."""
    spec = Mixed(2, 0, 4, params="fp8", soften=False)
    layout = CacheSpec(spec, spec, 3, 7, 32).layout("key", 32)
    parts = tuple(part.to(DEVICE) for part in Packed.empty(torch.zeros(1, 1, 1, 32), 2, layout))
    x = torch.linspace(-1, 1, 32).expand(1, 1, 42, 32).contiguous().to(DEVICE)
    heavy = torch.tensor([3, 10, 34])
    importance = torch.full((1, 1, 42), 2.0**-9)
    importance[..., heavy] = 1.0
    backend.append_(parts, UNCALIBRATED, x[:, :, :41], None, 0, layout)
    slot = torch.tensor([41], device=DEVICE)
    backend.append_(parts, UNCALIBRATED, x[:, :, 41:], slot, None, layout, importance.to(DEVICE))
    bits = mixed.unpack(parts[0].cpu(), parts[1].cpu(), layout)[1][0, 0, 0]
    assert bits[heavy - 3].tolist() == [4, 4, 4]
    assert bits.sum() <= 64


def test_tables_are_refused_by_name() -> None:
    tables = random_tables(2, 32, group_size=32, rotary=False, codebook=None, seed=0)
    scheme = Mixed(2, 0, 4, params="fp8", tables=tables.digest)
    layout = Layout("key", 32, Regions(3, 7, 32), scheme)
    x = torch.zeros(1, 2, 1, 32, device=DEVICE)
    with pytest.raises(NotImplementedError, match="tables must be None"):
        backend.append_(Packed.empty(x, 2, layout), Calibrated(tables.words), x, None, 0, layout)


def test_layouts_of_different_bits_do_not_share_a_kernel() -> None:
    spec = Mixed(2, 0, 4, params="fp8")
    layout = CacheSpec(spec, spec).layout("key", 64)
    texts = {
        repr(WriteConstants.of(changed(layout, **change)))
        for change in (
            *({}, {"bits": 3}, {"max_bits": 6}, {"fit": False}, {"soften": False}),
            *({"target": 0.1, "query_norm": 300.0}, {"target": 0.1, "query_norm": 90.0}),
        )
    }
    assert len(texts) == 7
