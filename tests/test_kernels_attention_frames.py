"""Fused attention over calibrated caches: channel tables, rotary keys, codebooks, fp8 parameters, trits.

The same claim as in `test_kernels_attention`: the error is that of the same computation in the query's
dtype. Compiled ahead of time, kernels keep their state in registers.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import attention, reference
from kvq_compile.kernels.frame import Frame
from kvq_compile.kernels.ops import new_parts
from kvq_compile.kernels.spec import CacheSpec, PageLayout, TensorSpec
from kvq_compile.small_tables import framed_layouts, random_tables

pytestmark = pytest.mark.filterwarnings(  # of numpy, from Triton's interpreter
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"


# Shrinking a failure natively would compile a kernel for every attempt.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate) + (Phase.shrink,) * (not NATIVE)
EXAMPLES = settings(max_examples=settings().max_examples, phases=PHASES)
Side = tuple[PageLayout, Frame | None]


class Site:
    """One attention: a filled cache of calibrated keys and values, queries and new tokens."""

    def __init__(
        self, sides: tuple[Any, Any], shared: int, lengths: tuple[int, int], dtype: torch.dtype
    ) -> None:
        (self.start, new), (self.sides, heads, batch) = lengths, (sides, 2, 2)
        generator = torch.Generator().manual_seed(0)

        def random(heads: int, tokens: int, dim: int) -> Tensor:
            x = torch.randn(batch, tokens, heads, dim, generator=generator)
            return x.to(dtype).transpose(1, 2)

        dims = [layout.head_dim for layout, _ in sides]
        self.scale = dims[0] ** -0.5
        self.parts = [
            self.fill(random(heads, self.start, layout.head_dim), layout, frame)
            for layout, frame in sides
        ]
        self.query = random(heads * shared, new, dims[0])
        self.new = random(heads, new, dims[0]), random(heads, new, dims[1])

    @staticmethod
    def fill(x: Tensor, layout: Any, frame: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = new_parts(x, layout.pages_at(x.shape[2]) + 1, layout)
        if x.shape[2]:
            reference.append_(*parts, x, 0, layout, frame)
        return parts

    def attend(self, mask: Tensor | None, by_position: bool = True, **changed: Any) -> Tensor:
        """Run the kernels, with other frames if asked to."""
        frames = [changed.get(name, frame) for name, (_, frame) in zip(
            ("key_frame", "value_frame"), self.sides, strict=True)]  # fmt: skip
        frames = [
            f and Frame(f.tables.to(DEVICE), None if f.shift is None else f.shift.to(DEVICE))
            for f in frames
        ]
        tensors = [t.to(DEVICE) for t in (self.query, *self.new)]
        parts = [tuple(p.to(DEVICE) for p in parts) for parts in self.parts]
        slots = torch.arange(self.start, self.start + self.query.shape[2], device=DEVICE)
        start = None if by_position else self.start
        return attention.attend(
            *tensors, *parts, None if mask is None else mask.to(DEVICE),
            slots if by_position else None, start, self.scale, self.sides[0][0],
            self.sides[1][0], *frames,
        ).cpu()  # fmt: skip

    def expected(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Attend plainly in ``dtype`` to the tokens that the cache stands for."""
        tokens = []
        for new, parts, (layout, frame) in zip(self.new, self.parts, self.sides, strict=True):
            codes, params, exact, cursor = parts
            held = reference.read(codes, params, exact.float(), cursor, self.start, layout, frame)
            tokens.append(torch.cat([held, new.float()], 2).to(dtype))
        if mask is not None and mask.is_floating_point():
            mask = mask.to(dtype)
        return reference.softmax_attention(self.query.to(dtype), *tokens, mask, self.scale)

    def assert_low_precision_error(self, actual: Tensor, mask: Tensor | None) -> None:
        """Assert that the error is a small multiple of that of the same computation in low precision.

        The second term is the rounding of the result; the third is what fp32 loses where terms cancel:
        codes are summed apart from their zero points, coded values apart from their mean.
        """
        exact = self.expected(mask, torch.float64)
        assert actual.dtype == self.query.dtype
        assert actual.shape == exact.shape
        assert bool(actual.isfinite().all())
        dtype = self.query.dtype
        if NATIVE and dtype == torch.float32:
            dtype = torch.float16
        plain = (self.expected(mask, dtype).double() - exact).abs().max()
        bound = 3 * plain + 2 * torch.finfo(dtype).eps * exact.abs().max() + 5e-5
        error = (actual.double() - exact).abs().max()
        assert error <= bound, f"error {error:.2e} beyond {bound:.2e}; plainly {plain:.2e}"


def make_spec(head_dim: int, seed: int, **options: Any) -> Any:
    """Return a spec with random tables."""
    couple = options.get("couple")
    tables = random_tables(
        2, head_dim, group_size=options.get("group_size") or head_dim, seed=seed,
        rotary=options.get("rotary", False),
        codebook=None if couple is None else (couple, options["bits"]),
    )  # fmt: skip
    return TensorSpec(tables=tables, **options)


def make_side(role: Any, head_dim: int = 64, page: int = 32, seed: int = 0, **options: Any) -> Any:
    """Return a layout with random tables, and its frame."""
    spec = make_spec(head_dim, seed, **options)
    layout = CacheSpec(spec, spec, 3, 20, page).layout(role, head_dim)
    shift = torch.tensor([5, -3], dtype=torch.int32) if layout.rotary else None
    return layout, Frame(spec.tables.words, shift)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    pages = (draw(st.sampled_from((32, 32, 64))),)
    dims = (64, 80, 96, 128)
    key, key_frame = draw(framed_layouts("key", head_dims=dims, page_sizes=pages))
    plain = draw(st.sampled_from(("none", "none", "key", "value")))
    value, value_frame = draw(framed_layouts("value", head_dims=dims, page_sizes=pages))
    value = replace(value, sinks=key.sinks, window=key.window)
    spec = CacheSpec(TensorSpec(4), TensorSpec(2), key.sinks, key.window, pages[0])
    sides: tuple[Side, Side] = (key, key_frame), (value, value_frame)
    if plain == "key":
        sides = (spec.layout("key", key.head_dim), None), sides[1]
    elif plain == "value":
        sides = sides[0], (spec.layout("value", value.head_dim), None)
    boundary = key.sinks + key.window + pages[0]
    start = draw(st.sampled_from([1, boundary - 1, boundary, boundary + pages[0], boundary + 75]))
    lengths = start, draw(st.sampled_from([1, 1, 2, 5]))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    return Site(sides, draw(st.sampled_from([1, 2, 4, 7])), lengths, dtype)


@EXAMPLES
@given(sites(), st.data())
def test_attention_has_the_error_of_the_same_computation_in_low_precision(
    site: Site, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["none", "bool", "additive", "heads"]))
    tokens, width = site.query.shape[2], site.start + site.query.shape[2]
    mask = None
    if kind != "none":
        shape = (2, site.query.shape[1] if kind == "heads" else 1, tokens, width)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
        if kind == "additive":
            mask = torch.zeros(shape).masked_fill(~mask, -math.inf)
    site.assert_low_precision_error(site.attend(mask, data.draw(st.booleans())), mask)


KEYS = {
    "rotary": {"bits": 2, "rotary": True, "group_size": 32, "params": "fp8"},
    "rotary by channel": {"bits": 3, "rotary": True, "grouping": "channel", "group_size": 32},
    "rotary trits": {"bits": 1.5, "rotary": True, "packing": "trits", "params": "fp8"},
    "rotary codebook": {"bits": 8, "rotary": True, "couple": 4},
    "odd codebook": {"bits": 3, "rotary": True, "couple": 2},
    "tables": {"bits": 4, "transform": "hadamard"},
    "codebook": {"bits": 10, "couple": 4},
}
VALUES = {
    "trits": {"bits": 1.5, "packing": "trits", "group_size": 32, "params": "fp8"},
    "three levels": {"bits": 1.5, "group_size": 32, "params": "fp8"},
    "hadamard": {"bits": 2, "transform": "hadamard", "params": "fp8"},
    "codebook": {"bits": 8, "couple": 8},
    "small groups": {"bits": 8, "group_size": 16},
    "wide codebook": {"bits": 10, "couple": 4},
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["rotary", "codebook"])
def test_any_keys_go_with_any_values(key: str, value: str) -> None:
    sides = make_side("key", **KEYS[key]), make_side("value", seed=1, **VALUES[value])
    site = Site(sides, 4, (100, 1), torch.float32)
    site.assert_low_precision_error(site.attend(None), None)


@pytest.mark.parametrize("key", KEYS)
def test_a_page_in_two_halves_and_a_chunk_of_queries_are_right(key: str) -> None:
    sides = make_side("key", page=64, **KEYS[key]), make_side("value", page=64, bits=4)
    site = Site(sides, 4, (160, 9), torch.float32)
    causal = torch.arange(169) <= torch.arange(160, 169)[:, None]
    site.assert_low_precision_error(site.attend(causal), causal)


def test_other_tables_and_another_shift_change_the_result() -> None:
    sides = make_side("key", **KEYS["rotary"]), make_side("value", **VALUES["trits"])
    site = Site(sides, 2, (100, 1), torch.float32)
    before = site.attend(None)
    assert (before - site.expected(None, torch.float64)).abs().max() < 1e-4
    (_, keys), (_, values) = sides
    for other in (
        {"key_frame": replace(keys, shift=keys.shift + 1)},
        {"key_frame": replace(keys, tables=keys.tables.flip(0))},
        {"value_frame": replace(values, tables=values.tables.flip(0))},
    ):
        assert (site.attend(None, **other) - before).abs().max() > 1e-3


def test_a_prompt_without_history_attends_to_itself() -> None:
    sides = make_side("key", **KEYS["rotary"]), make_side("value", **VALUES["trits"])
    site = Site(sides, 2, (0, 9), torch.float32)
    site.assert_low_precision_error(site.attend(None, by_position=False), None)


def test_the_number_of_shares_does_not_change_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = make_side("key", **KEYS["rotary"]), make_side("value", **VALUES["three levels"])
    site = Site(sides, 4, (120, 1), torch.float32)
    expected = site.attend(None)
    monkeypatch.setattr(attention, "PROGRAMS_PER_PROCESSOR", 1000)
    torch.testing.assert_close(site.attend(None), expected, rtol=1e-5, atol=1e-5)


# --- ahead of time --------------------------------------------------------------------------------

SKVQ = {"group_size": 64, "params": "fp8"}
CASES = {  # keys before the rotary embedding and values
    "skvq-2": ({"bits": 2, "rotary": True, **SKVQ}, {"bits": 2, **SKVQ}),
    "skvq-3": ({"bits": 3, "rotary": True, **SKVQ}, {"bits": 3, **SKVQ}),
    "skvq-2-trits": (
        {"bits": 2, "rotary": True, **SKVQ},
        {"bits": 1.5, "packing": "trits", **SKVQ},
    ),
    "cq-4c8b": ({"bits": 8, "couple": 4, "rotary": True}, {"bits": 8, "couple": 4}),
    "cq-8c8b": ({"bits": 8, "couple": 8, "rotary": True}, {"bits": 8, "couple": 8}),
    "cq-8c10b": ({"bits": 10, "couple": 8, "rotary": True}, {"bits": 10, "couple": 8}),
}


def tool() -> Path | None:
    """Return the disassembler's companion that Triton brings along, if it does."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def argument_type(name: str, key: Any, value: Any) -> str:
    """Return the type of a kernel's argument that is no constant."""
    words = {False: "*i32", True: "*u16"}
    types = {"scale": "fp32", "partial": "*fp32", "lse": "*fp32", "packed_query": "*fp32"}
    types |= dict.fromkeys(("query", "key", "value", "key_exact", "value_exact"), "*bf16")
    types |= dict.fromkeys(("key_codes", "value_codes"), "*u16")
    types |= dict.fromkeys(("key_cursor", "value_cursor", "key_tables", "shift"), "*i32")
    types |= dict.fromkeys(("key_book", "value_book", "turns"), "*fp16")
    types |= {"key_params": words[key.fp8], "value_params": words[value.fp8], "position": "*i64"}
    return types.get(name, "i32")


def compile_case(name: str, target: tuple[str, Any, int]) -> dict[str, int]:
    """Compile one case; for an H100 return registers, bytes of stack and of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    key, value = CASES[name]
    specs = [make_spec(128, 0, **options) for options in (key, value)]
    layouts = [CacheSpec(*specs).layout(role, 128) for role in ("key", "value")]
    constants, options = attention.launch_constants(*layouts, 4, 1, torch.bfloat16, target[0])
    constants |= {"HAS_POSITION": True, "MASK_KIND": 0, "MASK_SHARED": False}
    constants |= {"mask": None, "query_bias": None, "tokens": 1, "m_s": 1}
    signature, attributes = {}, {}
    for index, argument in enumerate(attention.attend_kernel.arg_names):
        kind = argument_type(argument, constants["KEY"], constants["VALUE"])
        signature[argument] = "constexpr" if argument in constants else kind
        aligned = kind.startswith("*") or argument.endswith(("_b", "_h", "_t", "_words"))
        if aligned and argument not in constants:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=attention.attend_kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    compiled = triton.compile(source, target=GPUTarget(*target), options=options)
    if target[0] == "hip":
        return {"stack": 0}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool()), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)[0]
    return {"registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    if tool() is None:
        pytest.skip("this build of triton brings no cuobjdump")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_decoding_keeps_its_state_in_registers(
    compiled: dict[str, dict[str, int]], name: str
) -> None:
    """Two programs share a processor, too."""
    assert compiled[name]["stack"] == 0
    assert compiled[name]["shared"] * 2 <= 227 * 1024


if __name__ == "__main__":
    for case in ("skvq-2", "cq-8c8b"):
        compile_case(case, ("hip", "gfx942", 64))
    print(json.dumps({case: compile_case(case, ("cuda", 90, 32)) for case in CASES}))
