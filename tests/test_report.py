"""What a report says is what the storages hold."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile import QuantizedKV, explain, report
from kvq_compile.kernels.schemes import Scheme, Uniform
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.testing import lengths, specs

SPEC = CacheSpec(Uniform(4), Uniform(2, group_size=32), sinks=2, window=5, page_size=32)


def pair(count: int, spec: CacheSpec = SPEC, **rest: Any) -> tuple[QuantizedKV, QuantizedKV]:
    x = torch.randn(2, 2, count, 128, generator=torch.Generator().manual_seed(0))
    return (
        QuantizedKV.from_dense(x, spec.layout("key", 128), **rest),
        QuantizedKV.from_dense(x, spec.layout("value", 128), **rest),
    )


@given(st.data())
def test_bytes_and_effective_bits_are_those_of_the_storages(data: st.DataObject) -> None:
    spec = data.draw(specs(128))
    held = 1 + data.draw(lengths(spec.layout("key", 128)))
    caches = pair(held, spec)
    found = report(caches)
    storages = {part.untyped_storage().data_ptr(): part for cache in caches for part in cache.parts}
    size = sum(part.untyped_storage().nbytes() for part in storages.values())
    assert found.bytes == size
    assert found.effective_bits == pytest.approx(8 * size / sum(cache.numel() for cache in caches))
    assert found.dense_bytes == 2 * sum(cache.numel() for cache in caches)
    assert (found.tokens, found.layers) == (held, 1)
    for cache, tensor in zip(caches, found.tensors, strict=True):
        assert tensor.parts == {
            name: getattr(cache, name).untyped_storage().nbytes() for name in tensor.parts
        }


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (Uniform(4), 4.25),  # a scale and a zero point of 16 bits for 128 numbers
        (Uniform(8), 8.25),
        (Uniform(3), 3.25),
        (Uniform(4, group_size=32), 5.0),
        (Uniform(2, group_size=64), 2.5),
        (Uniform(2, "channel", 32), 3.0),
        (Uniform(2, "channel"), 2.25),  # as many tokens in a page
    ],
)
def test_packed_bits_are_codes_and_parameters_of_a_number(spec: Scheme, bits: float) -> None:
    both = CacheSpec(spec, spec, sinks=0, window=0, page_size=128)
    assert report(pair(300, both)).packed_bits == bits
    assert report(pair(300, both)).tensors[0].packed_bits == bits


def test_keys_and_values_of_unequal_width_are_averaged() -> None:
    assert report(pair(100)).packed_bits == (4.25 + 3.0) / 2


@pytest.mark.parametrize(
    ("count", "exact"), [(0, 0), (1, 1), (38, 38), (39, 39 - 32), (70, 70 - 32), (71, 71 - 64)]
)
@pytest.mark.parametrize("kind", ["grown", "static"])
def test_tokens_kept_exact_are_sinks_and_recent_ones(count: int, exact: int, kind: Any) -> None:
    cache = pair(100, kind="static", length=count)[0] if kind == "static" else pair(count)[0]
    assert report(cache).tensors[0].kept_exact == exact
    assert report(cache).tensors[0].held == count


@pytest.mark.parametrize(("shown", "exact"), [(100, 36), (20, 2), (1, 1), (0, 0)])
def test_a_shorter_view_of_packed_tokens_keeps_its_sinks_exact(shown: int, exact: int) -> None:
    """Regression: all tokens of a view that ends inside a packed page counted as packed."""
    cache = pair(100)[0]
    assert report(cache[:, :, :shown]).tensors[0].kept_exact == exact


def test_views_of_one_memory_are_counted_once() -> None:
    """Regression: each view of a cache counted all of its bytes."""
    cache = pair(100)[0]
    longer = torch.cat([cache, torch.zeros(2, 2, 1, 128)], 2)
    assert report([cache, longer]).bytes == report(longer).bytes
    dense = torch.zeros(2, 2, 10, 64)
    assert report([dense, dense[:, :, :5]]).bytes == dense.untyped_storage().nbytes()


def test_a_plain_cache_is_counted_as_it_is() -> None:
    x = torch.zeros(2, 2, 10, 64, dtype=torch.float16)
    found = report((x, x.clone()))
    assert found.parts == {"plain": 2 * x.numel() * 2}
    assert (found.effective_bits, found.packed_bits) == (16.0, 16.0)
    assert [tensor.kept_exact for tensor in found.tensors] == [10, 10]


class Layer:
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class Cache:
    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)


def names(holder: Any) -> list[str]:
    return [tensor.name for tensor in report(holder).tensors]


def test_tensors_are_named_by_the_way_to_them() -> None:
    key, value = pair(50)
    module = torch.nn.Module()
    module.register_buffer("k_cache", key)
    module.register_buffer("mask", torch.zeros(3, 3))
    inner = torch.nn.Module()
    inner.attention = module
    assert names(Cache(Layer(key, value))) == ["cache.layers[0].keys", "cache.layers[0].values"]
    assert names([(key, value), None]) == ["cache[0][0]", "cache[0][1]"]
    assert names({"k": key, 3: value}) == ["cache['k']", "cache[3]"]
    assert names(inner) == ["attention.k_cache"]
    assert names((key, key, value)) == ["cache[0]", "cache[2]"]


@pytest.mark.parametrize("holder", [None, [], torch.zeros(3), torch.nn.Linear(2, 2), object()])
def test_what_holds_no_cache_is_refused(holder: object) -> None:
    with pytest.raises(TypeError, match="must hold key and value tensors"):
        report(holder)


def test_the_text_of_a_report_names_every_part() -> None:
    text = str(report(pair(100)))
    for word in ("1 layer, 100 tokens", "codes", "params", "exact", "cursor", "bits an element"):
        assert word in text


@given(st.integers(0, 5000), st.integers(1, 80), st.booleans())
def test_reports_fit_80_columns_and_hold_no_tensor(tokens: int, layers: int, plain: bool) -> None:
    """A representation that printed tensors would fill screens and wait for devices."""
    tensor = torch.zeros(1, 1, tokens, 8) if plain else pair(min(tokens, 50))[0]
    found = report([tensor, tensor.clone() if plain else pair(3)[0]] * layers)
    for text in (str(found), repr(found)):
        assert max(map(len, text.splitlines())) <= 80
    assert "tensor(" not in repr(found) + found._repr_html_() + found.json()
    assert repr(found).count("\n") == 0


def test_the_json_of_a_report_has_its_totals_and_tensors() -> None:
    found = report(pair(100))
    stored = json.loads(found.json())
    assert (stored["bytes"], stored["tokens"], stored["layers"]) == (found.bytes, 100, 1)
    assert sum(stored["parts"].values()) == found.bytes
    assert [tensor["name"] for tensor in stored["tensors"]] == ["cache[0]", "cache[1]"]


@pytest.mark.parametrize(
    ("tokens", "words"), [(0, ": 0 bytes"), (2000, "times less"), (1, "times more")]
)
def test_a_report_says_less_only_where_it_is_less(tokens: int, words: str) -> None:
    found = report(pair(tokens) if tokens else torch.zeros(1, 2, 0, 4))
    assert words in str(found)
    assert ("times less" in str(found)) == (found.elements > 0 and found.bytes <= found.dense_bytes)


def step(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Any:
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values), keys, values


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_an_explanation_holds_no_tensor_and_fits_80_columns() -> None:
    told = explain(step, *(torch.randn(1, 1, 3, 16) for _ in range(5)), options={"method": "int8"})
    assert told.rewritten == 1
    assert "tensor(" not in repr(told) + str(told) + told._repr_html_() + told.json()
    assert [len(graph["attentions"]) for graph in json.loads(told.json())["graphs"]] == [1]
    long = [line for line in str(told).splitlines() if len(line) > 80]
    assert all(len(line.split()) <= 2 for line in long)  # a path or a formula without a space


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_a_bound_is_told_only_where_something_is_packed() -> None:
    def plain(x: Tensor) -> Tensor:
        return x + 1

    told = explain(plain, torch.zeros(3))
    assert told.bound is None
    assert "at most" not in str(told)


@pytest.mark.parametrize("target", [3, "model", None])
def test_what_cannot_be_called_is_refused_by_name(target: object) -> None:
    with pytest.raises(TypeError, match="function must be a module or a function, got "):
        explain(target)  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_first_example_of_the_readme_ends_with_what_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: its cache was too short for a page and held more than 16 bit does."""
    pytest.importorskip("transformers")
    root = Path(__file__).resolve().parent.parent
    blocks = re.compile("```python\n(.*?)```\n\n```\n(.*?)```", re.DOTALL)
    found = blocks.search((root / "README.md").read_text())
    assert found is not None
    example, printed = found.groups()
    monkeypatch.chdir(root)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed
    assert "times less than 16 bit" in printed
