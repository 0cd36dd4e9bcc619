"""What a saved cache says is checked against its layout before anything indexes by it."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import reference
from kvq_compile.kernels.cache.saved import (
    FORMAT,
    OLDER_FORMATS,
    load_layout,
    load_old_layout,
    plain_layout,
    rebuild,
    rebuild_old,
)
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.schemes import Adaptive, Channelwise, Codebook, Mixed, Uniform
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.testing import page_layouts
from kvq_compile.testing.small_cache import assert_same_bytes
from kvq_compile.testing.small_tables import framed_layouts
from uncalibrated import mixed_layouts

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
    "another format": _set("version", FORMAT + 1),
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
        (0, 0, 33, "descending counts of its 32 tokens"),
        (0, 0, -1, "descending counts of its 32 tokens"),
        (0, 7, 1, "descending counts of its 32 tokens"),
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
    expected = reference.read(*cache.paged(), *about)
    torch.testing.assert_close(cache.dequantize(), expected, equal_nan=True)
    query = torch.ones(2, 1, 1, D)
    attended = torch.nn.functional.scaled_dot_product_attention(query, cache, cache)
    assert attended.shape == query.shape
    more = torch.cat([cache, torch.ones(2, 1, 40, D)], 2)
    assert torch.equal(more[:, :, -1].clone(), torch.ones(2, 1, D))


# Formats


@given(st.one_of(framed_layouts().map(lambda framed: framed[0]), page_layouts(), mixed_layouts()))
def test_a_layout_is_loaded_from_the_numbers_and_words_it_was_written_as(layout: Layout) -> None:
    plain = plain_layout(layout)
    assert all(isinstance(x, (bool, int, float, str)) for x in plain.values())
    assert load_layout(plain) == layout


@given(mixed_layouts(), st.sampled_from(["role", "head_dim", "sinks", "scheme", "bits", "fit"]))
def test_a_layout_with_a_field_missing_or_unknown_is_refused(layout: Layout, name: str) -> None:
    plain = plain_layout(layout)
    with pytest.raises(ValueError, match="the layout of a saved cache must be whole"):
        load_layout(plain | {"unknown": 1})
    if name in ("bits", "role", "head_dim", "sinks", "scheme"):
        del plain[name]
    else:
        plain[name] = 3  # neither True nor False
    with pytest.raises(ValueError, match="the layout of a saved cache must be whole"):
        load_layout(plain)


OLD = {  # the text that stood for a layout in files without a number
    "key,4,token,16,1.0,none,1,3,32,16,uniform,fp16,fields,1,False,-,0,0,0,True,True,True,0.0,0.0,"
    "False,False,0,0": ("key", Uniform(4)),
    "value,1.5,channel,32,0.9,hadamard,1,3,32,16,uniform,fp8,trits,1,False,-,0,0,0,True,True,True,"
    "0.0,0.0,False,False,0,0": (
        "value",
        Uniform(1.5, "channel", 32, 0.9, "hadamard", "fp8", "trits"),
    ),
    "key,8,token,16,1.0,none,1,3,32,16,codebook,fp16,fields,4,True,0123456789abcdef,0,0,0,True,True,"
    "True,0.0,0.0,False,False,0,0": ("key", Codebook(8, 4, True, "0123456789abcdef")),
    "value,2.5,token,16,1.0,none,1,3,32,16,mixed,fp8,fields,1,False,-,1,4,2,False,False,True,0.02,0.0,"
    "True,False,0,0": (
        "value",
        Mixed(2.5, 1, 4, 2, "fp8", False, False, adaptive=Adaptive(0.02, requantize=True)),
    ),
}


@pytest.mark.parametrize("text", OLD)
def test_a_text_of_an_old_file_is_the_layout_it_was(text: str) -> None:
    role, scheme = OLD[text]
    assert load_old_layout(text) == Layout(role, D, Regions(**REGIONS), scheme)


@pytest.mark.parametrize("text", ["", "key,4,token", next(iter(OLD)) + ",1"])
def test_a_text_of_another_length_is_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(ValueError, match="load it with the version of kvq-compile that saved it"):
        load_old_layout(text)


def test_an_old_file_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    text = next(iter(OLD))
    cache = make(load_old_layout(text))
    about = text, "grown", cache.shape[2]
    monkeypatch.setattr(rebuild_old, "__module__", "kvq_compile.kernels.cache")
    monkeypatch.setattr(rebuild_old, "__qualname__", "rebuild")
    monkeypatch.setattr(rebuild_old, "__name__", "rebuild")
    with monkeypatch.context() as saving:
        saving.setattr(
            QuantizedKV, "__reduce_ex__", lambda *_: (rebuild_old, (*cache.paged(), *about))
        )
        buffer = io.BytesIO()
        torch.save(cache, buffer)
    buffer.seek(0)
    assert_same_bytes(torch.load(buffer, weights_only=True), cache)


@pytest.mark.parametrize("version", [FORMAT + 1, 1, 0, 2.5, "4", None])
def test_a_file_of_a_format_that_is_not_written_so_is_refused_with_what_to_do(version: Any) -> None:
    """Files of format 1 have no version: one that says so was not written by any release."""
    file = content(make(LAYOUTS["uniform"])) | {"version": version}
    with pytest.raises(ValueError, match=f"must be of format {FORMAT}, got {version}; load it"):
        load(file)


@pytest.mark.parametrize("version", OLDER_FORMATS)
def test_a_file_of_a_format_before_is_loaded_where_its_pages_are_packed_as_today(
    version: int,
) -> None:
    cache = make(LAYOUTS["uniform"])
    assert_same_bytes(load(content(cache) | {"version": version}), cache)


@pytest.mark.parametrize(
    ("scheme", "version"),
    [(Channelwise(2), 2), (Uniform(3), 3), (Uniform(3), 2), (Uniform(1.5, packing="trits"), 4)],
)
def test_a_file_whose_pages_were_packed_otherwise_is_refused_with_what_to_do(
    scheme: Any, version: int
) -> None:
    layout = CacheSpec(scheme, Uniform(2), **REGIONS).layout("key", D)
    file = content(make(layout))
    load(file)
    with pytest.raises(ValueError, match=f"must be of format {FORMAT}, got {version}; load it"):
        load(file | {"version": version})


def test_an_old_file_whose_pages_were_packed_otherwise_is_refused_with_what_to_do() -> None:
    text = next(iter(OLD)).replace("key,4,", "key,3,", 1)
    cache = make(load_old_layout(text))
    with pytest.raises(ValueError, match=f"must be of format {FORMAT}, got 1; load it"):
        rebuild_old(*cache.paged(), text, "grown", cache.shape[2])


def test_importing_the_package_is_enough_to_load(tmp_path: Path) -> None:
    cache = make(LAYOUTS["uniform"])
    torch.save(cache, tmp_path / "cache")
    code = "import sys, kvq_compile, torch; print(torch.load(sys.argv[1], weights_only=True))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("QuantizedKV([2, 1, 100, 16]")
