"""What the quick suite leaves out of Triton's interpreter changes nothing that kernels compute."""

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="there is nothing to interpret")
if torch.cuda.is_available():
    pytest.skip("kernels are not interpreted", allow_module_level=True)

import triton.language as tl
from triton.runtime import interpreter

import quick_interpreter
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Packed
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.triton import backend
from native import CONVERSIONS, OVERFLOWS

pytestmark = [CONVERSIONS, OVERFLOWS]
PARTS = [
    (interpreter.InterpretedFunction, "__call__"),
    (interpreter, "_get_np_dtype"),
    (tl.core, "_unwrap_shape"),
    (tl.block_type, "__init__"),
    (tl.tensor, "__init__"),
]
PLAIN = [
    getattr(owner, name) for owner, name in PARTS
]  # before tests run, which is when they are exchanged


def run() -> list[Tensor]:
    """Return what a cache holds after a prompt and a token, and what a query reads of it."""
    torch.manual_seed(0)
    sides = [Layout(role, 16, Regions(1, 3, 32), Uniform(4)) for role in ("key", "value")]
    caches = [Packed.empty(torch.zeros(1, 1, 1, 16), 2, layout) for layout in sides]
    for start, tokens in ((0, 40), (40, 1)):
        for cache, layout in zip(caches, sides, strict=True):
            x = torch.randn(1, 1, tokens, 16)
            backend.append_(cache, UNCALIBRATED, x, None, start, layout)
    query, new = torch.randn(1, 2, 1, 16), torch.randn(2, 1, 1, 1, 16)
    about = UNCALIBRATED, UNCALIBRATED, None, None, None, Score(0.25), *sides
    return [backend.attend(query, *new, *caches, *about), *caches[0], *caches[1]]


def test_kernels_leave_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for (owner, name), plain in zip(PARTS, PLAIN, strict=True):
        monkeypatch.setattr(owner, name, plain)
    expected = run()
    assert torch.isfinite(expected[0]).all() and expected[0].any()
    quick_interpreter.install(monkeypatch.setattr)
    for plain, quick in zip(expected, run(), strict=True):
        assert torch.equal(plain, quick)
