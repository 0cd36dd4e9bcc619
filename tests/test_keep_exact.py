"""Exact copies in host memory: tokens gain bits when attention comes back, and the copies go where the cache goes."""

import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import ReinplaceCounters

import kvq_compile
from kvq_compile.kernels import ops
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.ops import Backend
from kvq_compile.kernels.packed import paged
from kvq_compile.kernels.reference import mixed
from kvq_compile.kernels.schemes import Adaptive
from kvq_compile.options import make_spec
from qaq_model import SMALL, assert_reads_its_cache, make_model, run, small_text

transformers = pytest.importorskip("transformers")

OPTIONS = [
    {"bits": 3},
    {"bits": 3, "variant": "paper"},
    {"bits": 4, "value_target": 0.02, "requantize": True},
]


def originals_of(cache: QuantizedKV) -> Tensor:
    """Return the copies, ``[B, H, P, N, D]``."""
    return paged(cache.parts, cache.page_layout)[4]


def layout_of(role: Any = "value", **options: Any) -> Layout:
    spec = make_spec("qaq", **{"keep_exact": "cpu", "bits": 3, **SMALL, **options})
    return spec.layout(role, 64)


def tokens(count: int, seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2, count, 64, generator=generator)
    return x * (0.1 + 3 * torch.rand(batch, 2, count, 1, generator=generator) ** 2)


def weights(slots: int, seed: int) -> Tensor:
    return torch.rand(2, 2, slots, generator=torch.Generator().manual_seed(seed)) ** 6


def full(layout: Layout, pages: int) -> int:
    return layout.sinks + layout.window + pages * 32


def packed(x: Tensor, layout: Layout, pages: int) -> Tensor:
    first = layout.sinks
    return x[:, :, first : first + pages * 32].unflatten(2, (pages, 32))


def append(cache: QuantizedKV, x: Tensor, importance: Tensor | None) -> QuantizedKV:
    """Append as a compiled call does."""
    cache.claim(x.shape[2])
    ops.append_(cache.parts, [], x, None, cache.shape[2], cache.page_layout, importance)
    return cache.extended(x.shape[2])


def reweighed(
    layout: Layout, pages: int, seed: int, new: int
) -> tuple[QuantizedKV, QuantizedKV, Tensor, Tensor]:
    """Return full pages, the same after ``new`` tokens under another attention, all tokens and that attention."""
    count = full(layout, pages + 1) - 1
    x = tokens(count + new, seed)
    before = QuantizedKV.from_dense(x[:, :, :0], layout)
    before = append(before, x[:, :, :count], weights(count, seed))
    cache = before.clone_packed()
    importance = weights(count + new, seed + 1)
    return before, append(cache, x[:, :, count:], importance), x, importance


@given(
    st.sampled_from(OPTIONS[:2]), st.integers(1, 4), st.integers(0, 99), st.sampled_from([1, 40])
)
def test_a_page_in_which_a_token_gains_is_the_exact_page_quantized_under_the_attention_of_now(
    options: dict[str, Any], pages: int, seed: int, new: int
) -> None:
    layout = layout_of(**options)
    before, cache, x, importance = reweighed(layout, pages, seed, new)
    bound = layout.bound_at(layout.sinks + layout.pages_at(x.shape[2]) * 32)
    weight = packed(importance, layout, pages)
    held = mixed.held_bits(
        before.paged().codes[:, :, :pages], before.paged().params[:, :, :pages], layout
    )
    span = mixed.stored_span(before.paged().params[:, :, :pages], layout)
    wanted = mixed.allocate(span, weight, layout, bound)
    gains = (wanted > held).any(-1)
    anew = mixed.quantize_pages(packed(x, layout, pages), weight, layout, bound)
    for old, now, expected in zip(before.paged()[:2], cache.paged()[:2], anew, strict=True):
        picked = gains.view(*gains.shape, *[1] * (expected.dim() - 3))
        chosen = torch.where(picked, expected, old[:, :, :pages])
        assert torch.equal(now[:, :, :pages], chosen)
    bits = mixed.held_bits(
        cache.paged().codes[:, :, :pages], cache.paged().params[:, :, :pages], layout
    )
    assert torch.equal(bits[~gains], held[~gains])


@given(st.sampled_from(OPTIONS), st.integers(1, 4), st.integers(0, 99), st.sampled_from([1, 40]))
def test_pages_keep_to_their_rows_whoever_gains(
    options: dict[str, Any], pages: int, seed: int, new: int
) -> None:
    layout = layout_of(**options)
    cache = reweighed(layout, pages, seed, new)[1]
    bits = mixed.held_bits(
        cache.paged().codes[:, :, :pages], cache.paged().params[:, :, :pages], layout
    )
    assert bits.sum(-1).max() <= layout.code_rows


def bits_of(cache: QuantizedKV, token: int) -> Tensor:
    """Return the bits of a token of the first page, ``[B, H]``."""
    page = cache.paged().codes[:, :, 0], cache.paged().params[:, :, 0]
    return mixed.held_bits(*page, cache.page_layout)[..., token]


def test_attention_that_comes_back_to_a_token_gives_it_bits() -> None:
    layout = layout_of(bits=2.3, variant="paper", outliers=0, params="fp8")
    count = full(layout, 2) - 1
    x = tokens(count + 1)
    elsewhere = torch.full((2, 2, count), 1e-6)
    elsewhere[:, :, layout.sinks + 9] = 0.5
    cache = append(QuantizedKV.from_dense(x[:, :, :0], layout), x[:, :, :count], elsewhere)
    assert bits_of(cache, 4).max() < 4
    back = torch.full((2, 2, count + 1), 1e-6)
    back[:, :, layout.sinks + 4] = 0.5
    cache = append(cache, x[:, :, count:], back)
    assert (bits_of(cache, 4) == 4).all()
    assert (bits_of(cache, 9) < 4).all()


def test_no_byte_is_read_of_a_page_in_which_no_token_gains() -> None:
    """Of such a page the copy may be anything."""
    layout = layout_of(value_target=0.02, bits=5, max_bits=6)
    count = full(layout, 3) - 1
    x, importance = tokens(count + 1), torch.full((2, 2, count + 1), 0.5)
    cache = append(QuantizedKV.from_dense(x[:, :, :0], layout), x[:, :, :count], importance)
    seen = cache.dequantize()
    assert cache.originals is not None
    cache.originals.fill_(float("nan"))
    less = append(cache, x[:, :, count:], importance * 1e-3)
    assert torch.equal(
        less.dequantize()[:, :, : full(layout, 2) - 5], seen[:, :, : full(layout, 2) - 5]
    )


@given(st.lists(st.integers(1, 300), max_size=4), st.integers(0, 99))
def test_copies_are_the_tokens_whatever_the_pieces_they_come_in(cuts: list[int], seed: int) -> None:
    layout, x = layout_of(), tokens(300, seed).half()
    cache = QuantizedKV.from_dense(x[:, :, :0], layout)
    for first, last in pairwise(sorted({0, 300, *cuts})):
        cache = torch.cat([cache, x[:, :, first:last]], 2)
    pages = layout.pages_at(300)
    assert cache.originals is not None
    assert cache.originals.dtype == torch.float16
    assert torch.equal(originals_of(cache)[:, :, :pages], packed(x, layout, pages))


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("options", OPTIONS)
def test_the_gpu_path_leaves_the_bytes_of_the_cpu_path(options: dict[str, Any]) -> None:
    """Its kernels run in Triton's interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = layout_of(**options)
    count = full(layout, 3) - 1
    x, importance = tokens(count + 40), weights(count + 40, 1)
    made = append(QuantizedKV.from_dense(x[:, :, :0], layout), x[:, :, :count], weights(count, 0))
    made.claim(40)
    copy, new = made.clone_packed(), x[:, :, count:]
    about = None, count, layout
    ops.append_(made.parts, [], new, *about, importance)
    triton = Backend("kvq_compile.kernels.triton.backend")
    *parts, originals = copy.parts
    parts = [*(part.to(device) for part in parts), originals]
    ops.append_on(triton, parts, [], new.to(device), *about, importance.to(device))
    pages = layout.pages_at(count + 40)
    for mine, theirs in zip(made.parts[:2], parts[:2], strict=True):
        assert torch.equal(mine[:, :, :pages], theirs[:, :, :pages].cpu())
    assert torch.equal(made.originals, copy.originals)


def test_the_operators_keep_their_contracts() -> None:
    layout, x = layout_of(), tokens(150)
    torch.library.opcheck(ops.quantize, (x, 150, True, layout, []))
    cache = QuantizedKV.from_dense(x, layout)
    cache.claim(40)
    about = None, 150, layout, weights(190, 0)
    torch.library.opcheck(ops.append_, (cache.parts, [], tokens(40, 1), *about))


def moved(cache: QuantizedKV) -> dict[str, tuple[Any, Any]]:
    """Return caches made from a cache of two sequences, and their sequences among those of the first."""
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    order = torch.tensor([1, 0, 1])
    other = cache.clone()
    other.copy_(cache)
    return {
        "clone": (cache.clone(), [0, 1]),
        "index_select": (cache.index_select(0, order), [1, 0, 1]),
        "index": (cache[order], [1, 0, 1]),
        "repeat": (cache.repeat_interleave(2, 0), [0, 0, 1, 1]),
        "cat": (torch.cat([cache, cache]), [0, 1, 0, 1]),
        "load": (torch.load(buffer, weights_only=False), [0, 1]),
        "to": (cache.to(torch.float64), [0, 1]),
        "copy": (other, [0, 1]),
    }


def test_copies_go_where_the_cache_goes() -> None:
    layout, x = layout_of(), tokens(150)
    cache = QuantizedKV.from_dense(x, layout)
    pages = layout.pages_at(150)
    for name, (made, rows) in moved(cache).items():
        assert made.originals is not None, name
        expected = packed(x, layout, pages)[rows].to(made.dtype)
        assert torch.equal(originals_of(made)[:, :, :pages], expected), name
        assert made.originals.untyped_storage()._cdata != cache.originals.untyped_storage()._cdata


def test_a_cache_that_was_cut_keeps_the_copies_of_whole_pages() -> None:
    """The page that is cut open comes back as it was read."""
    layout, x, more = layout_of(), tokens(200), tokens(60, 1)
    cache = QuantizedKV.from_dense(x, layout)
    read, shorter = cache.dequantize(), cache[:, :, :180]
    del cache
    again = torch.cat([shorter, more], 2)
    cut = layout.sinks + 5 * 32
    expected = torch.cat([x[:, :, :cut], read[:, :, cut:180], more], 2)
    pages = layout.pages_at(240)
    assert torch.equal(originals_of(again)[:, :, :pages], packed(expected, layout, pages))


def test_a_report_counts_copies_apart() -> None:
    layout = layout_of()
    cache = QuantizedKV.from_dense(tokens(150), layout)
    report = kvq_compile.report([cache, cache])
    assert cache.originals is not None
    assert report.host_bytes == cache.originals.numel() * 4
    assert "originals" not in report.parts
    assert f"{report.host_bytes:,d} bytes of exact copies in host memory" in str(report)
    assert "exact copies in host memory" in layout.about


def test_only_tensors_whose_bits_can_grow_keep_copies() -> None:
    assert make_spec("qaq", keep_exact="cpu").key.adaptive.keep_exact
    paper = make_spec("qaq", keep_exact="cpu", variant="paper")
    assert (paper.key.adaptive, paper.value.adaptive) == (None, Adaptive(keep_exact=True))
    assert not make_spec("qaq", requantize=True, keep_exact="cpu").key.adaptive.requantize


def test_what_cannot_be_served_is_named() -> None:
    with pytest.raises(ValueError, match='keep_exact must be "cpu" or None'):
        make_spec("qaq", keep_exact="cuda")
    with pytest.raises(ValueError, match="keep_exact must go with a cache that grows"):
        QuantizedKV.from_dense(tokens(90), layout_of(), kind="static")
    cache = QuantizedKV.from_dense(tokens(90), layout_of())
    with pytest.raises(ValueError, match="parts must be .codes, params, exact, cursor, originals"):
        QuantizedKV(cache.parts[:4], [], cache.page_layout, "grown", 90)


# In a model


@pytest.mark.long(but=["options1"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_compiled_model_reads_what_its_cache_stands_for(options: dict[str, Any]) -> None:
    model = make_model(layers=1)
    call = run(model, keep_exact="cpu", **options)
    cache = transformers.DynamicCache(config=model.config)
    assert_reads_its_cache(model, call, cache, small_text(200), 90, 150, 151, 199)
    assert cache.layers[0].values.originals is not None


def test_copies_are_written_in_place_under_inductor(fresh_dynamo: None) -> None:
    model = make_model(layers=1)
    options = {"method": "qaq", "keep_exact": "cpu", **SMALL}
    options["inductor"] = {"fx_graph_cache": False}
    first = torch.compile(model.forward, backend="kvq", options=options | {"inner": "eager"})
    step = torch.compile(model.forward, backend="kvq", options=options)
    cache = transformers.DynamicCache(config=model.config)
    ids = small_text(103)
    with torch.no_grad():
        first(input_ids=ids[:, :100], past_key_values=cache, use_cache=True)
        torch._dynamo.reset()
        ReinplaceCounters.clear()
        for place in (100, 101, 102):
            step(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
    assert ReinplaceCounters.get_total_missed() == 0
    kept = cache.layers[0].values
    assert int(kept.cursor[1]) == 3
    assert originals_of(kept)[:, :, :3].abs().amin(2).amax() > 0


def test_a_static_cache_is_refused_with_the_reason(fresh_dynamo: None) -> None:
    model = make_model()
    cache = transformers.StaticCache(config=model.config, max_cache_len=128)
    with torch.no_grad():
        explanation = kvq_compile.explain(
            model, small_text(80), past_key_values=cache, use_cache=True,
            options={"method": "qaq", "keep_exact": "cpu", **SMALL},
        )  # fmt: skip
    assert "keep_exact needs a cache that grows" in str(explanation)
