"""Whole paths give the same bits whatever the process holds for its default dtype.

The default is set only after what a user brings, weights and texts, is made: those may well depend on it.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import kvq_compile
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.schemes import scheme_of
from kvq_compile.kernels.transform import hadamard
from kvq_compile.testing.small_cache import LAYOUT, tokens
from kvq_compile.testing.small_decoder import Decoder
from kvq_compile.testing.small_tables import random_tables

DTYPES = (torch.float64, torch.bfloat16, torch.float16)
# Methods and options that between them go through every part of the CPU path.
METHODS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int3": {"transform": "hadamard"},
    "int2": {},
    "kivi": {},
    "qaq": {},
}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(params=DTYPES, ids=str)
def default(request: pytest.FixtureRequest) -> torch.dtype:
    """A default dtype other than torch's own."""
    dtype: torch.dtype = request.param
    return dtype


@contextmanager
def under(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the default, and what was made under another one forgotten."""
    before = torch.get_default_dtype()
    torch._dynamo.reset()
    hadamard.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        hadamard.cache_clear()


def decoder(method: str, kind: Any, dtype: torch.dtype) -> Decoder:
    options = {"method": method, "sinks": 1, "window": 4, "page_size": 32, **METHODS[method]}
    mask, padding = ("bool", (3, 0)) if kind == "static" else ("none", (0, 0))
    return Decoder(1, (2, 1), 64, dtype, kind, (80, 1, 2), padding, mask, options, seed=0)


def outputs(model: Decoder) -> list[Tensor]:
    return [call.output for call in model.run(inner="eager")]


@functools.cache
def expected_outputs(method: str, kind: str) -> list[Tensor]:
    return outputs(decoder(method, kind, torch.float32))


@pytest.mark.long(
    but=[
        "torch.float64-int3-grown",
        "torch.float64-qaq-grown",
        "torch.bfloat16-int8-static",
        "torch.float16-int2-grown",
    ]
)
@pytest.mark.parametrize(
    ("method", "kind"), [*((method, "grown") for method in METHODS), ("int8", "static")]
)
def test_generation_does_not_depend_on_the_default_dtype(
    method: str, kind: str, default: torch.dtype
) -> None:
    expected, model = expected_outputs(method, kind), decoder(method, kind, torch.float32)
    with under(default):
        found = outputs(model)
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.long(but=["torch.float64"])
def test_many_rows_and_few_read_what_they_read_under_another_default(default: torch.dtype) -> None:
    """Chunks of a prompt go another way than single tokens; models may be in half precision."""
    options = {"method": "int4", "sinks": 1, "window": 4, "page_size": 32}
    model = Decoder(
        1, (2, 1), 64, torch.bfloat16, "grown", (80, 40, 1), (0,), "none", options, seed=0
    )
    expected = outputs(model)
    with under(default):
        for one, other in zip(outputs(model), expected, strict=True):
            assert torch.equal(one, other)


def framed(rotary: bool, codebook: tuple[int, int] | None) -> QuantizedKV:
    tables = random_tables(2, 64, group_size=16, rotary=rotary, codebook=codebook, seed=0)
    plain = {"params": "fp8", "group_size": 16} if codebook is None else {"couple": codebook[0]}
    bits = 2 if codebook is None else codebook[1]
    scheme = scheme_of({"bits": bits, **plain}, tables.digest, rotary)
    layout = Layout("key", 64, Regions(2, 5, 32), scheme)
    shift = torch.tensor([0, -3], dtype=torch.int32, device="cpu") if rotary else None
    words = tables.words
    return QuantizedKV.from_dense(tokens(150), layout, tables=words, shift=shift)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("codebook", [None, (4, 4)])
def test_calibrated_caches_do_not_depend_on_the_default_dtype(
    rotary: bool, codebook: tuple[int, int] | None, default: torch.dtype
) -> None:
    expected = framed(rotary, codebook)
    with under(default):
        found = framed(rotary, codebook)
        read = found.dequantize()
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.params, expected.params)
    assert torch.equal(read, expected.dequantize())


def test_a_cache_made_cropped_and_read_does_not_depend_on_the_default_dtype(
    default: torch.dtype,
) -> None:
    expected = QuantizedKV.from_dense(tokens(150), LAYOUT)[:, :, :50].dequantize()
    with under(default):
        found = QuantizedKV.from_dense(tokens(150), LAYOUT)[:, :, :50].dequantize()
    assert torch.equal(found, expected)


@pytest.mark.long(but=["cq-4c4b"])
@pytest.mark.parametrize("method", ["skvq", "cq-4c4b"])
def test_calibration_does_not_depend_on_the_default_dtype(method: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=1, num_key_value_heads=1, head_dim=64, vocab_size=64,
        num_hidden_layers=1, intermediate_size=64, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    texts = [torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(0))]
    expected = kvq_compile.calibrate(model, texts, method, tokens=128)
    with under(torch.bfloat16):
        found = kvq_compile.calibrate(model, texts, method, tokens=128)
    assert found.layers == expected.layers
