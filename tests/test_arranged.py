"""The tensor that a model sees of caches in a layout of its own."""

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch

import kvq_compile
from kvq_compile import QuantizedKV
from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.arrangement import Arrangement
from kvq_compile.options import make_spec
from kvq_compile.testing.small_decoder import LAYOUTS
from layout_steps import EXACT, SLOTS, B, D, G, H, grown, tokens, with_heads

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"method": "int8", "sinks": 1, "window": 64, "page_size": 32, "group_size": 16}


def arranged(layout: str = "BSHD", kind: Any = "grown", held: int = 40) -> ArrangedKV:
    layouts = make_spec(**OPTIONS).layout("key", D)
    how = Arrangement(
        layout, (2,) if "P" in layout else (), H if "F" in layout or "(H" in layout else 0
    )
    slots = held if kind == "grown" else SLOTS
    dense = [
        torch.randn(B, H, slots, D, generator=torch.Generator().manual_seed(n)) for n in (0, 1)
    ]
    about = {"kind": kind} | ({} if kind == "grown" else {"length": held})
    caches = [QuantizedKV.from_dense(x, layouts, **about) for x in dense[: how.pieces]]
    return ArrangedKV(caches, how)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_looks_like_the_tensor_it_replaces(layout: str) -> None:
    cache = arranged(layout)
    dense = cache.dequantize()
    assert cache.shape == dense.shape
    assert len(cache) == len(dense)
    torch.testing.assert_close(cache + 0, dense)
    torch.testing.assert_close(cache[0], dense[0])
    torch.testing.assert_close(torch.from_numpy(cache.numpy()), dense)
    pieces = cache.arrangement.split(dense)
    for piece, own in zip(pieces, cache.caches, strict=True):
        torch.testing.assert_close(piece, own.dequantize())
    torch.testing.assert_close(cache.arrangement.join(pieces), dense)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_tokens_join_it_outside_compiled_code(layout: str) -> None:
    cache = arranged(layout, held=36)
    axis, dense = cache.arrangement.axis("S"), cache.dequantize()
    new = torch.randn_like(dense.narrow(axis, 0, 2))
    longer = torch.cat([cache, new], axis)
    assert isinstance(longer, ArrangedKV)
    assert longer.shape[axis] == 38
    torch.testing.assert_close(longer.dequantize(), torch.cat([dense, new], axis))
    torch.testing.assert_close(cache.dequantize(), dense)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "F" not in layout])
def test_rows_and_prefixes_of_it_stay_packed(layout: str) -> None:
    cache = arranged(layout)
    rows, tokens_ = cache.arrangement.axis("B"), cache.arrangement.axis("S")
    dense = cache.dequantize()
    index = torch.tensor([1, 0, 1])
    beams, cropped = cache.index_select(rows, index), cache.narrow(tokens_, 0, 37)
    for part, wanted in (
        (beams, dense.index_select(rows, index)),
        (cropped, dense.narrow(tokens_, 0, 37)),
        (cache.clone(), dense),
        (copy.deepcopy(cache), dense),
        (cache.to(torch.float64), dense.double()),
        (cache.detach(), dense),
    ):
        assert isinstance(part, ArrangedKV)
        torch.testing.assert_close(part.dequantize(), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_saved_packed(layout: str) -> None:
    cache, file = arranged(layout), io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    for loaded in (torch.load(file, weights_only=True), pickle.loads(pickle.dumps(cache))):
        assert isinstance(loaded, ArrangedKV)
        torch.testing.assert_close(loaded.dequantize(), cache.dequantize(), rtol=0, atol=0)


def test_whole_tokens_are_assigned_and_nothing_else() -> None:
    cache = arranged("BSHD", "static", held=36)
    dense, new = cache.dequantize(), torch.randn(B, 2, H, D)
    cache[:, 36:38] = new
    dense[:, 36:38] = new
    cache[:, 38] = new[:, 0]
    dense[:, 38] = new[:, 0]
    torch.testing.assert_close(cache.dequantize(), dense)
    for write in (
        lambda: cache.__setitem__((slice(None), slice(None), 1), new[:, :1, 0]),
        lambda: cache.mul_(2),
        lambda: cache[:, 3:5].zero_(),
        lambda: torch.add(dense, 1, out=cache),
    ):
        with pytest.raises(NotImplementedError, match="whole tokens|whole slots|copy"):
            write()
    torch.testing.assert_close(cache.dequantize(), dense)


def test_a_report_counts_its_caches_and_explain_names_its_layout() -> None:
    cache = arranged("PBHSD")
    report = kvq_compile.report([cache])
    assert [tensor.name for tensor in report.tensors] == ["cache[0][0]", "cache[0][1]"]
    assert report.bytes == cache.nbytes
    held = [torch.randn(B, 40, H, D) for _ in range(2)]
    new = [tokens(1, heads, seed) for seed, heads in enumerate((H * G, H, H))]
    with torch.no_grad():
        told = kvq_compile.explain(with_heads(grown), *new, held, None, None, options=EXACT)
    for state in told.graphs[0].states:
        assert re.fullmatch(r"L\['rest'\]\[0\]\[\d\]", state.name)
        assert state.detail.endswith("kept as [B, S, H, D]")
