"""Steps of a decoder that a compiler refuses to rewrite: what they take, and what must hold of them."""

import re
from contextlib import nullcontext

import pytest
import torch

from kvq_compile import KVQWarning, QuantizedKV, quantize_cache_
from kvq_compile.history import watching
from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.lowering.sites import DENSE

EXACT = {"method": "int8", "sinks": 1, "window": 256, "page_size": 32, "inner": "eager"}
SLOTS = 64


def tokens(
    number: int, heads: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 100 * number)
    return torch.randn(2, heads, number, 16, generator=generator).to(dtype)


def compile_(step, **options):
    return torch.compile(step, backend="kvq", options=EXACT | options)


def assert_left_alone(step, arguments, reason: str, warns: bool = True) -> list:
    """Run a step compiled and not, on arguments made anew each time; compare, and check what is said."""
    warning = pytest.warns(KVQWarning, match=re.escape(reason)) if warns else nullcontext()
    given, _, sites = _compared(step, arguments, warning)
    assert all(site.outcome == "left alone" for site in sites)
    assert any(reason in site.detail for site in sites)
    return given


def assert_read_dense(step, arguments, reason: str) -> list:
    """The same for a step whose caches are stored quantized although its attention is refused for a reason."""
    warning = pytest.warns(KVQWarning, match=f"read their caches dense.*{re.escape(reason)}")
    given, outputs, sites = _compared(step, arguments, warning)
    assert all(site.outcome == DENSE for site in sites)
    assert any(reason in site.detail for site in sites)
    results = outputs if isinstance(outputs, tuple) else ()
    assert any(isinstance(x, (QuantizedKV, ArrangedKV)) for x in (*results, *given))
    return given


def assert_rewritten(step, arguments) -> list:
    """The same for a step that is not refused."""
    given, _, sites = _compared(step, arguments, nullcontext())
    assert all(site.outcome == "rewritten" for site in sites)
    return given


def _compared(step, arguments, warning):
    given = arguments()
    with torch.no_grad(), watching() as graphs:
        expected = step(*arguments())
        with warning:
            outputs = compile_(step)(*given)
    sites = [site for graph in graphs for site in graph.sites]
    assert sites
    torch.testing.assert_close(dense(outputs), dense(expected), rtol=1e-4, atol=1e-5)
    return given, outputs, sites


def dense(x):
    if isinstance(x, (tuple, list)):
        return [dense(item) for item in x]
    return x.dequantize() if isinstance(x, (QuantizedKV, ArrangedKV)) else x


def grown(
    length: int = 40, new: int = 2, quantized: bool = False, dtype: torch.dtype = torch.float32
):
    """Return a function that makes query, key, value, keys, values for a step that grows its cache."""

    def make():
        caches = [tokens(length, seed=3, dtype=dtype), tokens(length, seed=4, dtype=dtype)]
        if quantized:
            quantize_cache_(caches, **{k: v for k, v in EXACT.items() if k != "inner"})
        return [tokens(new, seed=s, dtype=dtype) for s in range(3)] + caches

    return make


def buffers(first: int = 0, new: int = 5, quantized: bool = False):
    """Return a function that makes query, key, value, keys, values, position, mask for a step that writes."""

    def make():
        caches = [torch.zeros(2, 2, SLOTS, 16), torch.zeros(2, 2, SLOTS, 16)]
        for seed, cache in enumerate(caches):
            cache[:, :, :first] = tokens(first, seed=seed) if first else 0
        if quantized:
            quantize_cache_(
                caches, **{k: v for k, v in EXACT.items() if k != "inner"}, length=first
            )
        position = torch.arange(first, first + new)
        mask = torch.arange(SLOTS)[None] <= position[:, None]
        return [*(tokens(new, seed=s) for s in range(3)), *caches, position, mask]

    return make


def join(keys, values, key, value):
    return torch.cat([keys, key], 2), torch.cat([values, value], 2)


def assert_grows_alike(compiled, step, state: list, plain: list) -> None:
    """Take four steps compiled and not, from their caches on; compare, and see that caches stay quantized."""
    for new in (2, 1, 1, 3):
        arguments = [tokens(new, seed=seed) for seed in range(3)]
        output, *state = compiled(*arguments, *state)
        expected, *plain = step(*arguments, *plain)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert all(isinstance(cache, QuantizedKV) for cache in state)
