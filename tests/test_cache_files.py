"""What a saved cache says is checked against its layout before anything indexes by it."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels.cache.saved import rebuild
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import CacheSpec, Layout
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.reference import cache as reference
from kvq_compile.kernels.schemes import Mixed, Uniform
from kvq_compile.testing.small_cache import assert_same_bytes

D, TOKENS = 16, 110
REGIONS = {"sinks": 1, "window": 3, "page_size": 32}
SCHEMES = {
    "uniform": Uniform(2),
    "fp8": Uniform(3, params="fp8", group_size=8),
    "mixed": Mixed(2, min_bits=0, max_bits=4, outliers=2),
}
LAYOUTS = {name: CacheSpec(s, s, **REGIONS).layout("key", D) for name, s in SCHEMES.items()}


def make(layout: Layout, kind: Any = "grown") -> QuantizedKV:
    x = torch.randn(2, 1, TOKENS, D, generator=torch.Generator().manual_seed(0))
    return QuantizedKV.from_dense(x, layout, kind=kind, length=TOKENS - 10)


def content(cache: QuantizedKV) -> dict[str, Any]:
    """Return what `rebuild` is given for a saved cache, by name, to be tampered with."""
    names = ("version", "layout", "kind", "length", "parts", "calibrated")
    file = dict(zip(names, cache.__reduce_ex__(2)[1], strict=True))
    file["parts"] = [part.clone() for part in file["parts"]]
    return file


def load(file: dict[str, Any]) -> QuantizedKV:
    return rebuild(**file)


@pytest.mark.parametrize("kind", ["grown", "static"])
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_what_was_saved_is_loaded(name: str, kind: str) -> None:
    cache = make(LAYOUTS[name], kind)
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    assert_same_bytes(torch.load(buffer, weights_only=True), cache)


def test_a_cropped_cache_is_loaded_as_what_it_shows() -> None:
    cache = make(LAYOUTS["uniform"])[:, :, :80]
    loaded = load(content(cache))
    assert torch.equal(loaded.dequantize(), cache.dequantize())
    longer = torch.cat([loaded, torch.ones(2, 1, 3, D)], 2)
    assert torch.equal(longer.dequantize()[:, :, 80:], torch.ones(2, 1, 3, D))


def test_two_caches_of_one_file_share_no_memory() -> None:
    file = content(make(LAYOUTS["mixed"]))
    one, other = load(file), load(file)
    mine = {part.data_ptr() for part in one.parts}
    assert not mine & {part.data_ptr() for part in other.parts}


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda file: file.__setitem__(name, value)


def _field(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda file: file["layout"].__setitem__(name, value)


def _part(place: int, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda file: file["parts"].__setitem__(place, change(file["parts"][place]))


def _cursor(held: int, pages: int) -> Callable[[dict[str, Any]], None]:
    return _part(3, lambda _: torch.tensor([held, pages], dtype=torch.int32))


TAMPERED = {
    "another format": _set("version", 3),
    "a kind that is none": _set("kind", "growing"),
    "a length that is no integer": _set("length", 100.0),
    "a negative length": _set("length", -1),
    "a field missing": lambda file: file["layout"].pop("sinks"),
    "a field more": _field("sink", 4),
    "a number as a word": _field("window", "3"),
    "a wider window": _field("window", 4),
    "another head_dim": _field("head_dim", 32),
    "another width": _field("bits", 4),
    "another page size": _field("page_size", 64),
    "queries that are not held": _field("queries", 5),
    "tables that are not there": _field("tables", "0123456789abcdef"),
    "a part missing": lambda file: file["parts"].pop(),
    "a part that is no tensor": _part(1, lambda _: [1]),
    "codes of bytes": _part(0, lambda x: x.to(torch.uint8)),
    "codes of fewer rows": _part(0, lambda x: x[..., :-1, :].contiguous()),
    "codes of one sequence": _part(0, lambda x: x[:1].contiguous()),
    "codes that overlap": _part(0, lambda x: x[:1].expand_as(x)),
    "codes in another order": _part(0, lambda x: x.transpose(0, 2).contiguous().transpose(0, 2)),
    "codes without memory": _part(0, lambda x: x.to("meta")),
    "a sparse part": _part(2, lambda x: x.to_sparse()),
    "fewer exact rows": _part(2, lambda x: x[:, :, :-1].contiguous()),
    "exact rows that are integers": _part(2, lambda x: x.int()),
    "a cursor of one number": _part(3, lambda x: x[:1].clone()),
    "a cursor of longs": _part(3, lambda x: x.long()),
    "fewer tokens than none": _cursor(-1, 0),
    "more tokens than there is room for": _cursor(1000, 30),
    "more pages than there are": _cursor(100, 5),
    "more pages than tokens": _cursor(100, 4),
    "fewer pages than the ring can do without": _cursor(100, 2),
    "pages below zero": _cursor(100, -1),
    "a page count above 2 ** 20": _cursor(100, 3 + (1 << 20)),
}


@pytest.mark.parametrize("how", sorted(TAMPERED))
@pytest.mark.parametrize("kind", ["grown", "static"])
def test_what_quantizing_would_not_have_written_is_refused(how: str, kind: str) -> None:
    file = content(make(LAYOUTS["uniform"], kind))
    load(file)
    TAMPERED[how](file)
    with pytest.raises((ValueError, TypeError)):
        load(file)


def test_a_grown_cache_holds_the_tokens_that_it_shows() -> None:
    file = content(make(LAYOUTS["uniform"]))
    file["length"] += 1
    with pytest.raises(ValueError, match="cursor must hold the 101 tokens"):
        load(file)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_scale_that_is_not_finite_is_refused(value: float) -> None:
    file = content(make(LAYOUTS["uniform"]))
    file["parts"][1].view(-1)[0] = value
    with pytest.raises(ValueError, match="scales and zero points must be finite"):
        load(file)


@pytest.mark.parametrize(
    ("place", "unit", "value", "message"),
    [
        (0, 0, 33, "fewer and fewer of its 32 tokens"),
        (0, 0, -1, "fewer and fewer of its 32 tokens"),
        (0, 7, 1, "fewer and fewer of its 32 tokens"),
        (0, slice(4), 32, "at most 64 rows"),
    ],
)
def test_a_header_that_leads_out_of_its_page_is_refused(
    place: int, unit: Any, value: int, message: str
) -> None:
    file = content(make(LAYOUTS["mixed"]))
    file["parts"][place][0, 0, 1, 0, unit] = value
    with pytest.raises(ValueError, match=message):
        load(file)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [(0, 32, "ranks of a page"), (1, D, "channels of outliers"), (4, 255, "channels of outliers")],
)
def test_a_record_that_leads_out_of_its_page_is_refused(
    field: int, value: int, message: str
) -> None:
    file = content(make(LAYOUTS["mixed"]))
    first = LAYOUTS["mixed"].mixed.rank_field  # behind it three fields for each outlier
    file["parts"][1][1, 0, 2, first + field, 5] = value
    with pytest.raises(ValueError, match=message):
        load(file)


@given(st.data())
def test_bytes_flipped_at_random_are_refused_or_read_as_the_reference_reads_them(
    data: st.DataObject,
) -> None:
    """Of what passes the checks every index stays inside its buffer: plain torch would raise."""
    layout = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    file = content(make(layout, data.draw(st.sampled_from(["grown", "static"]))))
    part = file["parts"][data.draw(st.integers(0, 3))].view(-1).view(torch.uint8)
    for _ in range(data.draw(st.integers(1, 4))):
        part[data.draw(st.integers(0, len(part) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        cache = load(file)
    except ValueError:
        return
    about = cache.shape[2], layout, Calibrated()
    expected = reference.read(*cache.parts, *about)
    torch.testing.assert_close(cache.dequantize(), expected, equal_nan=True)
    query = torch.ones(2, 1, 1, D)
    attended = torch.nn.functional.scaled_dot_product_attention(query, cache, cache)
    assert attended.shape == query.shape
    if cache.kind == "grown":
        more = torch.cat([cache, torch.ones(2, 1, 40, D)], 2)
        assert torch.equal(more.dequantize()[:, :, -1], torch.ones(2, 1, D))
