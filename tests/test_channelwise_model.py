"""Models whose keys have bits of their own by channel, and what is done to their caches on the way."""

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import kvq_compile
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.reference.channelwise import find_state
from kvq_compile.lowering.find.rotation import Rotation, find_rotation
from kvq_compile.lowering.sites import Refusal
from kvq_compile.options import make_spec
from kvq_compile.testing import assert_logits_close, plain_cache
from qaq_model import SMALL, assert_reads_its_cache, make_model, run, small_text

transformers = pytest.importorskip("transformers")

METHOD = {"method": "tc", "bits": 3}


def widths(cache: QuantizedKV) -> Tensor:
    return cache.page_layout.state_of(cache.exact)[:, :, 0]


def known_queries(cache: QuantizedKV) -> int:
    """Return how many of the rows of queries that a head holds are known."""
    layout = cache.page_layout
    return int(layout.queries_of(cache.exact)[0, 0].any(-1).sum())


@pytest.mark.long(but=["eager-2-cuts0"])
@pytest.mark.parametrize(
    ("inner", "layers", "cuts"),
    [("eager", 2, (60, 61, 62, 100, 120)), ("inductor", 1, (60, 100, 120))],
)
def test_a_compiled_model_attends_to_what_its_cache_stands_for(
    inner: str, layers: int, cuts: tuple[int, ...]
) -> None:
    model = make_model(layers)
    cache = transformers.DynamicCache(config=model.config)
    assert_reads_its_cache(model, run(model, **METHOD, inner=inner), cache, small_text(120), *cuts)
    for layer in cache.layers:
        assert layer.keys.cursor.tolist() == [120, 3]
        assert (widths(layer.keys).sum(-1) == 3 * 64).all()


@pytest.mark.long(but=["False"])
@pytest.mark.parametrize("first", [True, False])
def test_a_rotation_that_one_graph_shows_and_the_next_does_not_keeps_the_cache_as_it_is(
    first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the later graph wanted another layout than the cache had, in the middle of a generation."""
    seen: list[bool] = []

    def sometimes(*about: Any) -> Rotation:
        seen.append(True)
        if (len(seen) <= 2) != first:  # of two layers
            raise Refusal("not shown here")
        return find_rotation(*about)

    monkeypatch.setattr("kvq_compile.lowering.find.key_rotation.find_rotation", sometimes)
    model = make_model()
    cache = transformers.DynamicCache(config=model.config)
    assert_reads_its_cache(model, run(model, **METHOD), cache, small_text(120), 60, 61, 100, 120)
    assert cache.layers[0].keys.page_layout.takes_mean == first
    assert (len(seen) > 2) == first  # a cache without a mean is not asked about


def prefilled(kind: str) -> tuple[Any, Tensor, Any]:
    """Return a cache that a plain model has filled, its first keys, and the compiled call that takes it on."""
    model = make_model()
    cache = transformers.DynamicCache(config=model.config)
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=128)
    with torch.no_grad():
        model(small_text(100)[:, :80], past_key_values=cache, use_cache=True)
    return cache, cache.layers[0].keys.clone(), run(model, **METHOD)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_first_compiled_step_after_a_plain_prompt_weighs_channels_by_its_query(
    kind: str,
) -> None:
    cache, plain, call = prefilled(kind)
    with torch.no_grad():
        call(small_text(100)[:, 80:81], cache, cache_position=torch.tensor([80]))
    keys = cache.layers[0].keys
    layout = keys.page_layout
    assert known_queries(keys) == layout.shared_by == 2
    pages = plain[:, :, layout.sinks : layout.sinks + 64].unflatten(2, (2, 32))
    asked = layout.queries_of(keys.exact)
    about = 0, layout, Calibrated(keys.tables), keys.dtype
    assert layout.takes_mean
    assert torch.equal(layout.state_of(keys.exact), find_state(pages, asked, *about))
    assert not torch.equal(widths(keys), find_state(pages, asked * 0, *about)[:, :, 0])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_later_steps_keep_the_widths_and_add_their_queries(kind: str) -> None:
    cache, _, call = prefilled(kind)
    found = []
    with torch.no_grad():
        for slot in range(80, 83):
            call(small_text(100)[:, slot : slot + 1], cache, cache_position=torch.tensor([slot]))
            found.append(widths(cache.layers[1].keys).clone())
    assert torch.equal(found[0], found[2])
    assert known_queries(cache.layers[1].keys) == 3 * 2


def test_a_batch_padded_on_the_left_attends_to_what_its_cache_stands_for() -> None:
    model = make_model()
    exact = deepcopy(model).double()
    call = run(model, **METHOD)
    ids = torch.cat([small_text(90), small_text(90).flip(1)])
    shown = torch.ones(2, 90, dtype=torch.int64)
    shown[1, :37] = 0
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        call(ids[:, :60], cache, attention_mask=shown[:, :60])
        before = [plain_cache(cache, dtype) for dtype in (torch.float32, torch.float64)]
        mask = {"attention_mask": shown}
        logits = call(ids[:, 60:], cache, **mask)
        expected = [
            m(ids[:, 60:], past_key_values=c, use_cache=True, **mask).logits
            for m, c in zip((model, exact), before, strict=True)
        ]
    assert_logits_close(logits, *expected, layers=2)
    assert isinstance(cache.layers[0].keys, QuantizedKV)


def test_beams_are_reordered_with_the_widths_of_their_channels() -> None:
    model = make_model()
    model.compile(backend="kvq", options={**METHOD, "inner": "eager", **SMALL}, dynamic=True)
    made = model.generate(
        small_text(50), num_beams=3, max_new_tokens=6, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True,
    )  # fmt: skip
    keys = made.past_key_values.layers[0].keys
    assert isinstance(keys, QuantizedKV)
    assert (widths(keys).sum(-1) == 3 * 64).all()


# Operations on one cache


def layout_of() -> Layout:
    return make_spec("tc", bits=3, **SMALL).layout("key", 64, 2)


def filled(seed: int = 0) -> QuantizedKV:
    """Return a cache of three sequences whose channels differ in bits."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(3, 2, 1, 64, generator=generator).exp()
    x = torch.randn(3, 2, 80, 64, generator=generator) * size
    query = torch.randn(3, 4, 3, 64, generator=generator)
    cache = QuantizedKV.from_dense(x, layout_of(), query=query)
    assert not torch.equal(widths(cache)[0], widths(cache)[1])
    return cache


ALONG_THE_BATCH: dict[str, Callable[[Tensor], Tensor]] = {
    "index_select": lambda x: x.index_select(0, torch.tensor([2, 0, 0])),
    "indexed": lambda x: x[torch.tensor([1, 1])],
    "sliced": lambda x: x[1:],
    "repeated": lambda x: x.repeat_interleave(2, 0),
    "joined": lambda x: torch.cat([x[1:2], x[:1]]),
    "copied": deepcopy,
}


@pytest.mark.parametrize("name", ALONG_THE_BATCH)
def test_sequences_take_the_widths_of_their_channels_along(name: str) -> None:
    cache, change = filled(), ALONG_THE_BATCH[name]
    expected, found = change(cache.dequantize()), change(cache)
    read = found.dequantize() if isinstance(found, QuantizedKV) else found
    assert torch.equal(read, expected)


def test_a_cache_survives_its_file_and_another_dtype() -> None:
    cache, file = filled(), io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(loaded.dequantize(), cache.dequantize())
    assert loaded.page_layout == cache.page_layout
    narrow = cache.to(torch.bfloat16)
    assert torch.equal(widths(narrow).float(), widths(cache))
    exact = cache.dequantize().bfloat16()
    assert torch.equal(narrow.dequantize(), exact)


def test_a_file_with_impossible_widths_is_refused() -> None:
    cache, file = filled(), io.BytesIO()
    cache.page_layout.state_of(cache.exact)[1, 1, 0, 3] += 1
    torch.save(cache, file)
    file.seek(0)
    with pytest.raises(ValueError, match="the widths of channels must be 0 to 8 and 192 together"):
        torch.load(file)


def test_a_cropped_cache_fills_again_with_the_widths_that_it_found() -> None:
    model = make_model()
    call = run(model, **METHOD)
    cache, ids = transformers.DynamicCache(config=model.config), small_text(120)
    with torch.no_grad():
        call(ids[:, :90], cache)
        found = widths(cache.layers[0].keys).clone()
        cache.crop(-70)
        call(ids[:, 20:80], cache)
    keys = cache.layers[0].keys
    assert keys.cursor.tolist() == [80, 2]
    assert torch.equal(widths(keys), found)


def test_a_report_and_an_explanation_tell_of_bits_by_channel() -> None:
    cache = filled()
    report = kvq_compile.report([cache, cache])
    assert report.packed_bits == pytest.approx(layout_of().bits_per_element)
    assert "3-bit by channel" in repr(cache)
    with torch.no_grad():
        told = kvq_compile.explain(
            make_model(), small_text(8), use_cache=True, options={**METHOD, **SMALL}
        )
    assert "3-bit by channel" in str(told)
