"""Keys and values written at once leave the bytes that each leaves alone.

Kernels run natively where there is a GPU and in Triton's interpreter elsewhere. The reference always runs on the CPU.
"""

from fractions import Fraction
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import ops
from kvq_compile.kernels.cpu import backend as cpu
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.reference import backend as specification
from kvq_compile.kernels.schemes import Channelwise, Mixed, Scheme, Uniform, scheme_of
from kvq_compile.kernels.spec import QUERIES
from kvq_compile.kernels.tables import Tables
from kvq_compile.kernels.triton import append, backend
from kvq_compile.testing.small_tables import random_tables
from native import CONVERSIONS, DEVICE, NATIVE, OVERFLOWS, examples
from written_caches import Caches, calibrated, full

pytestmark = [CONVERSIONS, OVERFLOWS]
EXAMPLES = examples(Fraction(1, 3))
DIM, REGIONS = 64, Regions(2, 5, 32)
Side = tuple[Scheme, Tables | None]


def tabled(codebook: tuple[int, int] | None = None, rotary: bool = True, **options: int) -> Side:
    tables = random_tables(2, DIM, group_size=DIM, rotary=rotary, codebook=codebook, seed=0)
    return scheme_of(dict(options), tables.digest, rotary), tables


TURNED = Uniform(2, transform="hadamard", params="e5m3")
SIDES: dict[str, tuple[Side, Side]] = {
    "int4": ((Uniform(4), None), (Uniform(4), None)),
    "kivi": ((Uniform(2, "channel", 32), None), (Uniform(2, "token", 32), None)),
    "tc": ((Channelwise(2.5), None), (TURNED, None)),
    "qaq": ((Mixed(2.5, 1, 4), None), (Mixed(1.5, 0, 4), None)),
    "skvq": (tabled(bits=2), tabled(bits=2, rotary=False)),
    "cq": (tabled((4, 8), bits=8, couple=4), tabled((4, 8), rotary=False, bits=8, couple=4)),
}


def layouts_of(name: str) -> list[Layout]:
    roles = ("key", "value")
    return [
        Layout(role, DIM, REGIONS, scheme, QUERIES, 2)
        for role, (scheme, _) in zip(roles, SIDES[name], strict=True)
    ]


def pair_of(name: str, dtype: torch.dtype, batch: int = 1) -> list[Caches]:
    """Return empty caches of keys and values, each kept twice."""
    return [
        Caches(layout, dtype, calibrated(layout, tables), batch)
        for layout, (_, tables) in zip(layouts_of(name), SIDES[name], strict=True)
    ]


def drawn(seed: int, heads: int, tokens: int, dtype: torch.dtype, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, heads, DIM, generator=generator).to(dtype).transpose(1, 2)


def write(pair: list[Caches], start: int, tokens: int, by_position: bool, seed: int) -> None:
    """Write tokens into both caches at once, and into those of the specification one after the other."""
    batch, dtype = pair[0].batch, pair[0].expected.exact.dtype
    new = [drawn(seed + i, 2, tokens, dtype, batch) for i in range(2)]
    query = drawn(seed + 2, 4, tokens, dtype, batch) if pair[0].layout.queries else None
    weights = None
    if pair[0].layout.attentive:
        weights = torch.rand(
            batch, 2, start + tokens, generator=torch.Generator().manual_seed(seed)
        )
    for cache, x, asked in zip(pair, new, (query, None), strict=True):
        specification.append_(
            cache.expected, cache.frame, x, None, start, cache.layout, weights, asked
        )
    backend.append_both_(
        *(Packed(*cache.actual) for cache in pair), *(cache.moved for cache in pair),
        *(x.to(DEVICE) for x in new),
        torch.arange(start, start + tokens, device=DEVICE) if by_position else None,
        None if by_position else start, *(cache.layout for cache in pair),
        None if weights is None else weights.to(DEVICE),
        None if query is None else query.to(DEVICE),
    )  # fmt: skip
    for cache in pair:
        cache.assert_equal()


@EXAMPLES
@given(st.data(), st.sampled_from(sorted(SIDES)), st.sampled_from([torch.float16, torch.float32]))
def test_keys_and_values_written_at_once_are_those_of_the_specification(
    data: st.DataObject, name: str, dtype: torch.dtype
) -> None:
    """Whatever a step does: fills a page, forgets tokens, cuts a page open; or takes more launches than one."""
    pair = pair_of(name, dtype)
    edge = full(pair[0].layout, 1)
    first = data.draw(st.sampled_from([1, edge - 1, edge, edge + 20]))
    write(pair, 0, first, data.draw(st.booleans()), 0)
    held = first
    for seed in range(10, 40, 10):
        back = data.draw(st.sampled_from([0, 0, 0, 1, 3, 9, 40]))
        start = max(0, held - back)
        tokens = data.draw(st.sampled_from([1, 1, 1, 2, 7, 33]))
        write(pair, start, tokens, data.draw(st.booleans()), seed)
        held = start + tokens


@pytest.mark.parametrize("name", ["int4", "tc"])
def test_many_heads_take_launches_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "MAX_ARRIVALS", 3)
    pair = pair_of(name, torch.float16, batch=2)
    for start, tokens in ((0, 38), (38, 1), (39, 1), (20, 1)):
        write(pair, start, tokens, True, start)


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_write_that_would_leave_a_gap_changes_nothing_on_either_side(tokens: int) -> None:
    pair = pair_of("kivi", torch.float16)
    write(pair, 0, 10, True, 0)
    x = drawn(1, 2, tokens, torch.float16).to(DEVICE)
    position = torch.arange(11, 11 + tokens, device=DEVICE)
    caches = (Packed(*cache.actual) for cache in pair)
    backend.append_both_(
        *caches, UNCALIBRATED, UNCALIBRATED, x, x, position, None, *layouts_of("kivi")
    )
    for cache in pair:
        cache.assert_equal()


def test_a_write_without_room_on_one_side_changes_nothing_on_the_other() -> None:
    keys, values = pair_of("int4", torch.float16)
    few = Packed.empty(
        torch.zeros(1, 2, 1, DIM, dtype=torch.float16, device=DEVICE), 0, values.layout
    )
    x = drawn(0, 2, 40, torch.float16).to(DEVICE)
    with pytest.raises(ValueError, match="the cache must have room for 1 pages, got 0"):
        backend.append_both_(
            Packed(*keys.actual), few, UNCALIBRATED, UNCALIBRATED, x, x, None, 0, keys.layout,
            values.layout,
        )  # fmt: skip
    keys.assert_equal()


def test_a_step_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(append, "_write", lambda writes, *about: launched.append(len(writes)))
    pair = pair_of("tc", torch.float16)
    for tokens in (1, 32, 33):
        x = drawn(0, 2, tokens, torch.float16).to(DEVICE)
        caches = (Packed(*cache.actual) for cache in pair)
        backend.append_both_(
            *caches, UNCALIBRATED, UNCALIBRATED, x, x, None, 0, *layouts_of("tc"), None, x
        )
    assert launched == [2, 2, 1, 1]


@pytest.mark.parametrize("by", [specification, cpu], ids=["specification", "cpu"])
@pytest.mark.parametrize("name", ["kivi", "tc", "qaq"])
def test_the_operator_writes_what_two_writes_do(name: str, by: ModuleType) -> None:
    on = ops.Backend(by.__name__)
    layouts = layouts_of(name)
    x = drawn(0, 2, 80, torch.float32)
    like = x[:, :, :1]
    both, each = ([list(Packed.empty(like, 4, layout)) for layout in layouts] for _ in range(2))
    query = drawn(1, 4, 80, torch.float32)
    for first, last in ((0, 38), (38, 39), (39, 80)):
        new, asked = x[:, :, first:last], query[:, :, first:last]
        weights = torch.rand(1, 2, last, generator=torch.Generator().manual_seed(first))
        weights = weights if layouts[0].attentive else None
        asked = asked if layouts[0].queries else None
        about = new, 2 * new, None, first, *layouts, weights, asked
        ops.append_both_on(on, *both, [], *about)
        ops.append_on(on, each[0], [], new, None, first, layouts[0], weights, asked)
        ops.append_on(on, each[1], [], 2 * new, None, first, layouts[1], weights)
    for ours, theirs in zip(both, each, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.skipif(not NATIVE, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", SIDES)
def test_a_captured_graph_serves_every_later_position(name: str) -> None:
    pair, dtype = pair_of(name, torch.bfloat16), torch.bfloat16
    tokens = [drawn(i, 2, 100, dtype) for i in range(2)]
    asked = drawn(2, 4, 100, dtype) if pair[0].layout.queries else None
    new = [x[:, :, :1].to(DEVICE) for x in tokens]
    query = None if asked is None else asked[:, :, :1].to(DEVICE)
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    frames: list[Calibrated] = [cache.moved for cache in pair]

    def step() -> None:
        caches = (Packed(*cache.actual) for cache in pair)
        layouts = (cache.layout for cache in pair)
        backend.append_both_(*caches, *frames, *new, position, None, *layouts, None, query)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for slot in range(100):
        now = slice(slot, slot + 1)
        for x, of in zip(new, tokens, strict=True):
            x.copy_(of[:, :, now])
        if query is not None:
            query.copy_(asked[:, :, now])
        position.fill_(slot)
        graph.replay()
        for cache, of, q in zip(pair, tokens, (asked, None), strict=True):
            known = None if q is None else q[:, :, now]
            specification.append_(
                cache.expected, cache.frame, of[:, :, now], None, slot, cache.layout, None, known
            )
    for cache in pair:
        cache.assert_equal()
